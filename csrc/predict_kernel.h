// Kernel of predict for the instruction set that includes it; see simd.h.
#pragma once

#include "labels_kernel.h"
#include "predict.h"
#include "upsample_kernel.h"

namespace cisc::predict {
namespace {

class Body {
 public:
  Body(const Problem& problem, const upsample::Task& task, Sums* sums)
      : p_(problem), task_(task), sums_(sums) {}

  void start(float*, float* buffer, int64_t columns) {
    columns_ = columns;
    code_ = reinterpret_cast<int32_t*>(buffer);
    best_ = code_ + upsample::kChunk * columns;
  }

  void row(int64_t slot, int64_t y, int64_t x0, int64_t n) {
    if (!p_.has_labels) return;
    const bool invalid = with_labels(p_.labels, task_.image, y, x0, [&](const auto* labels) {
      return class_codes(labels, p_.labels.stride_x, n, p_.grid.planes, p_.ignore_index,
                         code_ + slot * columns_);
    });
    sums_->invalid |= invalid;
  }

  // The first of the largest; a NaN is larger than anything, as for torch.argmax.
  void pixels(int64_t slot, int64_t x, const float* low, const float* high, F weight_low, F weight_high, bool,
              float*, float*) {
    F most = fma(load(high), weight_high, load(low) * weight_low);
    I best{}, k{};
    for (int64_t i = kLanes; i < p_.grid.planes * kLanes; i += kLanes) {
      k += 1;
      const F u = fma(load(high + i), weight_high, load(low + i) * weight_low);
      const M better = both(negate(at_most(u, most)), same(most, most));
      most = select(better, u, most);
      best = select(better, k, best);
    }
    store(best_ + slot * columns_ + x, best);
  }

  void finish(int64_t rows, int64_t y0, int64_t x0, int64_t n) {
    const int64_t planes = p_.grid.planes, mask = copies(planes) - 1;
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t* best = best_ + row * columns_;
      uint8_t* to = p_.classes + (task_.image * p_.grid.height + y0 + row) * p_.grid.width + x0;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(best[i]);
      if (!p_.has_labels) continue;
      const int32_t* code = code_ + row * columns_;
      for (int64_t i = 0; i < n; ++i) {
        if (code[i] >= 0) ++task_.counts[((i & mask) * planes + code[i]) * planes + best[i]];
      }
    }
  }

 private:
  const Problem& p_;
  const upsample::Task& task_;
  Sums* sums_;
  int64_t columns_ = 0;
  int32_t* code_ = nullptr;  // [kChunk, columns]
  int32_t* best_ = nullptr;  // [kChunk, columns]
};

inline void run(const Problem& problem, const upsample::Task& task, Sums* sums) {
  Body body(problem, task, sums);
  upsample::walk<false>(problem.grid, problem.logits, problem.plan, task, body);
}

}  // namespace
}  // namespace cisc::predict
