// What a kernel does at a shape, as its plan states it. Needs no torch header.
#pragma once

#include <cstdint>

namespace cisc {

// FLOPs: an addition, a multiplication, a comparison of floats is one, a fused multiply-add two, an
// exponential or a logarithm kFunction. Bytes: what goes between memory and the caches if these hold a strip
// or a tile: inputs as often as they are read, outputs and gradients.
struct Work {
  int64_t flops = 0;
  int64_t bytes = 0;
};

constexpr int64_t kFunction = 20;  // of simd.h's exp and log

}  // namespace cisc
