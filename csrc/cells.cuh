// A thread's piece of a cell of upsampled maps: at most kPixels x kPixels pixels between four corners. See
// cells.h.
#pragma once

#include <type_traits>

#include "cells.h"
#include "device.cuh"
#include "labels.h"

namespace cisc::cells {

// A tensor [B,K,h,w] as kernels read it.
template <typename T>
struct Maps {
  const T* data;
  int64_t stride_b, stride_k, stride_y, stride_x;
};

template <typename T>
Maps<T> maps_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2), tensor.stride(3)};
}

// Where the four corners of a cell lie in a plane.
struct Corners {
  int64_t upper_left, upper_right, lower_left, lower_right;

  template <typename T>
  __device__ __forceinline__ static Corners of(const Maps<T>& maps, const Axis& rows, const Axis& columns,
                                               int64_t row, int64_t column) {
    return of_points(maps, row, rows.next(row), column, columns.next(column));
  }

  // Of the points of two rows and two columns.
  template <typename T>
  __device__ __forceinline__ static Corners of_points(const Maps<T>& maps, int64_t above, int64_t beneath,
                                                      int64_t west, int64_t east) {
    const int64_t upper = above * maps.stride_y, lower = beneath * maps.stride_y;
    const int64_t left = west * maps.stride_x, right = east * maps.stride_x;
    return {upper + left, upper + right, lower + left, lower + right};
  }
};

// Values of the corners in one plane.
struct Square {
  float a, b, c, d;  // upper left and right, lower left and right

  template <typename T>
  __device__ __forceinline__ static Square read(const T* plane, const Corners& at) {
    return {plane[at.upper_left].widen(), plane[at.upper_right].widen(), plane[at.lower_left].widen(),
            plane[at.lower_right].widen()};
  }
};

// The corners of a cell in one plane after the other. Offset: int32_t where planes * step fits.
template <typename T, typename Offset>
struct Planes {
  const T *a, *b, *c, *d;
  Offset step, offset;

  __device__ __forceinline__ static Planes of(const T* plane, int64_t step, const Corners& at) {
    return {plane + at.upper_left,  plane + at.upper_right,    plane + at.lower_left,
            plane + at.lower_right, static_cast<Offset>(step), 0};
  }

  __device__ __forceinline__ Square read() const {
    return {a[offset].widen(), b[offset].widen(), c[offset].widen(), d[offset].widen()};
  }

  // Go on to the next plane, or stay at the last one: what is read ahead there is not used.
  __device__ __forceinline__ void next(bool more) { offset = opaque(offset + (more ? step : 0)); }
};

// low * (1 - fraction) + high * fraction, with both products: 0 * inf is NaN.
__device__ __forceinline__ float blend(float low, float high, float fraction) {
  return fmaf(high, fraction, low * (1.0f - fraction));
}

// a / b of numbers that are not negative, in 32 bits where both fit.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  const bool fits = ((a | b) >> 32) == 0;
  return fits ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// Pixels of a piece, and where they lie in their cell; 0 for those that are not of the cell.
template <int kPixels>
struct Piece {
  int y, x, rows, columns;  // first pixel; how many are of the cell, 0 or less for none
  float fy[kPixels], fx[kPixels];

  // From (y, x) to below (bottom, right), where the pixels of a cell end.
  __device__ __forceinline__ static Piece of(const Axis& down, const Axis& along, int row, int column, int y,
                                             int x, int bottom, int right) {
    Piece p{y, x, bottom - y, right - x, {}, {}};
    fractions(down, y, row, p.rows, p.fy);
    fractions(along, x, column, p.columns, p.fx);
    return p;
  }

  // Of `count` pixels of a cell as of Axis::fraction, which is 1 in cell -1, and 0 behind them.
  __device__ __forceinline__ static void fractions(const Axis& axis, int first, int cell, int count,
                                                   // outputs
                                                   float (&to)[kPixels]) {
    // Where pixels lie in their cell is below 2^31, whatever the positions that it is the difference of.
    const auto low = [](int64_t value) { return static_cast<uint32_t>(value); };
    const uint32_t step = low(axis.step);
    uint32_t at = low(first) * step + low(axis.shift) - low(cell) * low(axis.whole);
    const float whole = static_cast<float>(low(axis.whole)), by = 1.0f / whole;
    const bool last = cell >= axis.n - 1;
#pragma unroll
    for (int i = 0; i < kPixels; ++i, at += step) {
      const int from = static_cast<int>(at);
      const float part = static_cast<float>(from > 0 ? from : 0);
      // Rounded once more, as a division is.
      const float quotient = part * by, fraction = fmaf(fmaf(-quotient, whole, part), by, quotient);
      const float known = last ? 0.0f : fraction;
      to[i] = i < count ? (cell < 0 ? 1.0f : known) : 0.0f;
    }
  }

  __device__ __forceinline__ bool has(int i, int j) const { return i < rows && j < columns; }
};

// f(i, j, value) for the pixels of a piece between these corners.
template <int kPixels, typename Function>
__device__ __forceinline__ void interpolate(const Square& s, const Piece<kPixels>& piece, const Function& f) {
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const float west = blend(s.a, s.c, piece.fy[i]), east = blend(s.b, s.d, piece.fy[i]);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) f(i, j, blend(west, east, piece.fx[j]));
  }
}

template <int kPixels, typename L, typename Function>
__device__ __forceinline__ void typed_labels(const L* row, const Labels& labels, const Piece<kPixels>& piece,
                                             int64_t ignore_index, const Function& f) {
  const L ignored = static_cast<L>(ignore_index);
  const bool any = static_cast<int64_t>(ignored) == ignore_index;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const bool inside = piece.has(i, j);
      const L label = inside ? row[j * labels.stride_x] : L{0};
      // As the narrowest unsigned number, in which no negative label is small.
      using Word = std::conditional_t<sizeof(L) == 8, uint64_t, uint32_t>;
      f(i, j, inside && !(any && label == ignored), static_cast<Word>(label));
    }
    row += labels.stride_y;
  }
}

// f(i, j, counts, label) for the pixels of a piece; one counts unless it is outside or ignored.
template <int kPixels, typename Function>
__device__ __forceinline__ void for_labels(const Labels& labels, int64_t image, const Piece<kPixels>& piece,
                                           int64_t ignore_index, const Function& f) {
  const int64_t corner = image * labels.stride_b + piece.y * labels.stride_y + piece.x * labels.stride_x;
  switch (labels.kind) {
    case Integer::u8:
      return typed_labels(static_cast<const uint8_t*>(labels.data) + corner, labels, piece, ignore_index, f);
    case Integer::i32:
      return typed_labels(static_cast<const int32_t*>(labels.data) + corner, labels, piece, ignore_index, f);
    default:
      return typed_labels(static_cast<const int64_t*>(labels.data) + corner, labels, piece, ignore_index, f);
  }
}

// Counts of equal numbers that follow each other.
struct Run {
  int32_t number = -1;
  uint32_t count = 0;

  // flush(number, count) of those before a new number; what is below 0 is not counted.
  template <typename Flush>
  __device__ __forceinline__ void add(int32_t next, const Flush& flush) {
    if (next != number) {
      if (number >= 0) flush(number, count);
      number = next;
      count = 0;
    }
    ++count;
  }
};

}  // namespace cisc::cells
