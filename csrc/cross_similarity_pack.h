// How cross_similarity reads its images, for the instruction set that includes it: lengths of vectors, tiles
// and panels of them; see simd.h.
#pragma once

#include "convert.h"
#include "cross_similarity.h"
#include "simd.h"

namespace cisc::cross_similarity {
namespace {

constexpr int kTile = 2 * kLanes;
constexpr int kPanel = kLanes == 16 ? 12 : 6;
#if defined(__AVX512F__)
constexpr Isa kIsa = Isa::avx512;
#elif defined(__AVX2__)
constexpr Isa kIsa = Isa::avx2;
#else
constexpr Isa kIsa = Isa::portable;
#endif
static_assert(shape_of(kIsa).tile == kTile && shape_of(kIsa).panel == kPanel, "what the launcher assumes");

constexpr double kLeast = 1.17549435e-38;  // length of a vector that is not 0

// Half a vector of float32 as float64.
typedef float Half __attribute__((vector_size(2 * kLanes)));
typedef double D __attribute__((vector_size(4 * kLanes)));

inline D widen(const float* from) {
  Half half;
  std::memcpy(&half, from, sizeof half);
  return __builtin_convertvector(half, D);
}

template <typename Function>
inline void with_kind(Float kind, const void* data, Function&& f) {
  switch (kind) {
    case Float::f32:
      return f(static_cast<const F32*>(data));
    case Float::bf16:
      return f(static_cast<const BF16*>(data));
    case Float::f16:
      return f(static_cast<const F16*>(data));
  }
}

inline void measure(const Pixels& p, double eps, int64_t first, int64_t n) {
  constexpr int64_t kHalf = kLanes / 2;
  alignas(64) double squares[kMeasured];
  alignas(64) float row[kMeasured] = {};
  for (double& square : squares) square = 0.0;
  const auto& image = p.image;
  with_kind(image.kind, image.data, [&](auto data) {
    for (int64_t c = 0; c < p.channels; ++c) {
      each_run(p.width, image.stride_y, image.stride_x, first, n, [&](int64_t at, int64_t from, int64_t run) {
        read_row(data + c * image.stride_c + from, image.stride_x, run, row + at);
      });
      for (int64_t i = 0; i < n; i += kHalf) {
        D sum;
        std::memcpy(&sum, squares + i, sizeof sum);
        const D value = widen(row + i);
        sum += value * value;
        std::memcpy(squares + i, &sum, sizeof sum);
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    const double norm = __builtin_sqrt(squares[i]);
    const bool finite = norm - norm == 0.0;
    float &scale = p.lengths.scale[first + i], &rest = p.lengths.rest[first + i];
    float& low = p.lengths.low[first + i];
    scale = low = 0.0f;
    rest = finite ? 0.0f : __builtin_nanf("");
    if (!finite || norm < eps || norm < kLeast) continue;
    int64_t bits;
    std::memcpy(&bits, &norm, sizeof bits);
    int64_t exponent = 1023 - (bits >> 52);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    scale = bits_to_float(static_cast<uint32_t>(exponent + 127) << 23);
    const double wanted = 1.0 / (norm * static_cast<double>(scale));
    rest = static_cast<float>(wanted);
    low = static_cast<float>(wanted - static_cast<double>(rest));
  }
}

// Pixels that follow each other in memory: n of them from lane `at` on, `offset` by strides from the corner.
struct Stretch {
  int64_t at, n, offset;
};

// Cut positions into stretches, at most one for each; their number.
inline int64_t stretches(const Positions& positions, int64_t width, int64_t stride_y, int64_t stride_x,
                         Stretch* to) {
  const bool linear = stride_y == width * stride_x;
  int64_t count = 0;
  for (int64_t i = 0; i < positions.n;) {
    const int64_t pixel = positions[i], x = pixel % width;
    const int64_t room = linear ? positions.n : width - x;
    int64_t n = 1;
    while (n < room && i + n < positions.n && positions[i + n] == pixel + n) ++n;
    to[count++] = {i, n, pixel / width * stride_y + x * stride_x};
    i += n;
  }
  return count;
}

// Vectors that hold kWidth floats.
template <int kWidth>
constexpr int kVectors = (kWidth + kLanes - 1) / kLanes;

// An array's values at the positions, 0 behind them.
template <int kWidth>
struct Taken {
  alignas(64) float of[kVectors<kWidth> * kLanes] = {};

  Taken(const float* from, const Positions& positions) {
    for (int64_t i = 0; i < positions.n; ++i) of[i] = from[positions[i]];
  }

  F operator()(int v) const { return load(of + v * kLanes); }
};

// The pixels' channels one after another, scaled: f(c, row) with [kWidth] floats, 0 for what is not finite
// and behind the last pixel.
template <int kWidth, typename Function>
inline void each_channel(const Pixels& p, const Positions& positions, Function&& f) {
  constexpr int kVector = kVectors<kWidth>;
  const auto& image = p.image;
  Stretch parts[kWidth];
  const int64_t count = stretches(positions, p.width, image.stride_y, image.stride_x, parts);
  alignas(64) float row[kVector * kLanes] = {};
  const Taken<kWidth> scale(p.lengths.scale, positions);
  with_kind(image.kind, image.data, [&](auto data) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        read_row(data + c * image.stride_c + parts[i].offset, image.stride_x, parts[i].n, row + parts[i].at);
      }
      F out[kVector];
      for (int v = 0; v < kVector; ++v) {
        out[v] = select(same(scale(v), F{}), F{}, load(row + v * kLanes) * scale(v));
      }
      f(c, out);
    }
  });
}

template <int kWidth>
inline void store_row(const F* value, float* to) {
  alignas(64) float row[kVectors<kWidth> * kLanes];
  for (int v = 0; v < kVectors<kWidth>; ++v) store(row + v * kLanes, value[v]);
  std::memcpy(to, row, kWidth * sizeof(float));
}

template <int kWidth>
inline void pack(const Pixels& p, const Positions& positions, bool pairs, float* to, float* rest) {
  constexpr int kVector = kVectors<kWidth>;
  const Taken<kWidth> wanted(p.lengths.rest, positions), low(p.lengths.low, positions);
  for (int i = 0; i < kWidth; ++i) {
    const float value = wanted.of[i];
    rest[i] = !(value > 0.0f) ? 0.0f : pairs ? value : 1.0f;
  }
  if (p.channels == 0) std::memset(to, 0, kWidth * sizeof(float));
  if (!pairs) {
    each_channel<kWidth>(p, positions, [&](int64_t c, const F* row) {
      F out[kVector];
      for (int v = 0; v < kVector; ++v) {
        const F unit = fma(row[v], wanted(v), row[v] * low(v));
        out[v] = select(same(row[v], F{}), F{}, unit);
      }
      store_row<kWidth>(out, to + c * kWidth);
    });
    return;
  }
  // Scaled by a power of two, bfloat16 is bfloat16 still, but for numbers too small to count.
  U even[kVector] = {};
  each_channel<kWidth>(p, positions, [&](int64_t c, const F* row) {
    F out[kVector];
    for (int v = 0; v < kVector; ++v) {
      if (c % 2 == 0) even[v] = (U)row[v] >> 16;
      out[v] = (F)(c % 2 == 0 ? even[v] : even[v] | ((U)row[v] & 0xffff0000u));
    }
    store_row<kWidth>(out, to + c / 2 * kWidth);
  });
}

inline void pack_tile(const Pixels& p, const Positions& positions, bool pairs, float* to, float* rest) {
  pack<kTile>(p, positions, pairs, to, rest);
}

inline void pack_panel(const Pixels& p, const Positions& positions, bool pairs, float* to, float* rest) {
  pack<kPanel>(p, positions, pairs, to, rest);
}

}  // namespace
}  // namespace cisc::cross_similarity
