// How masked_average_pool cuts its work so that its workspace is bounded. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bilinear.h"
#include "convert.h"
#include "work.h"

namespace cisc::masked_average_pool {

constexpr int64_t kBlock = 64;             // pixels, or channels-last channels, of one inner loop
constexpr int64_t kMaxClasses = 65536;     // columns of `classes`
constexpr int64_t kMaxCells = 1 << 22;     // class x pixel weights held at once
constexpr int64_t kMaxSums = 1 << 19;      // class x channel sums held at once
constexpr int64_t kMaxLabels = 1LL << 30;  // pixels per image: sums of exact weights stay below 2^63
constexpr int64_t kColumns = 1024;         // label columns whose taps are tabulated at once

constexpr int64_t kPlanes = 4;               // channels that share one reading of the weights
constexpr int64_t kPoolCrewBytes = 8 << 20;  // what threads hold, all together

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

// What a thread holds in the steps: its counts; sums of kPlanes channels; factors of a channel's gradient.
inline int64_t counting_bytes(int64_t slots) { return 8 * slots; }
inline int64_t pooling_bytes(int64_t slots) { return 8 * slots * kPlanes; }
inline int64_t scattering_bytes(int64_t slots) { return 12 * slots; }

// Of all threads, and what they share.
inline int64_t workspace_bytes(const Plan& p, int64_t channels, int64_t slots, int64_t threads) {
  const auto crew = [&](int64_t items, int64_t each) {
    return crew_size(threads, items, each, kPoolCrewBytes) * each;
  };
  return p.bytes + std::max({crew(p.rows, counting_bytes(slots)),
                             crew((p.channels + kPlanes - 1) / kPlanes, pooling_bytes(slots)),
                             crew(channels, scattering_bytes(slots))});
}

// With a class in every block at most; what labels leave out is not known before.
inline Work work(const Plan& p, int64_t batch, int64_t channels, int64_t height, int64_t width,
                 int64_t label_pixels, int64_t slots, int64_t feature_bytes, int64_t label_bytes,
                 bool backward) {
  const int64_t rounds = (channels + p.channels - 1) / std::max<int64_t>(p.channels, 1);
  Work w;
  w.flops = batch * height * width * channels * slots * 2;
  w.bytes = batch * (height * width * channels * feature_bytes +
                     label_pixels * label_bytes * (backward ? 1 : rounds) + slots * channels * 4);
  return w;
}

// A rectangle of the features' grid.
struct Piece {
  int64_t top, bottom, left, right;
  CISC_HD int64_t rows() const { return bottom - top; }
  CISC_HD int64_t columns() const { return right - left; }
  CISC_HD int64_t pixels() const { return rows() * columns(); }
  CISC_HD int64_t blocks() const { return (pixels() + kBlock - 1) / kBlock; }
};

// Weights of one piece: block after block of kBlock pixels, of each only the classes found there.
struct Packed {
  Piece piece;
  int64_t slots;
  const float* weight;    // [blocks, slots, kBlock], 0 behind the last pixel
  const int32_t* slot;    // [blocks, slots]
  const int32_t* filled;  // [blocks]
};

struct Kernels {
  // sums[slot, c] += features[image, first + c] . weights[slot] for the groups [begin, end) of kPlanes of
  // `channels` channels; own: [slots, kPlanes]
  void (*pool_planes)(const Image<const void*>& features, int64_t image, int64_t first, int64_t channels,
                      int64_t begin, int64_t end, const Packed& weights, double* own, double* sums);
  // The same for features whose channels lie side by side, for groups of kBlock channels.
  void (*pool_pixels)(const Image<const void*>& features, int64_t image, int64_t first, int64_t channels,
                      int64_t begin, int64_t end, const Packed& weights, double* sums);
  // One channel of the gradient: sum over the slots of factor[slot] * weights[slot]. plane: [h,w], contiguous
  void (*scatter)(const float* factor, const Packed& weights, int64_t width, Float kind, void* plane,
                  int64_t offset);
};
extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace cisc::masked_average_pool
