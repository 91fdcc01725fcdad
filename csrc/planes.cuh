// Tensors [B,C,h,w] as GPU kernels stream through them: 16 bytes at a time where they lie so, and sums over
// the threads of a warp.
//
// A plane may start anywhere: with 181 x 181 pixels each of four channels starts at another distance from a
// multiple of 16 bytes. A warp therefore takes every eighth channel, whose planes all start at the same
// distance, and reads aligned groups of pixels.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace cisc::planes {

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of one access

// A tensor [B,C,h,w] in place.
template <typename T>
struct Planes {
  T* data;
  int64_t stride_b, stride_c, stride_y, stride_x, width;
  bool flat;  // a pixel lies at its number times stride_x

  __device__ __forceinline__ int64_t offset_of(int64_t pixel) const {
    return flat ? pixel * stride_x : pixel / width * stride_y + pixel % width * stride_x;
  }
};

template <typename T, typename Data>
Planes<T> planes_of(const Tensor& tensor, Data* data) {
  const bool flat = tensor.size(2) == 1 || tensor.stride(2) == tensor.size(3) * tensor.stride(3);
  return {static_cast<T*>(data),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3),
          std::max<int64_t>(tensor.size(3), 1),
          flat};
}

// Elements between a multiple of n of them in memory and `at`.
template <int n, typename T>
__device__ __forceinline__ int past_aligned(const T* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) / sizeof(T) % n);
}

// Whether the pixels of a plane are neighbours.
template <typename T>
bool in_planes(const Planes<T>& p) {
  return p.flat && p.stride_x == 1;
}

// Whether the channels of a pixel are neighbours that 16-byte accesses reach.
template <typename T>
bool in_pixels(const Planes<T>& p, int64_t channels) {
  constexpr int64_t n = kWide<T>;
  return p.stride_c == 1 && channels % n == 0 && p.stride_b % n == 0 && p.stride_y % n == 0 &&
         p.stride_x % n == 0 && reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
}

// Sums of n values each over the `lanes` threads of a part of a warp, n <= lanes: a thread gets that of value
// number (its place in the part) / (lanes / n). In a fixed order.
template <int n, int lanes>
__device__ __forceinline__ float sums_over(float (&value)[n]) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  int distance = lanes / 2;
#pragma unroll
  for (int left = n / 2; left > 0; left /= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float sent = upper ? value[i] : value[i + left];
      value[i] = (upper ? value[i + left] : value[i]) + __shfl_xor_sync(kAll, sent, distance);
    }
    distance /= 2;
  }
#pragma unroll
  for (int rest = lanes / n / 2; rest > 0; rest /= 2) value[0] += __shfl_xor_sync(kAll, value[0], rest);
  return value[0];
}

}  // namespace cisc::planes
