// Kernels of map_consistency for the instruction set that includes them; see simd.h.
#pragma once

#include "labels_kernel.h"
#include "map_consistency.h"
#include "pixel_loss.h"
#include "upsample_kernel.h"

namespace cisc::map_consistency {
namespace {

template <bool kGradient>
class Body {
 public:
  Body(const Problem& problem, const upsample::Task& task, Sums* sums)
      : p_(problem), task_(task), sums_(sums), codes_(problem.slots[task.image], problem.ignore_index) {}

  void start(float*, float* buffer, int64_t columns) {
    columns_ = columns;
    code_ = reinterpret_cast<int32_t*>(buffer);
  }

  void row(int64_t slot, int64_t y, int64_t x0, int64_t n) {
    int32_t* code = code_ + slot * columns_;
    with_labels(p_.labels, task_.image, y, x0,
                [&](const auto* labels) { codes_.fill(labels, p_.labels.stride_x, n, code); });
    for (; n % kLanes != 0; ++n) code[n] = kIgnored;
  }

  void pixels(int64_t slot, int64_t x, const float* low, const float* high, F weight_low, F weight_high,
              bool has_high, float* at_low, float* at_high) {
    const I code = load(code_ + slot * columns_ + x);
    const M kept = negate(same(code, broadcast(kIgnored)));
    kept_ -= select(kept, broadcast(int32_t{-1}), I{});
    const F share = broadcast(p_.share[task_.image]), one = broadcast(1.0f);
    const int32_t* of_column = p_.of_column + task_.image * p_.grid.planes;
    for (int64_t s = 0; s < p_.grid.planes; ++s) {
      if (of_column[s] < 0) continue;
      const int64_t k = s * kLanes;
      const F similarity = fma(load(high + k), weight_high, load(low + k) * weight_low);
      F slope;
      const F loss = binary_cross_entropy(same(code, broadcast(of_column[s])), similarity, F{}, one, &slope);
      loss_.add(select(kept, loss * share, F{}));
      if constexpr (kGradient) {
        const F g = select(kept, slope * share, F{});
        store(at_low + k, fma(g, weight_low, load(at_low + k)));
        if (has_high) store(at_high + k, fma(g, weight_high, load(at_high + k)));
      }
    }
  }

  void finish(int64_t, int64_t, int64_t, int64_t) {
    sums_->loss += loss_.sum();
    for (int i = 0; i < kLanes; ++i) sums_->kept += kept_[i];
    loss_ = Total{};
    kept_ = I{};
  }

 private:
  const Problem& p_;
  const upsample::Task& task_;
  Sums* sums_;
  SlotCodes codes_;
  int64_t columns_ = 0;
  int32_t* code_ = nullptr;  // [kChunk, columns]
  Total loss_;
  I kept_{};
};

template <bool kGradient>
void run(const Problem& problem, const upsample::Task& task, Sums* sums) {
  Body<kGradient> body(problem, task, sums);
  upsample::walk<kGradient>(problem.grid, problem.similarity, problem.plan, task, body);
}

inline void loss(const Problem& problem, const upsample::Task& task, Sums* sums) {
  run<false>(problem, task, sums);
}

inline void gradient(const Problem& problem, const upsample::Task& task, Sums* sums) {
  run<true>(problem, task, sums);
}

}  // namespace
}  // namespace cisc::map_consistency
