// Kernel of fma_peak for the instruction set that includes it; see simd.h.
#pragma once

#include "convert.h"
#include "fma_peak.h"
#include "simd.h"

namespace cisc::fma_peak {
namespace {

// kChains independent sums, enough to hide the latency of two units.
template <int kChains, typename Step>
inline int64_t chains(int64_t rounds, float* sink, Step&& step) {
  F sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(sink[i]);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i]);
  }
  for (int i = 0; i < kChains; ++i) sink[i] = sum(sums[i]);
  return rounds * 2 * kLanes * kChains;
}

inline int64_t run(bool pairs, int64_t rounds, float* sink) {
#if defined(__AVX512BF16__)
  if (pairs) {
    const auto a = (__m512bh)broadcast(bits_to_float(0x3a803a80u));  // 2^-10, twice
    return 2 * chains<kMostChains>(rounds, sink, [&](F s) { return (F)_mm512_dpbf16_ps(s, a, a); });
  }
#endif
  static_cast<void>(pairs);
  const F a = broadcast(0.999f), b = broadcast(1e-3f);
  return chains<12>(rounds, sink, [&](F s) { return fma(s, a, b); });
}

}  // namespace
}  // namespace cisc::fma_peak
