// map_consistency on a GPU: a thread has a cell of low-resolution similarities; loss and gradient in one
// pass.
//
// Work: at B = 16, S = 1, 721 x 721 there are 8.3 M pixels of some 70 instructions with the gradient (label,
// interpolation, logarithm, division, adjoint): 22 us of 132 x 128 a clock at 1.75 GHz; the bytes, mostly
// labels, are 12 MB, 3 us. How many pixels count is known only at the end: the gradient, of low resolution,
// is divided then.

#include <algorithm>
#include <tuple>

#include "adjoint.cuh"
#include "map_consistency_arguments.h"
#include "tensors.h"

namespace cisc {

// What pixel_loss.h asks for beside what device.cuh has.
__device__ __forceinline__ float log(float a) { return logf(a); }
__device__ __forceinline__ float quotient(float a, float b) { return fast_quotient(a, b); }

}  // namespace cisc

#include "pixel_loss.h"

namespace cisc::map_consistency {

namespace {

using cells::Adjoint;
using cells::Axis;
using cells::Carry;
using cells::CarryPlan;
using cells::Column;
using cells::Corners;
using cells::Divisor;
using cells::kLanes;
using cells::kMost;
using cells::Maps;
using cells::Passage;
using cells::Piece;
using cells::Square;
using cells::State;
using cells::Walk;

constexpr int64_t kWarps = 8;  // that keep a multiprocessor busy
constexpr int kSmall = 2;      // pixels of a piece along an axis where cells have no more
constexpr int kFound = INT32_MAX, kOther = kFound - 1;  // of labels from kOther on, and of those below 0

struct Kernel {
  Walk walk;
  int64_t maps;  // S
  Labels labels;
  int64_t ignore_index;
  Classes classes;
  float* carry;  // [blocks, of a warp], or null where it is in shared memory
  State* state;
  double* partial;  // [partials]
  float* grad;      // [B,S,h,w], not divided yet
};

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

template <typename T, int n, bool kGradient>
__global__ void __launch_bounds__(kLanes, kWarps) consistency_kernel(Maps<T> similarity, Kernel p) {
  CISC_DYNAMIC_SHARED(memory);
  const Walk& walk = p.walk;
  const int64_t floats = kLanes * p.maps * (walk.whole ? 1 : 2), points = walk.rows.n * walk.columns.n;
  const Carry carry = Carry::of(
      walk, p.maps, p.carry != nullptr ? p.carry + blockIdx.x * floats : reinterpret_cast<float*>(memory));
  int64_t counted = 0;
  bool wrong = false;
  for (int64_t number = blockIdx.x; number < walk.tasks(); number += gridDim.x) {
    const cells::Task task = cells::Task::of(walk, number);
    const T* const image = similarity.data + task.image * similarity.stride_b;
    const Column column = Column::of(walk, task, static_cast<int>(threadIdx.x));
    const int pieces_x = cells::pieces_of_warp<n>(column);
    if (task.tile == 0 && task.begin == 0)
      wrong = cells::any_wrong(p.classes, task.image, INT64_MAX) || wrong;
    int valid = 0;
    for (int64_t slot = 0; slot < p.maps; ++slot) valid += p.classes.at(task.image, slot) >= 0;
    const float share = 1.0f / static_cast<float>(valid > 0 ? valid : 1);
    double total = 0.0;
    bool before = false;
    for (int64_t at = task.begin > 0 ? task.begin - walk.shared : 0; at < task.end; ++at) {
      const int top = static_cast<int>(walk.rows.first(at)),
                bottom = static_cast<int>(walk.rows.first(at + 1));
      const int pieces_y = bottom - top > n ? (bottom - top + n - 1) / n : 1;
      const Corners corners =
          Corners::of_points(similarity, at, walk.rows.next(at), column.left, column.right);
      const bool counts = column.counts && at >= task.begin;
      Passage passage = Passage::of(walk, carry, column, at, at >= task.begin, share);
      float* gradient = nullptr;
      if (kGradient) {
        gradient = held(p.grad + ((task.image * p.maps * walk.rows.n + at) * walk.columns.n + column.cell));
      }
      float row_loss = 0.0f;
      for (int piece_y = 0; piece_y < pieces_y; ++piece_y) {
        for (int piece_x = 0; piece_x < pieces_x; ++piece_x) {
          const Piece<n> piece =
              cells::piece_of<n>(walk, column, at, top + piece_y * n, bottom, column.first + piece_x * n);
          int code[n][n];
          read_codes(p, task.image, piece, code);
          int here = 0;
#pragma unroll
          for (int i = 0; i < n; ++i) {
#pragma unroll
            for (int j = 0; j < n; ++j) here += code[i][j] >= 0;
          }
          counted += counts ? here : 0;
          passage.before = before;
          passage.first = piece_y == 0 && piece_x == 0;
          passage.last = piece_y + 1 == pieces_y && piece_x + 1 == pieces_x;
          Passage at_slot = passage;
          for (int64_t slot = 0; slot < p.maps; ++slot) {
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
                if (kGradient && j == n - 1) adjoint.add(piece, i, slope);
              });
              if (large) find_large(p, task.image, piece, target, true, code);
              row_loss += counts ? loss : 0.0f;
            }
            if (kGradient) at_slot.pass(adjoint.sums, gradient + slot * points);
          }
          before = true;
          total += static_cast<double>(row_loss);
          row_loss = 0.0f;
        }
      }
      if (at >= task.begin && task.ends(walk, at)) {
        total = warp_sum(total);
        if (threadIdx.x == 0) p.partial[task.partial(walk, at)] = total * static_cast<double>(share);
        total = 0.0;
      }
    }
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
  const int64_t batch = similarity.size(0), maps = similarity.size(1), height = labels.size(1),
                width = labels.size(2);
  const bool empty = labels.numel() == 0 || maps == 0;
  Tensor state = device_zeros(similarity, {cells::kStateWords}, ScalarType::Long);
  Tensor loss = device_empty(similarity, {}, ScalarType::Float);
  auto* const shared = static_cast<State*>(state.mutable_data_ptr());
  if (empty) {
    Tensor grad = gradient_like(similarity, need_grad);
    gpu.launch(cells::classes_kernel, std::min<int64_t>(batch, 1024), kLanes, 0, classes_of(classes), batch,
               INT64_MAX, shared);
    cells::launch_finish(gpu, nullptr, 0, shared, Divisor::given, 1.0, false, data_of<float>(loss),
                         data_of<float>(grad), grad.numel());
    return {loss, grad};
  }
  check_sides(kName, similarity, height, width);
  Tensor grad = need_grad ? device_empty(similarity, {batch, maps, similarity.size(2), similarity.size(3)},
                                         ScalarType::Float)
                          : device_empty(similarity, {0}, ScalarType::Float);
  const Axis rows = Axis::of(similarity.size(2), height, false),
             columns = Axis::of(similarity.size(3), width, false);
  const bool small = !cells::exceeds(rows, columns, kSmall);
  const Walk walk = cells::walk_of(rows, columns, false, batch, need_grad, small ? kSmall : kMost,
                                   gpu.multiprocessors(), kWarps);
  const CarryPlan plan = CarryPlan::of(gpu, walk, need_grad ? maps : 0);
  Tensor carry = device_empty(similarity, {plan.workspace}, ScalarType::Float);
  Tensor partial = device_empty(similarity, {walk.partials()}, ScalarType::Double);
  const Kernel kernel{walk,
                      maps,
                      read_labels(labels),
                      ignore_index,
                      classes_of(classes),
                      plan.workspace > 0 ? data_of<float>(carry) : nullptr,
                      shared,
                      data_of<double>(partial),
                      need_grad ? data_of<float>(grad) : nullptr};
  with_float(float_kind(similarity.scalar_type()), [&](auto type) {
    using T = decltype(type);
    const auto with = small ? consistency_kernel<T, kSmall, true> : consistency_kernel<T, kMost, true>;
    const auto without = small ? consistency_kernel<T, kSmall, false> : consistency_kernel<T, kMost, false>;
    gpu.launch(need_grad ? with : without, plan.blocks, kLanes, plan.shared, cells::maps_of<T>(similarity),
               kernel);
  });
  cells::launch_finish(gpu, kernel.partial, walk.partials(), shared, Divisor::counted, 1.0, need_grad,
                       data_of<float>(loss), data_of<float>(grad), grad.numel());
  return {loss, grad};
}

}  // namespace
}  // namespace cisc::map_consistency

CISC_DEFINE(cisc::map_consistency::kSchema)

CISC_REGISTER(m) { m.impl("map_consistency", TORCH_BOX(&cisc::map_consistency::cuda_forward)); }
