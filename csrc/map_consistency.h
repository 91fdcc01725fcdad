// How map_consistency cuts its work, and what its kernels are given. Needs no torch header.
#pragma once

#include "labels.h"
#include "upsample.h"

namespace cisc::map_consistency {

constexpr int64_t kRowFloats = 1;  // per label pixel of a chunk: its code

struct Problem {
  upsample::Grid grid;
  upsample::Source similarity;
  upsample::Plan plan;
  Labels labels;
  int64_t ignore_index;
  const Slots::View* slots;  // [B]
  const int32_t* of_column;  // [B,S]: slot of each map's class, -1 = none
  const float* share;        // [B]: 1 / number of the image's valid classes
};

// What a task adds up.
struct Sums {
  double loss = 0.0;
  int64_t kept = 0;
};

struct Kernels {
  void (*loss)(const Problem&, const upsample::Task&, Sums*);
  void (*gradient)(const Problem&, const upsample::Task&, Sums*);
};
extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

inline upsample::Plan plan(const upsample::Grid& grid, int64_t batch, bool gradient) {
  return upsample::plan(grid, batch, gradient, kRowFloats);
}

inline Work work(const upsample::Grid& grid, const upsample::Plan& p, int64_t batch, int64_t map_bytes,
                 int64_t label_bytes, bool gradient) {
  const int64_t pixels = batch * grid.height * grid.width;
  Work w = upsample::work(grid, p, batch, map_bytes, gradient);
  w.flops += pixels * grid.planes * (kFunction + 10);
  w.bytes += pixels * label_bytes;
  return w;
}

}  // namespace cisc::map_consistency
