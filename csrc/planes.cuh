// Tensors [B,C,h,w] as GPU kernels stream through them: 16 bytes at a time where they lie so, and sums over
// the threads of a warp.
//
// A plane may start anywhere: with 181 x 181 pixels each of four channels starts at another distance from a
// multiple of 16 bytes. A warp therefore takes every eighth channel, whose planes all start at the same
// distance, and reads aligned groups of pixels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device.cuh"

namespace cisc::planes {

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of one access

// n neighbours in the words in which they come and go: 16-bit elements take half a register each, and an
// access is one instruction.
template <typename T, int n>
struct alignas(sizeof(T) * n) Group {
  using Word = std::conditional_t<sizeof(T) * n % 4 == 0, uint32_t, uint16_t>;
  Word word[sizeof(T) * n / sizeof(Word)];

  __device__ __forceinline__ static Group read(const T* from) {
    return *reinterpret_cast<const Group*>(from);
  }

  __device__ __forceinline__ static Group of(const float (&value)[n]) {
    Group group;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const T narrow = T::narrow(value[i]);
      if constexpr (sizeof(T) == 4) {
        group.word[i] = __float_as_uint(narrow.value);
      } else if constexpr (n == 1) {
        group.word[0] = narrow.bits;
      } else {
        const uint32_t half = static_cast<uint32_t>(narrow.bits) << i % 2 * 16;
        group.word[i / 2] = i % 2 == 0 ? half : group.word[i / 2] | half;
      }
    }
    return group;
  }

  // To global memory. The compiler takes a struct's copy apart where the values come from several branches.
  __device__ __forceinline__ void write(T* to) const {
#ifndef CISC_SIMT
    if constexpr (sizeof(T) * n == 16) {
      const size_t at = __cvta_generic_to_global(to);
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]),
                   "r"(word[2]), "r"(word[3])
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Group*>(to) = *this;
  }

  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else {
      return T{static_cast<uint16_t>(n > 1 ? word[i / 2] >> i % 2 * 16 : word[0])}.widen();
    }
  }
};

// A tensor [B,C,h,w] in place.
template <typename T>
struct Planes {
  T* data;
  int64_t stride_b, stride_c, stride_y, stride_x, width;
  bool flat;  // a pixel lies at its number times stride_x

  // I: counts the pixels; 32 bits are much faster where rows have gaps.
  template <typename I>
  __device__ __forceinline__ int64_t offset_of(I pixel) const {
    if (flat) return pixel * stride_x;
    const I row = static_cast<I>(width), y = pixel / row;
    return y * stride_y + (pixel - y * row) * stride_x;
  }
};

// One pixel after another.
template <typename T>
struct Walk {
  T* at;
  int64_t column;

  __device__ __forceinline__ Walk(const Planes<T>& planes, T* plane, int64_t pixel)
      : at(plane + planes.offset_of(pixel)), column(planes.flat ? 0 : pixel % planes.width) {}

  __device__ __forceinline__ void next(const Planes<T>& planes) {
    at += planes.stride_x;
    if (planes.flat || ++column < planes.width) return;
    column = 0;
    at += planes.stride_y - planes.width * planes.stride_x;
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
template <int n, int lanes, int distance = lanes / 2>
__device__ __forceinline__ float sums_over(const float (&value)[n]) {
  if constexpr (n == 1) {
    float sum = value[0];
#pragma unroll
    for (int rest = distance; rest > 0; rest /= 2) sum += __shfl_xor_sync(kAll, sum, rest);
    return sum;
  } else {
    const bool upper = (threadIdx.x & distance) != 0;
    float half[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float sent = upper ? value[i] : value[i + n / 2];
      half[i] = (upper ? value[i + n / 2] : value[i]) + __shfl_xor_sync(kAll, sent, distance);
    }
    return sums_over<n / 2, lanes, distance / 2>(half);
  }
}

}  // namespace cisc::planes
