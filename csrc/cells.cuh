// A thread's piece of a cell of upsampled maps: at most kMost x kMost pixels between four corners. See
// cells.h.
#pragma once

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

// Fractions of the pixels of a piece along one axis.
struct Fractions {
  float at[kMost];

  // Of the pixels from `first` on, all of `cell`; those behind the last one are never used.
  __device__ __forceinline__ static Fractions of(const Axis& axis, int64_t first, int64_t cell) {
    Fractions f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) f.at[i] = axis.fraction(first + i, cell);
    return f;
  }
};

}  // namespace cisc::cells
