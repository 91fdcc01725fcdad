// rectified_cross_entropy: cross-entropy of upsampled logits, each pixel weighted by the agreement of its map
// and its label. The upsampled logits never exist.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "isa.h"
#include "rectified_cross_entropy_arguments.h"
#include "rectified_cross_entropy_kernel.h"
#include "tensors.h"

namespace cisc::rectified_cross_entropy {

const Kernels kPortable{&loss, &gradient, &count};

namespace {

void check_all(const char* op, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
               const MaybeTensor& classes, int64_t ohem_min_kept) {
  check_arguments(op, logits, labels, similarity, classes, ohem_min_kept, Place::cpu);
  if (!classes.has_value()) return;
  for (int64_t b = 0; b < logits.size(0); ++b) read_classes(op, *classes, b, logits.size(1));
}

// A problem with all that its views point to.
class Solver {
 public:
  Problem problem{};

  Solver(const char* op, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
         const MaybeTensor& classes, int64_t ignore_index, bool gradient)
      : op_(op),
        labels_(labels),
        batch_(logits.size(0)),
        logits_table_(grid_of(logits, labels.size(1), labels.size(2), true)),
        maps_table_(similarity.has_value() ? grid_of(*similarity, labels.size(1), labels.size(2), false)
                                           : upsample::Grid{0, 1, 1, labels.size(1), labels.size(2), false}),
        kernels_(CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16)) {
    problem.grid = logits_table_.grid;
    problem.map_grid = maps_table_.grid;
    problem.logits = read_image(logits);
    if (similarity.has_value()) problem.maps = read_image(*similarity);
    problem.labels = read_labels(labels);
    problem.ignore_index = ignore_index;
    problem.plan = plan(problem.grid, problem.map_grid, batch_, gradient);
    if (classes.has_value()) {
      classes_.reserve(static_cast<size_t>(classes->numel()) + 1);  // null would mean that there are none
      for (int64_t b = 0; b < batch_; ++b) {
        for (const int64_t value : read_classes(op, *classes, b, logits.size(1))) {
          classes_.push_back(static_cast<int32_t>(value));
        }
      }
      problem.classes = classes_.data();
    }
  }

  // Drop pixels that are too easy: those whose probability of their label lies above the larger of the
  // threshold and the min_kept-th smallest.
  void mine(double threshold, int64_t min_kept) {
    problem.ohem = true;
    problem.limit = static_cast<float>(threshold);
    if (min_kept == 0) return;
    Count count{-1};
    int64_t rank = min_kept, pixels = 0;
    uint32_t bits = 0;
    for (int pass = 0; pass < kPasses; ++pass) {
      const std::vector<int64_t> histogram = counted(count);
      if (pass == 0) {
        for (const int64_t n : histogram) pixels += n;
        if (pixels < min_kept) {
          problem.limit = std::numeric_limits<float>::infinity();
          return;
        }
      }
      uint32_t bin = 0;
      while (histogram[bin] < rank) rank -= histogram[bin++];
      bits = bits << 16 | bin;
      count.prefix = static_cast<int32_t>(bin);
    }
    float smallest;
    std::memcpy(&smallest, &bits, sizeof smallest);
    if (!(smallest <= problem.limit)) problem.limit = smallest;
  }

  // Sums over all pixels; the gradient of the summed loss is added to grad [B,K,h,w] unless that is null.
  Sums run(float* grad) const {
    std::vector<Sums> sums(static_cast<size_t>(batch_ * problem.plan.tasks));
    const auto kernel = grad != nullptr ? kernels_.gradient : kernels_.loss;
    upsample::run_tasks(problem.plan, problem.grid, batch_, grad, 0,
                        [&](const upsample::Task& task, int64_t i) { kernel(problem, task, &sums[i]); });
    return added(sums);
  }

 private:
  Sums added(const std::vector<Sums>& sums) const {
    Sums all;
    for (const Sums& one : sums) {
      all.loss += one.loss;
      all.kept += one.kept;
      all.invalid |= one.invalid;
    }
    if (all.invalid) fail_labels(op_, labels_, problem.grid.planes, problem.ignore_index);
    return all;
  }

