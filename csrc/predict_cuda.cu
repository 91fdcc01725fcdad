// predict on a GPU: a thread has a cell of low-resolution logits and goes through the classes once.
//
// Work: for a pixel and class, of 4 x 4 in a cell, 3 instructions interpolate and 3 keep the largest: at B =
// 16, K = 19, 721 x 721 that is 0.95 G of 132 x 128 a clock at 1.75 GHz, 32 us; the bytes are 13 us.

#include <algorithm>
#include <optional>
#include <tuple>

#include "cells.cuh"
#include "predict_arguments.h"
#include "tensors.h"

namespace cisc::predict {

namespace {

using cells::Axis;
using cells::Corners;
using cells::kPieceSide;
using cells::Maps;
using cells::Piece;
using cells::Square;

constexpr const char* kName = "predict";
constexpr int kThreads = 128, kBlocksPerSm = 16;
constexpr int kFillThreads = 256;
constexpr int64_t kMostCells = 4096;  // of a confusion matrix that a block counts in shared memory

struct Kernel {
  Axis rows, columns;
  int64_t planes, cells;
  bool has_labels;
  Labels labels;
  int64_t ignore_index;
  uint8_t* classes;               // [B,H,W]
  unsigned long long* confusion;  // [K,K], added to
  int* invalid;                   // set where a label is neither a class nor ignored
};

// Best class of each pixel of a piece: the lowest of equals. Where NaN may be among the values (`careful`),
// the first of these.
template <bool careful, typename T>
__device__ __forceinline__ void best_classes(const T* image, int64_t planes, int64_t stride_k,
                                             const Corners& at, const Piece<kPieceSide>& piece,
                                             bool* not_finite,
                                             // outputs
                                             int (&found)[kPieceSide][kPieceSide]) {
  float best[kPieceSide][kPieceSide];
#pragma unroll
  for (int i = 0; i < kPieceSide; ++i) {
#pragma unroll
    for (int j = 0; j < kPieceSide; ++j) {
      best[i][j] = -INFINITY;
      found[i][j] = 0;
    }
  }
  float touched = 0.0f;  // NaN once a corner is not finite
  for (int k = 0; k < planes; ++k) {
    const Square s = Square::read(image + k * stride_k, at);
    if (!careful) touched = fmaf(0.0f, (s.a + s.b) + (s.c + s.d), touched);
    cells::interpolate(s, piece, [&](int i, int j, float value) {
      bool better = value > best[i][j];
      if (careful) better = better || (isnan(value) && !isnan(best[i][j]));
      best[i][j] = better ? value : best[i][j];
      found[i][j] = better ? k : found[i][j];
    });
  }
  *not_finite = !(touched == 0.0f);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) predict_kernel(Maps<T> logits, Kernel p, bool shared_counts) {
  CISC_DYNAMIC_SHARED(memory);
  auto* counts = reinterpret_cast<unsigned*>(memory);
  const int64_t matrix = p.planes * p.planes;
  if (shared_counts) {
    for (int64_t i = threadIdx.x; i < matrix; i += kThreads) counts[i] = 0;
    __syncthreads();
  }
  const auto flush = [&](int32_t pair, uint32_t count) {
    if (shared_counts) {
      atomicAdd(&counts[pair], count);
    } else {
      atomicAdd(&p.confusion[pair], static_cast<unsigned long long>(count));
    }
  };
  cells::Run run;  // of pairs of classes
  for (int64_t cell = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; cell < p.cells;
       cell += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t line = cells::quotient(cell, p.columns.n), column = cell - line * p.columns.n;
    const int64_t image = cells::quotient(line, p.rows.n), row = line - image * p.rows.n;
    const T* from = logits.data + image * logits.stride_b;
    const Corners at = Corners::of(logits, p.rows, p.columns, row, column);
    const int top = static_cast<int>(p.rows.first(row)), bottom = static_cast<int>(p.rows.first(row + 1));
    const int left = static_cast<int>(p.columns.first(column)),
              right = static_cast<int>(p.columns.first(column + 1));
    for (int y = top; y < bottom; y += kPieceSide) {
      for (int x = left; x < right; x += kPieceSide) {
        const auto piece = Piece<kPieceSide>::of(p.rows, p.columns, static_cast<int>(row),
                                                 static_cast<int>(column), y, x, bottom, right);
        int found[kPieceSide][kPieceSide];
        bool not_finite = false;
        best_classes<false>(from, p.planes, logits.stride_k, at, piece, &not_finite, found);
        if (not_finite) best_classes<true>(from, p.planes, logits.stride_k, at, piece, &not_finite, found);
        uint8_t* to = p.classes + (image * p.rows.m + y) * p.columns.m + x;
#pragma unroll
        for (int i = 0; i < kPieceSide; ++i, to += p.columns.m) {
#pragma unroll
          for (int j = 0; j < kPieceSide; ++j) {
            if (piece.has(i, j)) to[j] = static_cast<uint8_t>(found[i][j]);
          }
        }
        if (!p.has_labels) continue;
        cells::for_labels(p.labels, image, piece, p.ignore_index, [&](int i, int j, bool counts, auto label) {
          if (!counts) return;
          if (label < static_cast<decltype(label)>(p.planes)) {
            run.add(static_cast<int32_t>(label) * static_cast<int32_t>(p.planes) + found[i][j], flush);
          } else {
            *p.invalid = 1;  // whoever writes, the same
          }
        });
      }
    }
  }
  if (!p.has_labels) return;
  run.add(-1, flush);
  if (!shared_counts) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < matrix; i += kThreads) {
    if (counts[i] != 0) atomicAdd(&p.confusion[i], static_cast<unsigned long long>(counts[i]));
  }
}

// A wrong label makes all classes 255 and counts nothing.
__global__ void __launch_bounds__(kFillThreads)
    spoil_kernel(const int* invalid, int64_t pixels, int64_t cells, uint8_t* classes,
                 unsigned long long* confusion) {
  if (*invalid == 0) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kFillThreads;
  for (int64_t i = first; i < pixels; i += stride) classes[i] = 255;
  for (int64_t i = first; i < cells; i += stride) confusion[i] = 0;
}

// logits: [B,K,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// outputs
// classes: [B,H,W] uint8
// confusion: [K,K] int64, rows = truth; [0] without labels
std::tuple<Tensor, Tensor> cuda_forward(const Tensor& logits, int64_t height, int64_t width,
                                        const std::optional<Tensor>& labels, int64_t ignore_index) {
  check_arguments(kName, logits, height, width, labels, kHere);
  const Gpu gpu(kName, "logits", logits);
  const int64_t batch = logits.size(0), planes = logits.size(1),
                matrix = labels.has_value() ? planes * planes : 0;
  if (labels.has_value()) {
    check_same_device(kName, "labels", *labels, logits);
    check_label_values(kName, *labels, planes, ignore_index);
  }
  Tensor classes = device_empty(logits, {batch, height, width}, ScalarType::Byte);
  Tensor confusion = labels.has_value() ? device_zeros(logits, {planes, planes}, ScalarType::Long)
                                        : device_empty(logits, {0}, ScalarType::Long);
  if (classes.numel() == 0) return {classes, confusion};
  Tensor invalid = device_zeros(logits, {1}, ScalarType::Int);
  const Kernel p{Axis::of(logits.size(2), height, true),
                 Axis::of(logits.size(3), width, true),
                 planes,
                 batch * logits.size(2) * logits.size(3),
                 labels.has_value(),
                 labels.has_value() ? read_labels(*labels) : Labels{},
                 ignore_index,
                 data_of<uint8_t>(classes),
                 labels.has_value() ? data_of<unsigned long long>(confusion) : nullptr,
                 data_of<int>(invalid)};
  const bool shared_counts = matrix > 0 && matrix <= kMostCells;
  const int64_t blocks = std::min(ceil_div(p.cells, kThreads), gpu.multiprocessors() * kBlocksPerSm);
  with_float(float_kind(logits.scalar_type()), [&](auto type) {
    using T = decltype(type);
    gpu.launch(predict_kernel<T>, blocks, kThreads, shared_counts ? 4 * matrix : 0, cells::maps_of<T>(logits),
               p, shared_counts);
  });
  if (labels.has_value()) {
    const int64_t filling = std::min(ceil_div(classes.numel(), kFillThreads), gpu.multiprocessors() * 2);
    gpu.launch(spoil_kernel, filling, kFillThreads, 0, static_cast<const int*>(p.invalid), classes.numel(),
               matrix, p.classes, p.confusion);
  }
  return {classes, confusion};
}

}  // namespace
}  // namespace cisc::predict

CISC_DEFINE(cisc::predict::kSchema)

CISC_REGISTER(m) { m.impl("predict", TORCH_BOX(&cisc::predict::cuda_forward)); }
