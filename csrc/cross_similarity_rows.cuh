// Both sides of cross_similarity as rows of 16-bit numbers for tensor cores, in the order of their classes.
//
// Bytes: the features once, and the rows.
#pragma once

#include "cross_similarity_device.cuh"
#include "cross_similarity_tiles.h"

namespace cisc::cross_similarity {
namespace {

constexpr int kRowBits = 9;      // largest components are brought to [2^8,2^9)
constexpr float kUnit = 256.0f;  // of rounded and split rows, the length

// One side, packed. Workspace holds the images from `Side::first` on.
struct Rows {
  uint16_t* data;  // [images,pixels,width]
  float*
      scale;  // [images,pixels], and kScalePad more: times which a row is a unit vector; 1 where that is none
};

__device__ __forceinline__ uint16_t narrow_bits(Float kind, float value) {
  return kind == Float::bf16 ? BFloat16::narrow(value).bits : Float16::narrow(value).bits;
}

// A block has 64 positions of a side. Vectors that are not finite become NaN, those without length 0.
// kind: of the rows; finite: what is not becomes 0 and its scale NaN, and so do rows behind the last position
__global__ void __launch_bounds__(kThreads, 2)
    pack_kernel(Side side, Form form, Float kind, RowShape shape, bool finite, double eps,
                // outputs: lengths go to the side
                Rows rows) {
  CISC_SHARED(squares, double[kThreads]);
  CISC_SHARED(largest, float[kThreads]);
  CISC_SHARED(out, uint16_t[2][kTile * (kChunk16 + 8)]);
  const int64_t tiles = ceil_div(side.pixels, kTile);
  const int64_t b = side.first + blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  const int thread = static_cast<int>(threadIdx.x), at = thread % kTile, part = thread / kTile;
  const int64_t position = first + at, behind = side.count(b);
  const bool inside = position < behind;
  const int64_t pixel = inside ? side.pixel_at(b, position) : 0, offset = side.offset(b, pixel);
  double square = 0.0;
  float most = 0.0f;
  for (int64_t c = part; c < side.channels; c += kParts * kDepth) {
    float values[kDepth];
    read_channels(side.image, offset + c * side.image.stride_c, kParts, inside ? side.channels - c : 0,
                  values);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      square += static_cast<double>(values[i]) * static_cast<double>(values[i]);
      most = ::fmaxf(most, ::fabsf(values[i]));
    }
  }
  squares[thread] = square;
  largest[thread] = most;
  __syncthreads();
  square = 0.0;
  for (int i = 0; i < kParts; ++i) {
    square += squares[i * kTile + at];
    most = ::fmaxf(most, largest[i * kTile + at]);
  }
  const Length length = inverse_length(::sqrt(square), eps);
  const int64_t place = (b - side.first) * side.pixels;
  int exponent = 0;
  if (form == Form::exact && length.exists) {
    ::frexpf(most, &exponent);
    exponent = kRowBits - exponent;
  }
  if (inside && part == 0) {
    side.scale[place + pixel] = length.scale;
    side.rest[place + pixel] = length.rest;
    side.low[place + pixel] = length.low;
    const double exact = ::ldexp(1.0 / length.norm, -exponent);
    rows.scale[place + position] = finite && !length.finite ? kNan
                                   : !length.exists         ? 1.0f
                                   : form == Form::exact    ? static_cast<float>(exact)
                                                            : 1.0f / kUnit;
  }
  // Behind the last row of all, for its tile.
  if (blockIdx.x + 1 == gridDim.x) rows.scale[place + side.pixels + thread] = 1.0f;
  const bool spoilt = !length.finite && !finite;
  const auto rows_here = static_cast<int32_t>((finite ? side.pixels : behind) - first);
  const int64_t width = shape.width();
  for (int64_t c0 = 0; c0 < static_cast<int64_t>(shape.chunks) * kChunk16; c0 += kChunk16) {
    __syncthreads();
    float values[kDepth];
    read_channels(side.image, offset + (c0 + part) * side.image.stride_c, kParts,
                  inside ? side.channels - c0 - part : 0, values);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      uint16_t* to = &out[0][at * (kChunk16 + 8) + part + i * kParts];
      uint16_t* rest = &out[1][at * (kChunk16 + 8) + part + i * kParts];
      if (form == Form::exact) {
        const float value = length.exists ? times_power(values[i], exponent) : 0.0f;
        *to = narrow_bits(kind, spoilt ? kNan : value);
      } else {
        const float unit =
            length.exists ? kUnit * unit_of(values[i], length.scale, length.rest, length.low) : 0.0f;
        const float value = spoilt ? kNan : unit;
        const uint16_t bits = Float16::narrow(value).bits;
        *to = bits;
        if (form == Form::split) *rest = Float16::narrow(value - Float16{bits}.widen()).bits;
      }
    }
    __syncthreads();
    // A thread has 8 numbers of a row and of another one.
    for (int i = thread; i < kTile * kChunk16 / 8; i += kThreads) {
      const int row = i / (kChunk16 / 8), column = i % (kChunk16 / 8) * 8;
      if (row >= rows_here) continue;
      uint16_t* to = rows.data + (place + first + row) * width + c0 + column;
      write_pack(to, read_pack<8>(&out[0][row * (kChunk16 + 8) + column]));
      if (form == Form::split) {
        write_pack(to + static_cast<int64_t>(shape.chunks) * kChunk16,
                   read_pack<8>(&out[1][row * (kChunk16 + 8) + column]));
      }
    }
  }
}

}  // namespace
}  // namespace cisc::cross_similarity
