// rectified_cross_entropy on a GPU: a thread has a cell of low-resolution logits and goes through the classes
// for their largest corner, for the sums of the exponentials, and for the gradient.
//
// Work: for a pixel and class, of 4 x 4 in a cell, the largest corner takes a good instruction, the sum 4 and
// the gradient 8, and a pixel some 50 for its label, logarithm and weight: at B = 16, K = 19, 721 x 721 that
// is 2.5 G, with what neighbouring warps go through both 2.8 G, of 132 x 128 a clock at 1.75 GHz, 95 us. A
// row of four pixels takes two exponentials in each pass, its first one and the ratio of neighbours, of which
// a multiprocessor takes 16 a clock: 48 us. The bytes are 20 us.
//
// The exponentials are taken relative to the largest corner of a cell, which bounds all its pixels. Where a
// pixel lies so far below that its sum gets tiny, or corners so far apart that a first exponential or a ratio
// is none, the maximum of each pixel is found first.
//
// The probabilities by which OHEM chooses pixels are always taken from each pixel's own maximum: equal logits
// must have equal ones, and three launches must find the same, to the last bit: they have one function. Loss
// and gradient of the chosen are then those that the same pixels have without the choice.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "rectified_cross_entropy_arguments.h"
#include "rectified_cross_entropy_device.cuh"
#include "tensors.h"

namespace cisc::rectified_cross_entropy {

namespace {

// kGeneral: with OHEM, with the maximum of a pixel where it is needed, and of tasks that another launch left
// at that. The kernel without needs fewer registers and leaves such tasks.
template <typename T, int n, Mode kMode, bool kGeneral>
__global__ void __launch_bounds__(kLanes, kWarps) cross_entropy_kernel(Maps<T> logits, Kernel p) {
  CISC_DYNAMIC_SHARED(memory);
  const Carry carry = Carry::of(p.walk, p.planes, p.carry, memory);
  float factor = 1.0f;
  if (kMode == Mode::gradient)
    factor = 1.0f / static_cast<float>(cells::divisor_of(p.state, p.by, p.divisor));
  unsigned long long* const histogram =
      kMode == Mode::histogram ? p.histogram + blockIdx.x % kCopies * kDigits : nullptr;
  const auto flush = [&](int32_t digit, uint32_t count) {
    atomicAdd(&histogram[digit], static_cast<unsigned long long>(count));
  };
  cells::Run run;  // of digits
  int64_t kept = 0;
  bool wrong = false;
  for (int64_t number = blockIdx.x; number < p.walk.tasks(); number += gridDim.x) {
    if (kGeneral && p.left != nullptr && p.left[number] == 0) continue;
    const cells::Task task = cells::Task::of(p.walk, number);
    const T* const image = logits.data + task.image * logits.stride_b;
    wrong = cells::any_wrong(p.classes, task, p.planes) || wrong;
    bool fine = true;
    cells::walk_pieces<kMode, n>(
        p, task, logits, carry, factor, 1.0,
        [&](const Corners& corners, const Piece<n>& piece, bool counts, const Passage& passage,
            float* gradient) {
          int code[n][n];
          read_codes(p, task.image, piece, &wrong, code);
          if constexpr (kMode == Mode::histogram) {
            if (counts) count_digits(p, image, logits.stride_k, corners, piece, code, flush, &run);
            return 0.0f;
          } else {
            if (kGeneral && p.limit != nullptr) {
              drop_easy(image, p.planes, logits.stride_k, corners, piece, *p.limit, code);
#pragma unroll
              for (int i = 0; i < n; ++i) {
#pragma unroll
                for (int j = 0; j < n; ++j) kept += counts && code[i][j] >= 0;
              }
            }
            return piece_loss<kMode, kGeneral>(p, task.image, image, logits.stride_k, corners, piece, code,
                                               passage, gradient, &fine);
          }
        });
    if (kMode != Mode::histogram && !kGeneral) {
      const bool all = __all_sync(kAll, fine);
      if (threadIdx.x == 0) p.left[number] = all ? 0 : 1;
    }
  }
  if (kMode == Mode::histogram) run.add(-1, flush);
  if (wrong) p.state->wrong = 1;  // whoever writes, the same
  if (kMode != Mode::histogram && kGeneral && p.limit != nullptr) {
    kept = warp_sum(kept);
    if (threadIdx.x == 0 && kept > 0) atomicAdd(&p.state->kept, static_cast<unsigned long long>(kept));
  }
}

// Add up the copies of a histogram, a group of digits per block.
// outputs
// sums: [kDigits], over the groups: [kGroups]
__global__ void __launch_bounds__(kGroup)
    fold_kernel(const unsigned long long* histogram, unsigned long long* sums, unsigned long long* groups) {
  const int64_t digit = static_cast<int64_t>(blockIdx.x) * kGroup + threadIdx.x;
  unsigned long long sum = 0;
  for (int64_t copy = 0; copy < kCopies; ++copy) sum += histogram[copy * kDigits + digit];
  sums[digit] = sum;
  sum = block_sum<kGroup>(sum);
  if (threadIdx.x == 0) groups[blockIdx.x] = sum;
}

// Find the digit in which the probability of a rank lies; after the last one, the limit.
// outputs
// search: its rank is read after the first digit
// limit: [], holds OHEM's threshold at first
__global__ void __launch_bounds__(kGroup)
    select_kernel(const unsigned long long* sums, const unsigned long long* groups, int64_t min_kept,
                  bool last, Search* search, float* limit) {
  CISC_SHARED(size, unsigned long long[kGroup]);
  CISC_SHARED(found, int);
  CISC_SHARED(left, unsigned long long);
  CISC_SHARED(all, unsigned long long);
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned long long rank = static_cast<unsigned long long>(last ? search->rank : min_kept);
  // The place where the numbers up to it reach a rank, and what of the rank is left.
  const auto find = [&](const unsigned long long* numbers, unsigned long long of) {
    size[thread] = numbers[thread];
    if (thread == 0) {
      found = kGroup - 1;
      left = of;
    }
    __syncthreads();
    unsigned long long up_to = 0;
    for (int i = 0; i < thread; ++i) up_to += size[i];
    if (up_to < of && up_to + size[thread] >= of) {
      found = thread;
      left = of - up_to;
    }
    if (thread == kGroup - 1) all = up_to + size[thread];
    __syncthreads();
  };
  find(groups, rank);
  const int group = found;
  const unsigned long long within = left, counted = all;
  __syncthreads();
  find(sums + group * kGroup, within);
  if (thread > 0) return;
  const int digit = group * kGroup + found;
  if (!last) {
    search->digit = digit;
    search->rank = static_cast<long long>(left);
    // With fewer pixels nothing is dropped.
    if (counted < static_cast<unsigned long long>(min_kept)) *limit = INFINITY;
    return;
  }
  const float smallest =
      __uint_as_float(static_cast<unsigned>(search->digit) << 16 | static_cast<unsigned>(digit));
  if (!(smallest <= *limit)) *limit = smallest;
}

// A problem with all that its kernels need.
class Solver {
 public:
  Kernel kernel{};

