// How prototype_similarity cuts its work, and what its kernels are given. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "work.h"

namespace cisc::prototype_similarity {

constexpr int64_t kChannels = 64;             // channels that are converted to float32 together
constexpr int64_t kGroup = 4;                 // channels that share one reading of sums, or of gradients
constexpr int64_t kMany = 4;                  // classes
constexpr int64_t kTileFloats = 1 << 16;      // channels, or classes, x pixels of a tile
constexpr int64_t kMostPixels = 512;          // of a tile
constexpr int64_t kPartialDoubles = 1 << 20;  // sums over pixels of the tasks that run side by side
constexpr int64_t kUnitFloats = 1 << 21;      // unit prototypes of the images whose tasks run side by side

struct Plan {
  int64_t tile;           // pixels at hand together, a multiple of kStep
  int64_t pixels;         // of a task, a multiple of tile
  int64_t tasks;          // of an image
  int64_t images;         // whose tasks run side by side
  int64_t thread_floats;  // workspace of a thread
  int64_t partials;       // doubles of all tasks side by side; backward only
};

// Query [B,C,h,w] of `pixels` pixels, prototypes [B,S,C].
inline Plan plan(int64_t batch, int64_t channels, int64_t pixels, int64_t slots, bool backward) {
  Plan p;
  const int64_t deep = std::max<int64_t>({channels, slots, 1});
  p.tile = std::clamp(kTileFloats / deep / kStep * kStep, kStep, kMostPixels);
  p.tile = std::min(p.tile, (pixels + kStep - 1) / kStep * kStep);
  const int64_t sums = backward ? slots * channels : 0;
  int64_t tasks = tasks_of(pixels * channels);
  if (sums > 0) tasks = std::min(tasks, std::max<int64_t>(kPartialDoubles / sums, 1));
  const int64_t tiles = (pixels + p.tile - 1) / std::max<int64_t>(p.tile, 1);
  p.pixels = (tiles + tasks - 1) / tasks * p.tile;
  p.tasks = p.pixels > 0 ? (pixels + p.pixels - 1) / p.pixels : 1;  // one that has nothing to do
  p.images = std::min(batch, std::max<int64_t>(kUnitFloats / std::max<int64_t>(slots * channels, 1), 1));
  if (sums > 0) p.images = std::min(p.images, std::max<int64_t>(kPartialDoubles / (sums * p.tasks), 1));
  p.partials = p.images * p.tasks * sums;
  // Norms, dot products, what rounding has cost them, gradients; channels of a tile in float32, as they lie
  // and, for many classes, packed; a pixel and its gradient.
  const int64_t deep_rows = std::min(kChannels, channels) * (slots < kMany ? 1 : 2);
  p.thread_floats =
      (1 + std::max<int64_t>(slots, 1) + slots + std::max(slots + 1, kGroup) + deep_rows) * p.tile +
      2 * channels;
  return p;
}

// Of all threads, and what they share: unit vectors with their norms, sums, a row.
inline int64_t workspace_bytes(const Plan& p, int64_t channels, int64_t slots, int64_t threads) {
  const int64_t each = 4 * p.thread_floats;
  return crew_size(threads, p.images * p.tasks, each) * each + p.images * slots * (4 * channels + 8) +
         8 * p.partials + 4 * channels;
}

struct Problem {
  int64_t channels, width, pixels, slots;
  Image<const void*> query;
  float eps;
  float* similarity;  // forward: [B,S,h,w]
  const float* grad;  // backward: [B,S,h,w] with strides
  int64_t grad_stride[4];
  Image<void*> grad_query;  // backward
};

// Pixels [begin, end) of an image.
struct Task {
  int64_t image, begin, end, tile;
  const float* units;  // [S,C] prototypes of the image as unit vectors, 0 where shorter than eps
  float* workspace;    // [Plan::thread_floats] of the thread
  double* grad_units;  // [S,C], backward: what the task's pixels send to the unit prototypes
};

struct Kernels {
  void (*forward)(const Problem&, const Task&);
  void (*backward)(const Problem&, const Task&);
};
extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

inline Work work(int64_t batch, int64_t channels, int64_t pixels, int64_t slots, int64_t query_bytes,
                 int64_t prototype_bytes, bool backward) {
  const int64_t values = batch * channels * pixels;
  Work w;
  w.flops = values * (2 + 2 * slots + (backward ? 2 + 4 * slots : 0));
  w.bytes = values * query_bytes * (backward ? 2 : 1) +
            batch * slots * (pixels * 4 + channels * prototype_bytes * (backward ? 2 : 1));
  return w;
}

}  // namespace cisc::prototype_similarity
