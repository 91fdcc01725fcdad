// The ceiling that kernels are measured against: fused multiply-adds on registers. Needs no torch header.
#pragma once

#include <cstdint>

namespace cisc::fma_peak {

constexpr int64_t kChains = 12;  // independent sums: enough to hide the latency of two units

// 2 * kLanes * kChains FLOPs each of `rounds` times. Returns their number; *sink keeps the work alive.
using Kernel = int64_t (*)(int64_t rounds, float* sink);
extern const Kernel kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace cisc::fma_peak
