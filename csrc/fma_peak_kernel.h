// Kernel of fma_peak for the instruction set that includes it; see simd.h.
#pragma once

#include "fma_peak.h"
#include "simd.h"

namespace cisc::fma_peak {
namespace {

inline int64_t run(int64_t rounds, float* sink) {
  F sums[kChains];
  for (int64_t i = 0; i < kChains; ++i) sums[i] = broadcast(sink[i]);
  const F a = broadcast(0.999f), b = broadcast(1e-3f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int64_t i = 0; i < kChains; ++i) sums[i] = fma(sums[i], a, b);
  }
  for (int64_t i = 0; i < kChains; ++i) sink[i] = sum(sums[i]);
  return rounds * 2 * kLanes * kChains;
}

}  // namespace
}  // namespace cisc::fma_peak
