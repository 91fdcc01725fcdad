// How predict cuts its work, and what its kernels are given. Needs no torch header.
#pragma once

#include "labels.h"
#include "upsample.h"

namespace cisc::predict {

constexpr int64_t kMaxClasses = 256;
constexpr int64_t kRowFloats = 2;  // per label pixel of a chunk: its code, and its best class

// Confusion matrices of a thread: several while they are small, so that neighbours do not wait for each
// other.
CISC_HD int64_t copies(int64_t classes) { return classes <= 64 ? 4 : 1; }

struct Problem {
  upsample::Grid grid;
  upsample::Source logits;
  upsample::Plan plan;
  bool has_labels;
  Labels labels;
  int64_t ignore_index;
  uint8_t* classes;  // [B,H,W]
};

// What a task finds; its thread counts in [copies, K, K].
struct Sums {
  bool invalid = false;  // a label is neither a class nor ignored
};

using Kernel = void (*)(const Problem&, const upsample::Task&, Sums*);
extern const Kernel kPortable, kAvx2, kAvx512, kAvx512Bf16;

inline upsample::Plan plan(const upsample::Grid& grid, int64_t batch) {
  return upsample::plan(grid, batch, false, kRowFloats);
}

inline Work work(const upsample::Grid& grid, const upsample::Plan& p, int64_t batch, int64_t logit_bytes,
                 int64_t label_bytes) {
  const int64_t pixels = batch * grid.height * grid.width;
  Work w = upsample::work(grid, p, batch, logit_bytes, false);
  w.flops += 2 * pixels * grid.planes;
  w.bytes += pixels * (label_bytes + 1);
  return w;
}

}  // namespace cisc::predict
