// Kernels of rectified_cross_entropy for the instruction set that includes them; see simd.h.
#pragma once

#include "labels_kernel.h"
#include "pixel_loss.h"
#include "rectified_cross_entropy.h"
#include "upsample_kernel.h"

namespace cisc::rectified_cross_entropy {
namespace {

enum class Mode { loss, gradient, count };

template <Mode kMode>
class Body {
 public:
  Body(const Problem& problem, const upsample::Task& task, const Count* count, Sums* sums)
      : p_(problem), task_(task), count_(count), sums_(sums) {}

  void start(float* planes, float* buffer, int64_t columns) {
    e_ = planes;
    columns_ = columns;
    weight_ = buffer;
    code_ = reinterpret_cast<int32_t*>(buffer + upsample::kChunk * columns);
    map_ = buffer + 2 * upsample::kChunk * columns;
    row_ = map_ + columns;
  }

  void row(int64_t slot, int64_t y, int64_t x0, int64_t n) {
    int32_t* code = code_ + slot * columns_;
    const bool invalid = with_labels(p_.labels, task_.image, y, x0, [&](const auto* labels) {
      return class_codes(labels, p_.labels.stride_x, n, p_.grid.planes, p_.ignore_index, code);
    });
    sums_->invalid |= invalid;
    int64_t padded = n;
    for (; padded % kLanes != 0; ++padded) code[padded] = kIgnored;
    if constexpr (kMode == Mode::count) return;
    float* weight = weight_ + slot * columns_;
    weigh(y, x0, padded, code, weight);
    if (kMode == Mode::gradient && p_.pixel_grad != nullptr) {
      const int64_t* stride = p_.pixel_grad_stride;
      const float* grad = p_.pixel_grad + task_.image * stride[0] + y * stride[1] + x0 * stride[2];
      for (int64_t i = 0; i < n; ++i) weight[i] *= grad[i * stride[2]];
    }
  }

  void pixels(int64_t slot, int64_t x, const float* low, const float* high, F weight_low, F weight_high,
              bool has_high, float* at_low, float* at_high) {
    const int64_t planes = p_.grid.planes;
    F most = broadcast(-__builtin_inff());
    for (int64_t k = 0; k < planes * kLanes; k += kLanes) {
      const F u = fma(load(high + k), weight_high, load(low + k) * weight_low);
      store(e_ + k, u);
      most = max(most, u);
    }
    const I code = load(code_ + slot * columns_ + x);
    M kept = less(broadcast(int32_t{-1}), code);
    const F own = gather(e_, select(kept, code * kLanes, I{}) + lane_numbers());
    F total{};
    for (int64_t k = 0; k < planes * kLanes; k += kLanes) {
      const F e = exp(load(e_ + k) - most);
      store(e_ + k, e);
      total += e;
    }
    const F log_probability = own - most - log(total);
    if (kMode == Mode::count || p_.ohem) {
      const F probability = exp(log_probability);
      if constexpr (kMode == Mode::count) return count(probability, kept);
      kept = both(kept, negate(less(broadcast(p_.limit), probability)));
    }
    const F weight = load(weight_ + slot * columns_ + x);
    const F loss = select(kept, -log_probability * weight, F{});
    if (p_.pixel_loss != nullptr) store(weight_ + slot * columns_ + x, loss);
    loss_.add(loss);
    kept_ -= select(kept, broadcast(int32_t{-1}), I{});
    if constexpr (kMode == Mode::gradient) {
      F scale = select(kept, weight / total, F{});
      const F pull = select(kept, weight, F{});
      // What is not finite in a pixel that does not count must not become NaN by the factor 0.
      const M finite = less(total, broadcast(__builtin_inff()));
      if (any(negate(finite)) && any(negate(kept))) {
        for (int64_t k = 0; k < planes * kLanes; k += kLanes) {
          store(e_ + k, select(kept, load(e_ + k), F{}));
        }
      }
      I k{};
      for (int64_t i = 0; i < planes * kLanes; i += kLanes, k += 1) {
        const F g = cross_entropy_slope(same(code, k), load(e_ + i), scale, pull, F{});
        store(at_low + i, fma(g, weight_low, load(at_low + i)));
        if (has_high) store(at_high + i, fma(g, weight_high, load(at_high + i)));
      }
    }
  }

