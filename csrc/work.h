// What a kernel does at a shape, as its plan states it, and how work is cut. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cisc {

// FLOPs: an addition, a multiplication, a comparison of floats is one, a fused multiply-add two, an
// exponential or a logarithm kFunction. Bytes: what goes between memory and the caches if these hold a strip
// or a tile: inputs as often as they are read, outputs and gradients.
struct Work {
  int64_t flops = 0;
  int64_t bytes = 0;
};

constexpr int64_t kFunction = 20;           // of simd.h's exp and log
constexpr int64_t kStep = 16;               // pixels are cut at multiples of it: lanes of the widest vector
constexpr int64_t kTaskElements = 1 << 17;  // that are worth a task
constexpr int64_t kMaxTasks = 256;          // of one image
constexpr int64_t kCrewBytes = 32 << 20;    // what threads hold, all together

// Tasks of an image whose planes have so many elements.
inline int64_t tasks_of(int64_t elements) {
  return std::clamp<int64_t>(elements / kTaskElements, 1, kMaxTasks);
}

// How many of `threads` share `items` where each holds `bytes` of its own: at least one, and no more than
// keep to `most` bytes.
inline int64_t crew_size(int64_t threads, int64_t items, int64_t bytes, int64_t most = kCrewBytes) {
  return std::max<int64_t>(std::min({threads, items, most / std::max<int64_t>(bytes, 1)}), 1);
}

}  // namespace cisc
