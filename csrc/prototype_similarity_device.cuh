// What both directions of prototype_similarity share on a GPU: unit vectors of the prototypes, accesses at
// the edges of planes.
#pragma once

#include <algorithm>

#include "planes.cuh"
#include "prototype_similarity_arguments.h"
#include "tensors.h"

namespace cisc::prototype_similarity {

namespace {

using planes::Group;
using planes::kWide;
using planes::Planes;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Bytes of workspace. Few in the simulator: so its batches take several launches.
#ifdef CISC_SIMT
constexpr int64_t kUnitBytes = 4 << 10;
#else
constexpr int64_t kUnitBytes = 16 << 20;
#endif
constexpr int64_t kNarrow = 1 << 30;  // pixels and channels that 32 bits count

// 1 / norm; 0 where the norm is below eps; NaN stays NaN
__device__ __forceinline__ float inverse_norm(float square, float eps) {
  const float norm = __fsqrt_rn(square);
  return norm < eps ? 0.0f : __fdiv_rn(1.0f, norm);
}

// Prototypes [B,S,C] of some images in place.
template <typename T>
struct Vectors {
  T* data;
  int64_t stride_b, stride_s, stride_c;
};

// The same as unit vectors, 0 where they are shorter than eps.
struct Units {
  float* data;
  int64_t stride_b, stride_s, stride_c;
  float* inverse;  // [images,S], 1 / norm

  __device__ __forceinline__ const float* of(int64_t image) const { return data + image * stride_b; }
};

// A warp has one prototype, of `places` for each image; behind the prototypes come zeros, which are read too.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    units_kernel(Vectors<const T> prototypes, int64_t rows, int64_t slots, int64_t places, int64_t channels,
                 float eps, Units units) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp,
                lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const int64_t image = row / places, slot = row % places;
  float* to = units.data + image * units.stride_b + slot * units.stride_s;
  if (slot >= slots) {
    for (int64_t c = lane; c < channels; c += kWarp) to[c * units.stride_c] = 0.0f;
    return;
  }
  const T* from = prototypes.data + image * prototypes.stride_b + slot * prototypes.stride_s;
  float square = 0.0f;
#pragma unroll 4
  for (int64_t c = lane; c < channels; c += kWarp) {
    const float value = from[c * prototypes.stride_c].widen();
    square = fmaf(value, value, square);
  }
  const float inverse = inverse_norm(warp_sum(square), eps);
  if (lane == 0) units.inverse[image * slots + slot] = inverse;
#pragma unroll 4
  for (int64_t c = lane; c < channels; c += kWarp) {
    to[c * units.stride_c] = from[c * prototypes.stride_c].widen() * inverse;
  }
}

struct Problem {
  int64_t channels, slots, pixels;
  int64_t tiles, tile;  // of an image, and pixels of one
  float eps;
  Units units;
};

// n values of a plane from `pixel` on, 0 outside of it. plane: its first pixel
template <int n, typename T>
__device__ __forceinline__ Group<T, n> read_edge(const T* plane, int64_t pixel, int64_t pixels) {
  float value[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = pixel + i >= 0 && pixel + i < pixels ? plane[pixel + i].widen() : 0.0f;
  }
  return Group<T, n>::of(value);
}

template <int n>
__device__ __forceinline__ void write_floats(float* to, const float (&value)[n]) {
  if constexpr (n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      write_pack<4>(to + i, Pack<float, 4>{{value[i], value[i + 1], value[i + 2], value[i + 3]}});
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = value[i];
  }
}

// Read n floats that lie side by side, aligned to 16 bytes.
template <int n>
__device__ __forceinline__ void read_floats(const float* from, float (&value)[n]) {
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    const auto four = read_pack<4>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) value[i + k] = four.at[k];
  }
}

// Unit vectors of the prototypes of some images.
class UnitVectors {
 public:
  // transposed: [images,C,S or more], else [images,S,C]
  UnitVectors(const Tensor& prototypes, int64_t images, bool transposed) : prototypes_(prototypes) {
    const int64_t slots = prototypes.size(1), channels = prototypes.size(2);
    places_ = transposed && slots > 1 ? ceil_div(slots, 4) * 4 : slots;
    memory_ = device_empty(prototypes, {images * places_ * channels}, ScalarType::Float);
    inverse_ = device_empty(prototypes, {images * slots}, ScalarType::Float);
    units = {data_of<float>(memory_), places_ * channels, transposed ? 1 : channels, transposed ? places_ : 1,
             data_of<float>(inverse_)};
  }

  void make(const Gpu& gpu, int64_t first, int64_t images, float eps) {
    const int64_t slots = prototypes_.size(1), channels = prototypes_.size(2);
    with_float(float_kind(prototypes_.scalar_type()), [&](auto type) {
      using T = decltype(type);
      const Vectors<const T> vectors{
          static_cast<const T*>(prototypes_.const_data_ptr()) + first * prototypes_.stride(0),
          prototypes_.stride(0), prototypes_.stride(1), prototypes_.stride(2)};
      gpu.launch(units_kernel<T>, ceil_div(images * places_, kWarps), kThreads, 0, vectors, images * places_,
                 slots, places_, channels, eps, units);
    });
  }

  Units units;

 private:
  const Tensor& prototypes_;
  int64_t places_ = 0;  // slots of an image in memory
  Tensor memory_, inverse_;
};

// Whether planes of n elements at a time all start at a multiple of them.
template <int n, typename T>
bool starts_aligned(const Planes<T>& p) {
  return p.stride_b % n == 0 && p.stride_c % n == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % (n * sizeof(T)) == 0;
}

}  // namespace
}  // namespace cisc::prototype_similarity
