// map_consistency on a GPU: a thread has a cell of low-resolution similarities; loss and gradient in one
// pass.
//
// Work: at B = 16, S = 1, 721 x 721 there are 8.3 M pixels of some 70 instructions with the gradient (label,
// interpolation, logarithm, division, adjoint): 22 us of 132 x 128 a clock at 1.75 GHz; the bytes, mostly
// labels, are 12 MB, 3 us. How many pixels count is known only at the end: the gradient, of low resolution,
// is divided then.

#include <tuple>

#include "adjoint.cuh"
#include "map_consistency_arguments.h"
#include "pixel_loss.h"
#include "tensors.h"

namespace cisc::map_consistency {

namespace {

using cells::Adjoint;
using cells::Axis;
using cells::Carry;
using cells::Corners;
using cells::Divisor;
using cells::kLanes;
using cells::kWarps;
using cells::Maps;
using cells::Mode;
using cells::Passage;
using cells::Piece;
using cells::Square;
using cells::State;
using cells::WalkPlan;
using Kernel = cells::LossKernel;

constexpr int kFound = INT32_MAX, kOther = kFound - 1;  // of labels from kOther on, and of those below 0

// The label of each pixel of a piece; -1 where there is none or it is ignored.
template <int n>
__device__ __forceinline__ void read_codes(const Kernel& p, int64_t image, const Piece<n>& piece,
                                           // outputs
                                           int (&code)[n][n]) {
  cells::for_labels(p.labels, image, piece, p.ignore_index, [&](int i, int j, bool counts, auto label) {
    const int known = label < static_cast<decltype(label)>(kOther) ? static_cast<int>(label) : kOther;
    code[i][j] = counts ? known : -1;
  });
}

// Of the labels from kOther on, those of a class become kFound; with `back` they become kOther again.
template <int n>
__device__ __forceinline__ void find_large(const Kernel& p, int64_t image, const Piece<n>& piece,
                                           int64_t target, bool back,
                                           // outputs
                                           int (&code)[n][n]) {
  unsigned found = 0;
#pragma unroll 1
  for (int pixel = 0; pixel < n * n && !back; ++pixel) {
    const int i = pixel / n, j = pixel % n;
    if (piece.has(i, j) && p.labels.at(image, piece.y + i, piece.x + j) == target) found |= 1u << pixel;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (code[i][j] >= kOther) code[i][j] = (found >> (i * n + j) & 1) != 0 ? kFound : kOther;
    }
  }
}

template <typename T, int n, Mode kMode>
__global__ void __launch_bounds__(kLanes, kWarps) consistency_kernel(Maps<T> similarity, Kernel p) {
  CISC_DYNAMIC_SHARED(memory);
  const Carry carry = Carry::of(p.walk, p.planes, p.carry, memory);
  const int64_t points = p.walk.rows.n * p.walk.columns.n;
  int64_t counted = 0;
  bool wrong = false;
  for (int64_t number = blockIdx.x; number < p.walk.tasks(); number += gridDim.x) {
    const cells::Task task = cells::Task::of(p.walk, number);
    const T* const image = similarity.data + task.image * similarity.stride_b;
    wrong = cells::any_wrong(p.classes, task, INT64_MAX) || wrong;
    int valid = 0;
    for (int64_t slot = 0; slot < p.planes; ++slot) valid += p.classes.at(task.image, slot) >= 0;
    const float share = 1.0f / static_cast<float>(valid > 0 ? valid : 1);
    cells::walk_pieces<kMode, n>(
        p, task, similarity, carry, share, static_cast<double>(share),
        [&](const Corners& corners, const Piece<n>& piece, bool counts, Passage passage, float* gradient) {
          int code[n][n];
          read_codes(p, task.image, piece, code);
          int here = 0;
#pragma unroll
          for (int i = 0; i < n; ++i) {
#pragma unroll
            for (int j = 0; j < n; ++j) here += code[i][j] >= 0;
          }
          counted += counts ? here : 0;
          float total = 0.0f;
          for (int64_t slot = 0; slot < p.planes; ++slot) {
            const int64_t target = p.classes.at(task.image, slot);
            Adjoint<n> adjoint;
            if (target >= 0) {
              const bool large = target >= kOther;
              if (large) find_large(p, task.image, piece, target, false, code);
              const int wanted = large ? kFound : static_cast<int>(target);
              const Square s = Square::read(image + slot * similarity.stride_k, corners);
              float loss = 0.0f, slope[n];
              cells::interpolate(s, piece, [&](int i, int j, float value) {
                const bool is_class = code[i][j] == wanted;
                const bool kept = code[i][j] >= 0;
                const float one = binary_cross_entropy(is_class, value, 0.0f, 1.0f, &slope[j]);
                loss += kept ? one : 0.0f;
                slope[j] = kept ? slope[j] : 0.0f;
                if (kMode == Mode::gradient && j == n - 1) adjoint.add(piece, i, slope);
              });
              if (large) find_large(p, task.image, piece, target, true, code);
              total += loss;
            }
            if (kMode == Mode::gradient) passage.pass(adjoint.sums, gradient + slot * points);
          }
          return total;
        });
  }
  if (wrong) p.state->wrong = 1;  // whoever writes, the same
  counted = warp_sum(counted);
  if (threadIdx.x == 0 && counted > 0) atomicAdd(&p.state->counted, static_cast<unsigned long long>(counted));
}

// similarity: [B,S,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// loss: scalar float32
// grad: [B,S,h,w] float32 of it, or [0]
std::tuple<Tensor, Tensor> cuda_forward(const Tensor& similarity, const Tensor& labels, const Tensor& classes,
                                        int64_t ignore_index, bool need_grad) {
  check_arguments(similarity, labels, classes, kHere);
  const Gpu gpu(kName, "similarity", similarity);
  check_same_device(kName, "labels", labels, similarity);
  check_same_device(kName, "classes", classes, similarity);
  check_class_values(kName, classes);
  const int64_t maps = similarity.size(1), height = labels.size(1), width = labels.size(2);
  const bool empty = labels.numel() == 0 || maps == 0;
  if (!empty) check_sides(kName, similarity, height, width);
  Tensor state = device_zeros(similarity, {cells::kStateWords}, ScalarType::Long);
  Tensor loss = device_empty(similarity, {}, ScalarType::Float);
  auto* const shared = static_cast<State*>(state.mutable_data_ptr());
  Tensor grad = empty ? gradient_like(similarity, need_grad) : device_gradient(similarity, need_grad);
  if (empty) {
    cells::launch_empty(gpu, classes_of(classes), INT64_MAX, shared, &loss, &grad);
    return {loss, grad};
  }
  WalkPlan plan = WalkPlan::of(gpu, similarity, Axis::of(similarity.size(2), height, false),
                               Axis::of(similarity.size(3), width, false), false,
                               need_grad ? Mode::gradient : Mode::loss);
  Kernel kernel{};
  kernel.walk = plan.walk;
  kernel.planes = maps;
  kernel.labels = read_labels(labels);
  kernel.ignore_index = ignore_index;
  kernel.classes = classes_of(classes);
  kernel.carry = plan.workspace();
  kernel.state = shared;
  kernel.partial = data_of<double>(plan.partial);
  kernel.grad = data_of<float>(grad);
  with_float(float_kind(similarity.scalar_type()), [&](auto type) {
    using T = decltype(type);
    plan.with_side([&](auto side) {
      constexpr int n = decltype(side)::value;
      gpu.launch(need_grad ? consistency_kernel<T, n, Mode::gradient> : consistency_kernel<T, n, Mode::loss>,
                 plan.blocks, kLanes, plan.shared, cells::maps_of<T>(similarity), kernel);
    });
  });
  cells::launch_finish(gpu, kernel.partial, plan.partial.numel(), shared, Divisor::counted, 1.0, need_grad,
                       data_of<float>(loss), data_of<float>(grad), grad.numel());
  return {loss, grad};
}

}  // namespace
}  // namespace cisc::map_consistency

CISC_DEFINE(cisc::map_consistency::kSchema)

CISC_REGISTER(m) { m.impl("map_consistency", TORCH_BOX(&cisc::map_consistency::cuda_forward)); }
