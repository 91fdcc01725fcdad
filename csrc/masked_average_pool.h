// How masked_average_pool cuts its work so that its workspace is bounded. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cisc::masked_average_pool {

constexpr int64_t kBlock = 64;             // pixels, or channels-last channels, of one inner loop
constexpr int64_t kMaxClasses = 65536;     // columns of `classes`
constexpr int64_t kMaxCells = 1 << 22;     // class x pixel weights held at once
constexpr int64_t kMaxSums = 1 << 20;      // class x channel sums held at once
constexpr int64_t kMaxLabels = 1LL << 30;  // pixels per image: sums of exact weights stay below 2^63
constexpr int64_t kColumns = 1024;         // label columns whose taps are tabulated at once

struct Plan {
  int64_t rows;      // feature rows of one piece
  int64_t columns;   // feature columns of one piece; the whole width unless one row alone is too much
  int64_t channels;  // channels summed at once
  int64_t blocks;    // of kBlock pixels, in one piece
  int64_t bytes;     // workspace shared by all threads
};

// Features [C,h,w], `slots` <= kMaxClasses distinct classes.
inline Plan plan(int64_t channels, int64_t height, int64_t width, int64_t slots) {
  slots = std::max<int64_t>(slots, 1);
  const int64_t pixels = kMaxCells / slots / kBlock * kBlock;
  Plan p;
  p.columns = std::min(width, pixels);
  p.rows = std::min(height, std::max<int64_t>(pixels / std::max<int64_t>(p.columns, 1), 1));
  p.channels = std::min(channels, std::max<int64_t>(kMaxSums / slots, 1));
  p.blocks = (p.rows * p.columns + kBlock - 1) / kBlock;
  const int64_t cells = p.blocks * kBlock * slots;
  p.bytes = cells * 8                     // exact weights
            + cells * 4                   // the same in float32, packed
            + p.blocks * (slots + 1) * 4  // which classes a block holds
            + p.channels * slots * 8      // sums
            + slots * 32;                 // classes, counts, scales
  return p;
}

}  // namespace cisc::masked_average_pool