  void finish(int64_t rows, int64_t y0, int64_t x0, int64_t n) {
    if (p_.pixel_loss != nullptr) {
      for (int64_t i = 0; i < rows; ++i) {
        float* to = p_.pixel_loss + (task_.image * p_.grid.height + y0 + i) * p_.grid.width + x0;
        std::memcpy(to, weight_ + i * columns_, static_cast<size_t>(n) * sizeof(float));
      }
    }
    sums_->loss += loss_.sum();
    for (int i = 0; i < kLanes; ++i) sums_->kept += kept_[i];
    loss_ = Total{};
    kept_ = I{};
  }

 private:
  // weight = 1 - mean over the valid classes of |1[label = class] - similarity|
  void weigh(int64_t y, int64_t x0, int64_t n, const int32_t* code, float* weight) {
    const int64_t maps = p_.map_grid.planes;
    const F one = broadcast(1.0f);
    int64_t valid = 0;
    for (int64_t s = 0; s < maps; ++s) {
      const int32_t target = p_.classes == nullptr ? 0 : p_.classes[task_.image * maps + s];
      if (target < 0) continue;
      upsample::upsample_row(p_.map_grid, p_.maps, task_.image, s, y, x0, n, row_, map_);
      for (int64_t x = 0; x < n; x += kLanes) {
        const F likeness = clamp_similarity(load(map_ + x), F{}, one);
        if (p_.classes == nullptr) {
          store(weight + x, likeness);
        } else {
          const F gap = consistency_gap(same(load(code + x), broadcast(target)), likeness, one);
          store(weight + x, valid == 0 ? gap : load(weight + x) + gap);
        }
      }
      ++valid;
    }
    if (valid > 0 && p_.classes == nullptr) return;
    const F count = broadcast(static_cast<float>(valid));
    for (int64_t x = 0; x < n; x += kLanes) {
      store(weight + x, valid == 0 ? one : one - load(weight + x) / count);
    }
  }

  void count(F probability, M kept) {
    alignas(64) int32_t bits[kLanes], counted[kLanes];
    store(bits, (I)probability & 0x7fffffff);  // -0 would sort above 1
    store(counted, select(kept, broadcast(int32_t{1}), I{}));
    for (int i = 0; i < kLanes; ++i) {
      if (counted[i] == 0) continue;
      if (count_->prefix < 0) {
        ++task_.counts[bits[i] >> 16];
      } else if (bits[i] >> 16 == count_->prefix) {
        ++task_.counts[bits[i] & 0xffff];
      }
    }
  }

  const Problem& p_;
  const upsample::Task& task_;
  const Count* count_;
  Sums* sums_;
  int64_t columns_ = 0;
  float* e_ = nullptr;       // [planes, kLanes]: logits, then exponentials
  float* weight_ = nullptr;  // [kChunk, columns]
  int32_t* code_ = nullptr;  // [kChunk, columns]
  float* map_ = nullptr;     // [columns]
  float* row_ = nullptr;     // [row_buffer]
  Total loss_;
  I kept_{};
};

template <Mode kMode>
void run(const Problem& problem, const upsample::Task& task, const Count* count, Sums* sums) {
  Body<kMode> body(problem, task, count, sums);
  upsample::walk<kMode == Mode::gradient>(problem.grid, problem.logits, problem.plan, task, body);
}

inline void loss(const Problem& problem, const upsample::Task& task, Sums* sums) {
  run<Mode::loss>(problem, task, nullptr, sums);
}

inline void gradient(const Problem& problem, const upsample::Task& task, Sums* sums) {
  run<Mode::gradient>(problem, task, nullptr, sums);
}

inline void count(const Problem& problem, const upsample::Task& task, const Count& what, Sums* sums) {
  run<Mode::count>(problem, task, &what, sums);
}

}  // namespace
}  // namespace cisc::rectified_cross_entropy