  Solver(const Gpu& gpu, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
         const MaybeTensor& classes, int64_t ignore_index, Tensor& state)
      : gpu_(gpu), logits_(logits) {
    const int64_t height = labels.size(1), width = labels.size(2);
    rows_ = Axis::of(logits.size(2), height, true);
    columns_ = Axis::of(logits.size(3), width, true);
    if (columns_.n > 1) kernel.step = static_cast<float>(columns_.step) / static_cast<float>(columns_.whole);
    kernel.widest = kernel.step > 0.5f ? kWidest / 2.0f : kWidest;
    kernel.planes = logits.size(1);
    kernel.labels = read_labels(labels);
    kernel.ignore_index = ignore_index;
    if (similarity.has_value()) {
      kernel.maps = {float_kind(similarity->scalar_type()),
                     similarity->const_data_ptr(),
                     similarity->size(1),
                     similarity->stride(0),
                     similarity->stride(1),
                     similarity->stride(2),
                     similarity->stride(3),
                     Axis::of(similarity->size(2), height, false),
                     Axis::of(similarity->size(3), width, false)};
    }
    if (classes.has_value()) kernel.classes = classes_of(*classes);
    kernel.state = static_cast<State*>(state.mutable_data_ptr());
    kernel.divisor = 1.0;
  }

