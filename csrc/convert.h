// Rows of float32, bfloat16 or float16, read as and written from float32. Needs no torch header; part of the
// kernels, see simd.h.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace cisc {

enum class Float : int32_t { f32, bf16, f16 };  // what a tensor of features or logits holds

// A tensor [B,C,h,w] read or written in place.
template <typename Pointer>
struct Image {
  Float kind;
  Pointer data;
  int64_t stride_b, stride_c, stride_y, stride_x;
};

namespace {

inline float bits_to_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct F32 {
  float value;
  static constexpr Float kind = Float::f32;
  float widen() const { return value; }
  static F32 narrow(float v) { return {v}; }
};

struct BF16 {
  uint16_t bits;
  static constexpr Float kind = Float::bf16;
  float widen() const { return bits_to_float(static_cast<uint32_t>(bits) << 16); }
  // To nearest, ties to even; NaN stays NaN.
  static BF16 narrow(float v) {
    const uint32_t b = float_to_bits(v);
    const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(v == v ? rounded : (b >> 16) | 0x40)};
  }
};

struct F16 {
  uint16_t bits;
  static constexpr Float kind = Float::f16;
#if defined(__F16C__)
  float widen() const { return _cvtsh_ss(bits); }
  static F16 narrow(float v) { return {_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT)}; }
#else
  float widen() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
    const float tiny = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -tiny : tiny;
  }
  static F16 narrow(float v) {
    const uint32_t b = float_to_bits(v), sign = (b >> 16) & 0x8000;
    const float size = bits_to_float(b & 0x7fffffff);
    if (size != size) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < 6.103515625e-5f) {  // below the normal range: whole multiples of 2^-24, rounded by the sum
      const uint32_t rest = float_to_bits(size + 0.5f) - float_to_bits(0.5f);
      return {static_cast<uint16_t>(sign | rest)};
    }
    const uint32_t s = float_to_bits(size), rounded = (s + 0xfff + ((s >> 13) & 1)) >> 13;
    return {static_cast<uint16_t>(sign | (rounded - (112u << 10)))};
  }
#endif
};

// f(at, offset, run) for the pixels [first, first + n) of a grid of `width` columns, row by row, or at once
// where rows follow each other: `at` counts from `first`, `offset` is by strides from the grid's corner.
template <typename Function>
inline void each_run(int64_t width, int64_t stride_y, int64_t stride_x, int64_t first, int64_t n,
                     Function&& f) {
  if (stride_y == width * stride_x) return f(int64_t{0}, first * stride_x, n);
  for (int64_t i = 0; i < n;) {
    const int64_t y = (first + i) / width, x = (first + i) % width;
    const int64_t run = width - x < n - i ? width - x : n - i;
    f(i, y * stride_y + x * stride_x, run);
    i += run;
  }
}

// to[i] = from[i * stride], i < n
template <typename T>
inline void read_row(const T* from, int64_t stride, int64_t n, float* to) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride].widen();
    return;
  }
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (T::kind == Float::f16) {
    for (; i + 16 <= n; i += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      store(to + i, static_cast<F>(_mm512_maskz_cvtph_ps(0xffff, half)));
    }
  }
#elif defined(__AVX2__)
  if constexpr (T::kind == Float::f16) {
    for (; i + 8 <= n; i += 8) {
      store(to + i,
            static_cast<F>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)))));
    }
  }
#endif
  for (; i < n; ++i) to[i] = from[i].widen();
}

inline void read_row(Float kind, const void* from, int64_t offset, int64_t stride, int64_t n, float* to) {
  switch (kind) {
    case Float::f32:
      return read_row(static_cast<const F32*>(from) + offset, stride, n, to);
    case Float::bf16:
      return read_row(static_cast<const BF16*>(from) + offset, stride, n, to);
    case Float::f16:
      return read_row(static_cast<const F16*>(from) + offset, stride, n, to);
  }
}

// to[i] = from[i], i < n
template <typename T>
inline void write_row(const float* from, int64_t n, T* to) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (T::kind == Float::bf16) {
    for (; i + 16 <= n; i += 16) {
      const F wide = load(from + i);
      // The instruction takes numbers below the normal range for 0.
      const M tiny = less(max(wide, -wide), broadcast(1.17549435e-38f));
      if (any(both(tiny, negate(same((I)wide << 1, I{}))))) {
        for (int64_t j = i; j < i + 16; ++j) to[j] = T::narrow(from[j]);
        continue;
      }
      const __m256bh narrow = _mm512_cvtneps_pbh(static_cast<__m512>(wide));
      std::memcpy(to + i, &narrow, sizeof narrow);
    }
  }
#endif
#if defined(__AVX512F__)
  if constexpr (T::kind == Float::f16) {
    for (; i + 16 <= n; i += 16) {
      const __m256i narrow =
          _mm512_maskz_cvtps_ph(0xffff, static_cast<__m512>(load(from + i)), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), narrow);
    }
  }
#elif defined(__AVX2__)
  if constexpr (T::kind == Float::f16) {
    for (; i + 8 <= n; i += 8) {
      const __m128i narrow = _mm256_cvtps_ph(static_cast<__m256>(load(from + i)), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), narrow);
    }
  }
#endif
  for (; i < n; ++i) to[i] = T::narrow(from[i]);
}

// to[i * stride] = from[i], i < n
template <typename T>
inline void write_row(const float* from, int64_t stride, int64_t n, T* to) {
  if (stride == 1) return write_row(from, n, to);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = T::narrow(from[i]);
}

inline void write_row(Float kind, const float* from, int64_t stride, int64_t n, void* to, int64_t offset) {
  switch (kind) {
    case Float::f32:
      return write_row(from, stride, n, static_cast<F32*>(to) + offset);
    case Float::bf16:
      return write_row(from, stride, n, static_cast<BF16*>(to) + offset);
    case Float::f16:
      return write_row(from, stride, n, static_cast<F16*>(to) + offset);
  }
}

}  // namespace
}  // namespace cisc
