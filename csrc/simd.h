// Vectors of float32 of the instruction set that this file is compiled for. Needs no torch header.
//
// Everything here, and in every *_kernel.h, lies in an unnamed namespace: a function compiled for AVX-512
// must never be the one that the linker keeps for a machine without. For the same reason kernels call nothing
// from the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace cisc {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes =
    4;  // what every compiler of this family turns into the machine's own vectors, or scalars
#endif

// Arithmetic operators work on both, lane by lane.
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

#if defined(__AVX512F__)
typedef __mmask16 M;

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
// b where either is NaN
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline M at_most(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline M same(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline M same(I a, I b) {
  return _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
inline M less(I a, I b) {
  return _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
inline M both(M a, M b) { return a & b; }
inline M negate(M a) { return static_cast<M>(~a); }
inline bool any(M a) { return a != 0; }
inline uint32_t bits(M a) { return a; }  // one of each lane
inline F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
inline I select(M m, I a, I b) {
  return reinterpret_cast<I>(
      _mm512_mask_blend_epi32(m, reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a)));
}
inline F permute(F a, I index) { return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), a); }
inline F gather(const float* from, I index) {
  return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), from, 4);
}
inline I to_int(F a) { return reinterpret_cast<I>(_mm512_cvtps_epi32(a)); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a)); }
#else
typedef I M;  // all bits of a lane set, or none

