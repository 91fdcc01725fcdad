// predict: classes and their confusion matrix from low-resolution logits, without logits at full resolution.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "isa.h"
#include "predict_arguments.h"
#include "predict_kernel.h"
#include "tensors.h"

namespace cisc::predict {

extern const Kernel kPortable = &run;

namespace {

constexpr const char* kName = "predict";

// logits: [B,K,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// outputs
// classes: [B,H,W] uint8
// confusion: [K,K] int64, rows = truth; [0] without labels
std::tuple<Tensor, Tensor> forward(const Tensor& logits, int64_t height, int64_t width,
                                   const std::optional<Tensor>& labels, int64_t ignore_index) {
  check_arguments(kName, logits, height, width, labels, Place::cpu);
  const int64_t batch = logits.size(0), planes = logits.size(1);
  const std::array<int64_t, 3> size{batch, height, width};
  const std::array<int64_t, 2> square{planes, planes};
  const std::array<int64_t, 1> none{0};
  Tensor classes = torch::stable::new_empty(logits, {size.data(), size.size()}, ScalarType::Byte);
  Tensor confusion = labels.has_value()
                         ? torch::stable::new_zeros(logits, {square.data(), square.size()}, ScalarType::Long)
                         : torch::stable::new_zeros(logits, {none.data(), none.size()}, ScalarType::Long);
  if (classes.numel() == 0) return {classes, confusion};
  const upsample::Grid shape = grid_of(logits, height, width, true);
  const upsample::Tables table(shape);
  const upsample::Plan p = plan(table.grid, batch);
  Problem problem{table.grid,
                  read_image(logits),
                  p,
                  labels.has_value(),
                  {},
                  ignore_index,
                  static_cast<uint8_t*>(classes.mutable_data_ptr())};
  if (labels.has_value()) problem.labels = read_labels(*labels);
  const Kernel kernel = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const int64_t cells = labels.has_value() ? planes * planes : 0;
  std::vector<Sums> sums(static_cast<size_t>(batch * p.tasks));
  const std::vector<int64_t> counted =
      upsample::run_tasks(p, table.grid, batch, nullptr, copies(planes) * cells,
                          [&](const upsample::Task& task, int64_t i) { kernel(problem, task, &sums[i]); });
  auto* counts = static_cast<int64_t*>(confusion.mutable_data_ptr());
  for (size_t i = 0; i < counted.size(); ++i) counts[static_cast<int64_t>(i) % cells] += counted[i];
  const bool invalid = std::any_of(sums.begin(), sums.end(), [](const Sums& one) { return one.invalid; });
  if (invalid) fail_labels(kName, *labels, planes, ignore_index);
  return {classes, confusion};
}

}  // namespace
}  // namespace cisc::predict

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) { m.def(cisc::predict::kSchema); }

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) { m.impl("predict", TORCH_BOX(&cisc::predict::forward)); }
