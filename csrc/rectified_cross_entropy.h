// How rectified_cross_entropy cuts its work, and what its kernels are given. Needs no torch header.
#pragma once

#include "labels.h"
#include "upsample.h"

namespace cisc::rectified_cross_entropy {

constexpr int64_t kRowFloats = 2;        // per label pixel of a chunk: its code, and its weight
constexpr int64_t kPasses = 2;           // of OHEM's search, before the loss
constexpr int64_t kHistogram = 1 << 16;  // bins of one pass of OHEM's search: 16 bits of a probability

struct Problem {
  upsample::Grid grid;
  upsample::Source logits;
  upsample::Plan plan;
  Labels labels;
  int64_t ignore_index;
  upsample::Grid map_grid;  // planes = S; 0 without similarity
  upsample::Source maps;
  const int32_t* classes;  // [B,S], -1 = none; null: the map is each pixel's likeness to its own label
  bool ohem;
  float limit;              // OHEM drops pixels whose probability lies above
  float* pixel_loss;        // [B,H,W] for reduction "none", else null
  const float* pixel_grad;  // gradient of that, [B,H,W] with strides, else null
  int64_t pixel_grad_stride[3];
};

// What a task adds up.
struct Sums {
  double loss = 0.0;
  int64_t kept = 0;
  bool invalid = false;  // a label is neither a class nor ignored
};

// One of the two passes that find the k-th smallest probability by its bits; a thread counts [kHistogram].
struct Count {
  int32_t prefix;  // upper 16 bits, or -1 in the first pass, which counts these
};

struct Kernels {
  void (*loss)(const Problem&, const upsample::Task&, Sums*);
  void (*gradient)(const Problem&, const upsample::Task&, Sums*);
  void (*count)(const Problem&, const upsample::Task&, const Count&, Sums*);
};
extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

inline upsample::Plan plan(const upsample::Grid& grid, const upsample::Grid& maps, int64_t batch,
                           bool gradient) {
  upsample::Plan p = upsample::plan(grid, batch, gradient, kRowFloats);
  if (maps.planes > 0) p.thread_floats += upsample::row_buffer(maps, p.columns) + p.columns;
  return p;
}

// Of all threads, and what they share.
inline int64_t workspace_bytes(const upsample::Grid& grid, const upsample::Grid& maps,
                               const upsample::Plan& p, int64_t threads, bool ohem) {
  return upsample::workspace_bytes(grid, p, threads, ohem ? kHistogram : 0) + upsample::table_bytes(maps);
}

// `passes` over the pixels without a gradient come before the last (OHEM: two).
inline Work work(const upsample::Grid& grid, const upsample::Grid& maps, const upsample::Plan& p,
                 int64_t batch, int64_t logit_bytes, int64_t label_bytes, int64_t map_bytes, bool gradient,
                 int64_t passes) {
  const int64_t pixels = batch * grid.height * grid.width, values = pixels * grid.planes;
  Work one = upsample::work(grid, p, batch, logit_bytes, false),
       last = upsample::work(grid, p, batch, logit_bytes, gradient);
  one.flops += values * (kFunction + 3) + pixels * 2 * kFunction;
  last.flops += values * (kFunction + 3 + (gradient ? 2 : 0)) + pixels * (kFunction + 4 + 9 * maps.planes);
  one.bytes += pixels * label_bytes;
  last.bytes += pixels * label_bytes + batch * maps.planes * maps.h * maps.w * map_bytes;
  return {last.flops + passes * one.flops, last.bytes + passes * one.bytes};
}

}  // namespace cisc::rectified_cross_entropy