inline M less(F a, F b) { return a < b; }
inline M at_most(F a, F b) { return a <= b; }
inline M same(F a, F b) { return a == b; }
inline M same(I a, I b) { return a == b; }
inline M less(I a, I b) { return a < b; }
inline M both(M a, M b) { return a & b; }
inline M negate(M a) { return ~a; }
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline uint32_t bits(M a) { return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<F>(a))); }
inline bool any(M a) { return bits(a) != 0; }
inline F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, reinterpret_cast<F>(m)); }
inline I select(M m, I a, I b) {
  return reinterpret_cast<I>(select(m, reinterpret_cast<F>(a), reinterpret_cast<F>(b)));
}
inline F permute(F a, I index) { return _mm256_permutevar8x32_ps(a, reinterpret_cast<__m256i>(index)); }
inline F gather(const float* from, I index) {
  return _mm256_i32gather_ps(from, reinterpret_cast<__m256i>(index), 4);
}
inline I to_int(F a) { return reinterpret_cast<I>(_mm256_cvtps_epi32(a)); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(a)); }
#elif !defined(__AVX512F__)
inline F fma(F a, F b, F c) { return a * b + c; }
inline F sqrt(F a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
inline uint32_t bits(M a) {
  uint32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= (static_cast<uint32_t>(a[i]) & 1u) << i;
  return all;
}
inline bool any(M a) { return bits(a) != 0; }
inline I select(M m, I a, I b) { return (a & m) | (b & ~m); }
inline F select(M m, F a, F b) { return (F)select(m, (I)a, (I)b); }
inline F max(F a, F b) { return select(less(b, a), a, b); }
inline F min(F a, F b) { return select(less(a, b), a, b); }
inline F permute(F a, I index) {
  F out = a;
  for (int i = 0; i < kLanes; ++i) out[i] = a[index[i]];
  return out;
}
inline F gather(const float* from, I index) {
  F out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[index[i]];
  return out;
}
inline I to_int(F a) { return __builtin_convertvector(a, I); }  // of whole numbers
inline F to_float(I a) { return __builtin_convertvector(a, F); }
// To the nearest, ties to even: adding 1.5 * 2^23 leaves no bits behind the point. |a| < 2^22.
inline F round(F a) {
  const float magic = 12582912.0f;
  return (a + magic) - magic;
}
#endif

inline F broadcast(float value) { return value - F{}; }
inline I broadcast(int32_t value) { return value - I{}; }

inline F load(const float* from) {
  F out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
inline I load(const int32_t* from) {
  I out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
inline void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
inline void store(int32_t* to, I value) { std::memcpy(to, &value, sizeof value); }

// 0, 1, 2, ...
inline I lane_numbers() {
  I out;
  for (int i = 0; i < kLanes; ++i) out[i] = i;
  return out;
}

inline float sum(F a) {
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

// A sum in each lane that loses no more than a few rounding errors however many terms there are.
struct Total {
  F value{}, lost{};

  void add(F term) {
    const F wanted = term - lost, next = value + wanted;
    const F rest = (next - value) - wanted;
    value = next;
    // Once the sum is inf or NaN there is nothing to make good.
    lost = select(less(rest * rest, broadcast(__builtin_inff())), rest, F{});
  }

  double sum() const {
    double all = 0.0;
    for (int i = 0; i < kLanes; ++i) all += static_cast<double>(value[i]) - static_cast<double>(lost[i]);
    return all;
  }
};

// 2^n for n in [-126, 127]
inline F power_of_two(I n) { return (F)((n + 127) << 23); }

#if !defined(__AVX512F__)
// a 2^n, in two steps, so that results below the normal range are right; n whole.
inline F scaled(F a, F n) {
  const I whole = to_int(n), half = whole >> 1;
  return a * power_of_two(half) * power_of_two(whole - half);
}
#endif

// e^a to about one unit in the last place; 0 and inf beyond the range, NaN stays.
inline F exp(F a) {
  const F x = min(broadcast(89.0f), max(broadcast(-104.5f), a));
  const F n = round(x * 1.44269504f);
  F r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  // The series of e^r for |r| <= ln 2 / 2, cut behind r^7 / 7!.
  F p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return scaled(p, select(same(x, x), n, F{}));  // what is NaN in r is NaN in p
#endif
}

// 2^a to about one unit in the last place for finite a up to 127, NaN stays.
inline F exp2(F a) {
#if defined(__AVX512F__)
  const F n = round(a);
  const F r = a - n;
#else
  const F x = max(broadcast(-151.0f), a);  // a where it is NaN
  const F n = round(x);
  const F r = x - n;
#endif
  // Interpolates 2^r at the Chebyshev nodes of [-1/2, 1/2].
  F p = broadcast(0.000154614447f);
  p = fma(p, r, broadcast(0.00134004282f));
  p = fma(p, r, broadcast(0.00961805668f));
  p = fma(p, r, broadcast(0.0555032723f));
  p = fma(p, r, broadcast(0.240226509f));
  p = fma(p, r, broadcast(0.693147207f));
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return scaled(p, select(same(x, x), n, F{}));
#endif
}

inline F quotient(F a, F b) { return a / b; }

// Natural logarithm to about one unit in the last place; -inf at 0, inf at inf, NaN below 0 and for NaN.
inline F log(F a) {
  const M tiny = less(a, broadcast(1.17549435e-38f));
  const F scaled = select(tiny, a * 8388608.0f, a);
  // a = m 2^e with m in [sqrt(1/2), sqrt(2))
  const I bits = (I)((U)scaled - 0x3f3504f3u);
  const I e = bits >> 23;
  const F m = (F)((bits & 0x007fffff) + 0x3f3504f3);
  const F exponent = to_float(e) - select(tiny, broadcast(23.0f), F{});
  // log m = 2 artanh s = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| <= 0.172
  const F s = (m - 1.0f) / (m + 1.0f);
  const F q = s * s;
  F p = broadcast(2.0f / 9);
  p = fma(p, q, broadcast(2.0f / 7));
  p = fma(p, q, broadcast(2.0f / 5));
  p = fma(p, q, broadcast(2.0f / 3));
  F out = fma(exponent, broadcast(-2.12194440e-4f), p * q * s);
  out = fma(exponent, broadcast(0.693359375f), fma(s, broadcast(2.0f), out));
  out = select(at_most(a, F{}), broadcast(-__builtin_inff()), out);
  out = select(less(a, F{}), broadcast(__builtin_nanf("")), out);
  return select(less(a, broadcast(__builtin_inff())), out, a + a);
}

}  // namespace
}  // namespace cisc