  std::vector<int64_t> counted(const Count& count) const {
    std::vector<Sums> sums(static_cast<size_t>(batch_ * problem.plan.tasks));
    std::vector<int64_t> histogram = upsample::run_tasks(
        problem.plan, problem.grid, batch_, nullptr, kHistogram,
        [&](const upsample::Task& task, int64_t i) { kernels_.count(problem, task, count, &sums[i]); });
    added(sums);
    return histogram;
  }

  const char* op_;
  const Tensor& labels_;
  int64_t batch_;
  upsample::Tables logits_table_, maps_table_;
  std::vector<int32_t> classes_;
  const Kernels& kernels_;
};

// logits: [B,K,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// similarity: [B,S,h',w'] float32, bfloat16 or float16, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// loss: scalar or, for "none", [B,H,W] float32
// grad: [B,K,h,w] float32 of the scalar, or [0]
std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
                                   const MaybeTensor& classes, int64_t ignore_index, std::string reduction,
                                   std::optional<double> ohem_threshold, int64_t ohem_min_kept,
                                   bool need_grad) {
  check_all(kForward, logits, labels, similarity, classes, ohem_min_kept);
  check_reduction(reduction);
  const bool each = reduction == "none";
  Tensor grad = gradient_like(logits, need_grad);
  Tensor loss =
      each ? torch::stable::new_empty(
                 labels, {std::array<int64_t, 3>{labels.size(0), labels.size(1), labels.size(2)}.data(), 3},
                 ScalarType::Float)
           : scalar(logits, 0.0);
  if (labels.numel() == 0) return {loss, grad};
  check_sides(kForward, logits, labels.size(1), labels.size(2));
  if (similarity.has_value()) check_sides(kForward, *similarity, labels.size(1), labels.size(2));
  Solver solver(kForward, logits, labels, similarity, classes, ignore_index, need_grad);
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  if (each) solver.problem.pixel_loss = static_cast<float*>(loss.mutable_data_ptr());
  float* into = need_grad ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  const Sums sums = solver.run(into);
  if (each) return {loss, grad};
  double divisor = 1.0;
  if (reduction == "mean") divisor = static_cast<double>(labels.numel());
  if (reduction == "valid_mean") divisor = static_cast<double>(std::max<int64_t>(sums.kept, 1));
  if (need_grad) divide(into, grad.numel(), divisor);
  return {scalar(logits, sums.loss / divisor), grad};
}

// grad: [B,H,W] float32, any strides
// the rest as in `forward`, with reduction "none"
// outputs
// gradient: [B,K,h,w] float32, contiguous
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
                const MaybeTensor& classes, int64_t ignore_index, std::optional<double> ohem_threshold,
                int64_t ohem_min_kept) {
  check_all(kBackward, logits, labels, similarity, classes, ohem_min_kept);
  check_grad(kBackward, grad, {labels.size(0), labels.size(1), labels.size(2)}, "[B,H,W]", Place::cpu);
  Tensor gradient = gradient_like(logits, true);
  if (labels.numel() == 0) return gradient;
  check_sides(kBackward, logits, labels.size(1), labels.size(2));
  if (similarity.has_value()) check_sides(kBackward, *similarity, labels.size(1), labels.size(2));
  Solver solver(kBackward, logits, labels, similarity, classes, ignore_index, true);
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  solver.problem.pixel_grad = static_cast<const float*>(grad.const_data_ptr());
  for (int64_t d = 0; d < 3; ++d) solver.problem.pixel_grad_stride[d] = grad.stride(d);
  solver.run(static_cast<float*>(gradient.mutable_data_ptr()));
  return gradient;
}

}  // namespace
}  // namespace cisc::rectified_cross_entropy

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::rectified_cross_entropy::kSchema);
  m.def(cisc::rectified_cross_entropy::kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("rectified_cross_entropy", TORCH_BOX(&cisc::rectified_cross_entropy::forward));
  m.impl("rectified_cross_entropy_backward", TORCH_BOX(&cisc::rectified_cross_entropy::backward));
}