  // Leave out pixels that are too easy: those whose probability of their label lies above the larger of the
  // threshold and the min_kept-th smallest.
  void mine(double threshold, int64_t min_kept) {
    limit_ = device_empty(logits_, {1}, ScalarType::Float);
    torch::stable::fill_(limit_, threshold);
    auto* limit = data_of<float>(limit_);
    if (min_kept > 0) {
      Tensor found = device_empty(logits_, {2}, ScalarType::Long);
      Tensor sums = device_empty(logits_, {kDigits + kGroups}, ScalarType::Long);
      auto* search = data_of<Search>(found);
      auto* digits = data_of<unsigned long long>(sums);
      for (const bool last : {false, true}) {
        Tensor histogram = device_zeros(logits_, {kCopies, kDigits}, ScalarType::Long);
        kernel.histogram = data_of<unsigned long long>(histogram);
        kernel.search = last ? search : nullptr;
        run<Mode::histogram>();
        gpu_.launch(fold_kernel, kGroups, kGroup, 0, kernel.histogram, digits, digits + kDigits);
        gpu_.launch(select_kernel, 1, kGroup, 0, digits, digits + kDigits, min_kept, last, search, limit);
      }
    }
    kernel.limit = limit;
  }

  // The sums of the loss, [partials] float64.
  template <Mode kMode>
  Tensor run() {
    WalkPlan plan = WalkPlan::of(gpu_, logits_, rows_, columns_, true, kMode);
    kernel.walk = plan.walk;
    kernel.carry = plan.workspace();
    kernel.partial = data_of<double>(plan.partial);
    // Of what the general kernel is for, there is mostly nothing.
    const int64_t farthest = kernel.planes * std::max(logits_.stride(1), logits_.size(2) * logits_.size(3));
    const bool general =
        kernel.limit != nullptr || kernel.planes == 1 || kMode == Mode::histogram || farthest > INT32_MAX;
    Tensor left = device_empty(logits_, {general ? 0 : plan.walk.tasks()}, ScalarType::Byte);
    kernel.left = general ? nullptr : data_of<uint8_t>(left);
    const int64_t blocks = general ? plan.blocks : std::min(plan.blocks, gpu_.multiprocessors() * kWarps);
    with_float(float_kind(logits_.scalar_type()), [&](auto type) {
      using T = decltype(type);
      const Maps<T> maps = cells::maps_of<T>(logits_);
      plan.with_side([&](auto side) {
        constexpr int n = decltype(side)::value;
        if constexpr (kMode != Mode::histogram) {
          if (!general) {
            gpu_.launch(cross_entropy_kernel<T, n, kMode, false>, plan.blocks, kLanes, plan.shared, maps,
                        kernel);
          }
        }
        gpu_.launch(cross_entropy_kernel<T, n, kMode, true>, blocks, kLanes, plan.shared, maps, kernel);
      });
    });
    return plan.partial;
  }

