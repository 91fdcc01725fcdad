// map_consistency: binary cross-entropy of upsampled maps against labels, without maps at label resolution.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "isa.h"
#include "map_consistency_arguments.h"
#include "map_consistency_kernel.h"
#include "tensors.h"

namespace cisc::map_consistency {

const Kernels kPortable{&loss, &gradient};

namespace {

// similarity: [B,S,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// loss: scalar float32
// grad: [B,S,h,w] float32 of it, or [0]
std::tuple<Tensor, Tensor> forward(const Tensor& similarity, const Tensor& labels, const Tensor& classes,
                                   int64_t ignore_index, bool need_grad) {
  check_arguments(similarity, labels, classes, Place::cpu);
  const int64_t batch = similarity.size(0);

  std::vector<Slots> slots;
  std::vector<Slots::View> views;
  std::vector<int32_t> of_column;
  std::vector<float> share;
  slots.reserve(static_cast<size_t>(batch));
  bool any = false;
  for (int64_t b = 0; b < batch; ++b) {
    slots.emplace_back(read_classes(kName, classes, b));
    views.push_back(slots.back().view());
    int64_t valid = 0;
    for (const int32_t slot : slots.back().of_column) {
      of_column.push_back(slot);
      valid += slot >= 0;
    }
    any |= valid > 0;
    share.push_back(1.0f / static_cast<float>(std::max<int64_t>(valid, 1)));
  }

  Tensor grad = gradient_like(similarity, need_grad);
  if (labels.numel() == 0 || !any) return {scalar(similarity, 0.0), grad};
  const upsample::Grid shape = grid_of(similarity, labels.size(1), labels.size(2), false);
  check_sides(kName, similarity, labels.size(1), labels.size(2));
  const upsample::Tables table(shape);
  const upsample::Plan p = plan(table.grid, batch, need_grad);
  const Problem problem{table.grid,   read_image(similarity), p,           read_labels(labels), ignore_index,
                        views.data(), of_column.data(),       share.data()};
  const Kernels& kernels = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const auto kernel = need_grad ? kernels.gradient : kernels.loss;
  std::vector<Sums> sums(static_cast<size_t>(batch * p.tasks));
  float* into = need_grad ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  upsample::run_tasks(p, table.grid, batch, into, 0,
                      [&](const upsample::Task& task, int64_t i) { kernel(problem, task, &sums[i]); });
  Sums all;
  for (const Sums& one : sums) {
    all.loss += one.loss;
    all.kept += one.kept;
  }
  const auto divisor = static_cast<double>(std::max<int64_t>(all.kept, 1));
  if (need_grad) divide(into, grad.numel(), divisor);
  return {scalar(similarity, all.loss / divisor), grad};
}

}  // namespace
}  // namespace cisc::map_consistency

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) { m.def(cisc::map_consistency::kSchema); }

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("map_consistency", TORCH_BOX(&cisc::map_consistency::forward));
}
