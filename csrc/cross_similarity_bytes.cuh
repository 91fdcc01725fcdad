// Packed rows of both sides of cross_similarity once more, as int8: what a sweep that screens multiplies.
//
// Bytes: the packed rows twice, the second time mostly from a cache, and half as many written.
#pragma once

#include "cross_similarity_bounds.h"
#include "cross_similarity_rows.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kQuantiseThreads = 256;
constexpr int kAtOnce = 8;  // numbers of a row that a thread has

// One side as int8.
struct Bytes {
  int8_t* data;   // [images,pixels,width]
  Step* steps;    // [images,pixels], and kScalePad more
  int64_t width;  // chunks of 128
};

// Numbers of a row from `at` on, that lie in its chunks; with what was rounded away, where that is there.
__device__ __forceinline__ void read_numbers(const uint16_t* row, int64_t at, const RowShape& shape,
                                             Float kind,
                                             // outputs
                                             float (&values)[kAtOnce]) {
  const int64_t behind = static_cast<int64_t>(shape.chunks) * kChunk16;
  Pack<uint16_t, kAtOnce> numbers{}, rests{};
  if (at < behind) numbers = read_pack<kAtOnce>(row + at);
  if (at < behind && shape.split) rests = read_pack<kAtOnce>(row + behind + at);
  const auto widen = [&](uint16_t bits) {
    return kind == Float::bf16 ? BFloat16{bits}.widen() : Float16{bits}.widen();
  };
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) values[i] = widen(numbers.at[i]) + widen(rests.at[i]);
}

// A warp has a row.
__global__ void __launch_bounds__(kQuantiseThreads)
    quantise_kernel(Side side, int64_t images, Form form, Float kind, RowShape shape, Rows rows,
                    // outputs
                    Bytes bytes) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kQuantiseThreads + threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (row >= images * side.pixels) return;
  // Behind the last row of all, for its tile.
  if (row + 1 == images * side.pixels) {
    for (int64_t i = lane; i < kScalePad; i += kWarp) bytes.steps[row + 1 + i] = {1.0f, 0.0f};
  }
  const int64_t image = row / side.pixels;
  if (row - image * side.pixels >= side.count(side.first + image)) return;
  const uint16_t* from = rows.data + row * shape.width();
  float values[kAtOnce], most = 0.0f;
  for (int64_t c = lane * kAtOnce; c < bytes.width; c += kWarp * kAtOnce) {
    read_numbers(from, c, shape, kind, values);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) most = ::fmaxf(most, ::fabsf(values[i]));
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    most = ::fmaxf(most, __shfl_xor_sync(kAll, most, distance));
  }
  // Of a vector that is not finite, each number is NaN.
  read_numbers(from, 0, shape, kind, values);
  const bool finite = !isnan(values[0]);
  const auto quantiser = Quantiser::of(finite ? most : 0.0f);
  double rests = 0.0;
  for (int64_t c = lane * kAtOnce; c < bytes.width; c += kWarp * kAtOnce) {
    read_numbers(from, c, shape, kind, values);
    Pack<int8_t, kAtOnce> numbers;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      numbers.at[i] = quantiser.at(values[i]);
      const auto rest = static_cast<double>(quantiser.rest(values[i], numbers.at[i]));
      rests += rest * rest;
    }
    write_pack(bytes.data + row * bytes.width + c, numbers);
  }
  rests = warp_sum(rests);
  if (lane == 0) {
    bytes.steps[row] = quantiser.of_unit(finite, rests, rows.scale[row], form == Form::rounded);
  }
}

}  // namespace
}  // namespace cisc::cross_similarity