 private:
  const Gpu& gpu_;
  const Tensor& logits_;
  Tensor limit_;
  Axis rows_{}, columns_{};
};

void check_values(const char* op, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
                  const MaybeTensor& classes, int64_t ignore_index) {
  check_same_device(op, "labels", labels, logits);
  if (similarity.has_value()) check_same_device(op, "similarity", *similarity, logits);
  if (classes.has_value()) {
    check_same_device(op, "classes", *classes, logits);
    check_class_values(op, *classes, logits.size(1));
  }
  if (labels.numel() == 0) return;
  check_sides(op, logits, labels.size(1), labels.size(2));
  if (similarity.has_value()) check_sides(op, *similarity, labels.size(1), labels.size(2));
  check_label_values(op, labels, logits.size(1), ignore_index);
}

// logits: [B,K,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// similarity: [B,S,h',w'] float32, bfloat16 or float16, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// loss: scalar or, for "none", [B,H,W] float32
// grad: [B,K,h,w] float32 of the scalar, or [0]
std::tuple<Tensor, Tensor> cuda_forward(const Tensor& logits, const Tensor& labels,
                                        const MaybeTensor& similarity, const MaybeTensor& classes,
                                        int64_t ignore_index, std::string reduction,
                                        std::optional<double> ohem_threshold, int64_t ohem_min_kept,
                                        bool need_grad) {
  check_arguments(kForward, logits, labels, similarity, classes, ohem_min_kept, kHere);
  check_reduction(reduction);
  const Gpu gpu(kForward, "logits", logits);
  check_values(kForward, logits, labels, similarity, classes, ignore_index);
  const bool each = reduction == "none", empty = labels.numel() == 0;
  Tensor state = device_zeros(logits, {cells::kStateWords}, ScalarType::Long);
  Tensor loss =
      each ? device_empty(logits, {labels.size(0), labels.size(1), labels.size(2)}, ScalarType::Float)
           : device_empty(logits, {}, ScalarType::Float);
  Tensor grad = empty ? gradient_like(logits, need_grad) : device_gradient(logits, need_grad);
  Solver solver(gpu, logits, labels, similarity, classes, ignore_index, state);
  State* const shared = solver.kernel.state;
  if (empty) {
    if (each) return {loss, grad};
    cells::launch_empty(gpu, solver.kernel.classes, logits.size(1), shared, &loss, &grad);
    return {loss, grad};
  }
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  Divisor by = Divisor::given;
  const double divisor = reduction == "mean" ? static_cast<double>(labels.numel()) : 1.0;
  if (reduction == "valid_mean") by = ohem_threshold.has_value() ? Divisor::kept : Divisor::counted;
  if (by == Divisor::counted) cells::launch_count(gpu, labels, solver.kernel.labels, ignore_index, shared);
  // How many pixels are kept is known only afterwards.
  const bool divides = by == Divisor::kept;
  solver.kernel.by = divides ? Divisor::given : by;
  solver.kernel.divisor = divisor;
  if (each) solver.kernel.pixel_loss = data_of<float>(loss);
  if (need_grad) solver.kernel.grad = data_of<float>(grad);
  const Tensor partial = need_grad ? solver.run<Mode::gradient>() : solver.run<Mode::loss>();
  const auto* sums = static_cast<const double*>(partial.const_data_ptr());
  if (each) {
    cells::launch_finish(gpu, sums, 0, shared, by, divisor, false, nullptr, data_of<float>(loss),
                         loss.numel());
  } else {
    cells::launch_finish(gpu, sums, partial.numel(), shared, by, divisor, divides && need_grad,
                         data_of<float>(loss), data_of<float>(grad), grad.numel());
  }
  return {loss, grad};
}

// grad: [B,H,W] float32, any strides
// the rest as in `cuda_forward`, with reduction "none"
// outputs
// gradient: [B,K,h,w] float32, contiguous
Tensor cuda_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                     const MaybeTensor& similarity, const MaybeTensor& classes, int64_t ignore_index,
                     std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  check_arguments(kBackward, logits, labels, similarity, classes, ohem_min_kept, kHere);
  check_grad(kBackward, grad, {labels.size(0), labels.size(1), labels.size(2)}, "[B,H,W]", kHere);
  const Gpu gpu(kBackward, "logits", logits);
  check_values(kBackward, logits, labels, similarity, classes, ignore_index);
  check_same_device(kBackward, "grad", grad, logits);
  if (labels.numel() == 0) return gradient_like(logits, true);
  Tensor gradient = device_gradient(logits, true);
  Tensor state = device_zeros(logits, {cells::kStateWords}, ScalarType::Long);
  Solver solver(gpu, logits, labels, similarity, classes, ignore_index, state);
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  solver.kernel.given = static_cast<const float*>(grad.const_data_ptr());
  solver.kernel.given_b = grad.stride(0);
  solver.kernel.given_y = grad.stride(1);
  solver.kernel.given_x = grad.stride(2);
  solver.kernel.grad = data_of<float>(gradient);
  const Tensor partial = solver.run<Mode::gradient>();
  cells::launch_finish(gpu, nullptr, 0, solver.kernel.state, Divisor::given, 1.0, false, nullptr,
                       data_of<float>(gradient), gradient.numel());
  return gradient;
}

}  // namespace
}  // namespace cisc::rectified_cross_entropy

CISC_DEFINE(cisc::rectified_cross_entropy::kSchema, cisc::rectified_cross_entropy::kBackwardSchema)

CISC_REGISTER(m) {
  m.impl("rectified_cross_entropy", TORCH_BOX(&cisc::rectified_cross_entropy::cuda_forward));
  m.impl("rectified_cross_entropy_backward", TORCH_BOX(&cisc::rectified_cross_entropy::cuda_backward));
}
