// What a pixel's cosines have come to so far, and how parts of the guide are put together.
#pragma once

#include <limits>

#include "cross_similarity.h"
#include "cross_similarity_plan.h"
#include "device.cuh"

namespace cisc::cross_similarity {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Adds a term to a sum that has lost so much to rounding; returns what it has lost now.
__device__ __forceinline__ float add_compensated(float term, float lost,
                                                 // outputs
                                                 float& value) {
  const float rest = term - lost, sum = value + rest, now = (sum - value) - rest;
  value = sum;
  return now;
}

// A sum of many terms.
struct Sum {
  float value = 0.0f, lost = 0.0f;

  __device__ __forceinline__ void add(float term) { lost = add_compensated(term, lost, value); }

  __device__ __forceinline__ double exact() const {
    return static_cast<double>(value) - static_cast<double>(lost);
  }

  // Becomes factor * (this + by * other).
  __device__ __forceinline__ void shift(float factor, float by, const Sum& other) {
    value = factor * fmaf(by, other.value, value);
    lost = factor * fmaf(by, other.lost, lost);
  }
};

// What a pixel's cosines have come to so far.
struct State {
  float best;
  int32_t index;    // of the best, or -1; of "topk", how many winners there are
  float top;        // of "softmax", the cosine that weights are relative to, but for the query's length
  int32_t open;     // of a sweep that screens, whether candidates are lacking
  double total;     // "softmax": sum of weights 2^((cosine - top) * steepness); "mean": number of cosines
  double weighted;  // "softmax": sum of weight * (cosine - top); "mean": sum of the cosines

  __device__ static State none() { return {-kInfinity, -1, -kInfinity, 0, 0.0, 0.0}; }

  // NaN is better than all else; of equal ones the lowest index.
  __device__ __forceinline__ void take_best(float value, int32_t pixel) {
    if (value > best || (isnan(value) && !isnan(best))) {
      best = value;
      index = pixel;
    }
  }

  // A best one of other pixels.
  __device__ void merge_best(float value, int32_t pixel) {
    if (pixel < 0) return;
    const bool equal = value == best || (isnan(value) && isnan(best));
    if (index < 0 || (equal ? pixel < index : value > best || isnan(value))) {
      best = value;
      index = pixel;
    }
  }

  // Make weights relative to a larger cosine. NaN stays.
  __device__ __forceinline__ void raise(float to, double steepness) {
    if (!(to > top)) return;
    if (top > -kInfinity) {
      const double by = static_cast<double>(top) - static_cast<double>(to), factor = ::exp2(by * steepness);
      weighted = factor * (weighted + total * by);
      total *= factor;
    }
    top = to;
  }

  __device__ void merge(const State& other, Reduction reduction, double steepness) {
    merge_best(other.best, other.index);
    State b = other;
    if (reduction == Reduction::softmax) {
      raise(b.top, steepness);
      b.raise(top, steepness);
    }
    total += b.total;
    weighted += b.weighted;
  }

  // Of "softmax", where cosines are `scale` times what this holds: the value, and log2 of the sum over j of
  // 2^((cosine_j - value) * steepness).
  __device__ __forceinline__ float mean(double scale, double steepness,
                                        // outputs
                                        float* log_total) const {
    const auto value = static_cast<float>((static_cast<double>(top) + weighted / total) * scale);
    // As backward has the cosine, rounded: of one that takes all, `above` is 0 there and here.
    const auto rounded = static_cast<float>(static_cast<double>(top) * scale);
    const double above = static_cast<double>(rounded) - static_cast<double>(value);
    *log_total = static_cast<float>(::log2(total) + above * steepness);
    return value;
  }
};

static_assert(sizeof(State) == kStateBytes);

// Winners of "topk" as numbers of 64 bits that are the larger, the better: a cosine, then the lowest index.
__device__ __forceinline__ int64_t pack_winner(float value, int32_t pixel) {
  // NaN is better than all cosines, and stands as inf; -0 is no worse than 0.
  const uint32_t bits = __float_as_uint(isnan(value) ? kInfinity : value + 0.0f);
  const uint32_t rank = (bits & 0x80000000u) != 0 ? ~bits : bits ^ 0x80000000u;
  // As signed numbers, so that winners and their indices may lie in the same memory.
  return static_cast<int64_t>(static_cast<uint64_t>(rank ^ 0x80000000u) << 32 |
                              (0xffffffffu - static_cast<uint32_t>(pixel)));
}

__device__ __forceinline__ float value_of(int64_t winner) {
  const uint32_t rank = static_cast<uint32_t>(static_cast<uint64_t>(winner) >> 32) ^ 0x80000000u;
  return __uint_as_float((rank & 0x80000000u) != 0 ? rank ^ 0x80000000u : ~rank);
}

__device__ __forceinline__ int32_t pixel_of(int64_t winner) {
  return static_cast<int32_t>(0xffffffffu -
                              static_cast<uint32_t>(static_cast<uint64_t>(winner) & 0xffffffffu));
}

// A heap of the k best, the worst of them at the root.
struct Heap {
  int64_t* at;
  int64_t k, count;

  __device__ bool wants(int64_t winner) const { return count < k || winner > at[0]; }

  // Let `winner` sink from `place` in a heap of `size`; before(a, b): a belongs nearer to the root.
  template <typename Before>
  __device__ void sink(int64_t place, int64_t size, int64_t winner, const Before& before) {
    for (;;) {
      int64_t below = 2 * place + 1;
      if (below >= size) break;
      if (below + 1 < size && before(at[below + 1], at[below])) ++below;
      if (!before(at[below], winner)) break;
      at[place] = at[below];
      place = below;
    }
    at[place] = winner;
  }

  __device__ void push(int64_t winner) {
    const auto worse = [](int64_t a, int64_t b) { return a < b; };
    if (count == k) return sink(0, count, winner, worse);
    int64_t place = count++;
    while (place > 0 && winner < at[(place - 1) / 2]) {
      at[place] = at[(place - 1) / 2];
      place = (place - 1) / 2;
    }
    at[place] = winner;
  }

  // By index, ascending: an order that does not depend on how they came.
  __device__ void sort_by_index() {
    const auto later = [](int64_t a, int64_t b) { return pixel_of(a) > pixel_of(b); };
    for (int64_t place = count / 2; place-- > 0;) sink(place, count, at[place], later);
    for (int64_t size = count; size-- > 1;) {
      const int64_t last = at[size];
      at[size] = at[0];
      sink(0, size, last, later);
    }
  }
};

// Of "topk": the winners, sorted in place, become indices. `winners` are `count`, of k.
__device__ inline void finish_winners(Heap& heap,
                                      // outputs
                                      float* value, int32_t* best) {
  heap.sort_by_index();
  double sum = 0.0;
  float most = -kInfinity;
  for (int64_t i = 0; i < heap.count; ++i) {
    const float one = value_of(heap.at[i]);
    const int32_t pixel = pixel_of(heap.at[i]);
    sum += static_cast<double>(one);
    if (one > most) {
      most = one;
      *best = pixel;
    }
    heap.at[i] = pixel;
  }
  for (int64_t i = heap.count; i < heap.k; ++i) heap.at[i] = -1;
  *value = most == kInfinity ? std::numeric_limits<float>::quiet_NaN()
                             : static_cast<float>(sum / static_cast<double>(heap.count));
}

}  // namespace cisc::cross_similarity
