// The ceiling that kernels are measured against: fused multiply-adds on registers. Needs no torch header.
#pragma once

#include <cstdint>

namespace cisc::fma_peak {

constexpr int64_t kMostChains = 24;  // sums of a kernel

// Multiply-adds on some vectors, each of `rounds` times; pairs: of two bfloat16 in a lane, where there is an
// instruction for that. Returns the FLOPs; *sink keeps the work alive.
using Kernel = int64_t (*)(bool pairs, int64_t rounds, float* sink);
extern const Kernel kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace cisc::fma_peak
