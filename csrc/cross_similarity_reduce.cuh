// Reductions of products in the accumulators of tensor cores: for 16 rows of a warp and a number of columns,
// of which a thread has two rows and every fourth pair of columns (fragments::row, column).
//
// A reducer lives in registers while a group of query rows meets the guide:
//   scales(sweep)        what it is to have of the guide's rows
//   begin(rows)          a new group; rows.position(m, half) are the query's positions
//   segment(first, behind)  those positions meet the next tiles; others let them pass
//   tile(sums, scales, first, columns)  a tile's products; it begins at position `first`, and has `columns`;
//                        scales: ScalesThere or what has more in registers
//   end(write)           the four threads of a row put together what they have; one of them writes it
#pragma once

#include "cross_similarity_sweep.cuh"

namespace cisc::cross_similarity::reduce {

constexpr int kStrip = 8;  // products of a row that are looked at together: of four neighbouring m16n8

#ifdef CISC_SIMT
#define CISC_UNROLL
#define CISC_ROLL
#else
#define CISC_UNROLL _Pragma("unroll")
#define CISC_ROLL _Pragma("unroll 1")
#endif

// The same value, but the compiler does not know that.
template <typename T>
__device__ __forceinline__ const T* anew(const T* address) {
#ifndef CISC_SIMT
  asm volatile("" : "+l"(address));
#endif
  return address;
}
__device__ __forceinline__ int32_t anew(int32_t value) {
#ifndef CISC_SIMT
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Where a thread's rows and columns lie.
struct Place {
  int32_t first;  // position of the first row of the thread's warp
  int32_t pitch;  // positions from one tile of rows to the next
  int lane;

  __device__ __forceinline__ int32_t position(int m, int half) const {
    return first + m * pitch + fragments::row(lane, 2 * half);
  }
  __device__ __forceinline__ int column() const { return fragments::column(lane, 0); }

  // Whether that position is of a segment.
  __device__ __forceinline__ bool meets(int m, int half, int32_t segment_first, int32_t behind) const {
    return position(m, half) >= segment_first && position(m, half) < behind;
  }
};

// Which rows a segment has.
template <int kRowTiles>
__device__ __forceinline__ void set_meets(const Place& place, int32_t first, int32_t behind,
                                          // outputs
                                          bool (&meets)[kRowTiles][2]) {
  CISC_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) meets[m][half] = place.meets(m, half, first, behind);
  }
}

// Of a thread's sums of a tile of rows, number i of a strip.
__device__ __forceinline__ constexpr int sum_of(int strip, int half, int i) {
  return strip * 2 * kStrip + i / 2 * 4 + half * 2 + i % 2;
}

// The largest and the least of the four threads that share a row.
__device__ __forceinline__ float largest_of_row(float value) {
  value = ::fmaxf(value, __shfl_xor_sync(kAll, value, 1));
  return ::fmaxf(value, __shfl_xor_sync(kAll, value, 2));
}
__device__ __forceinline__ float least_of_row(float value) {
  value = ::fminf(value, __shfl_xor_sync(kAll, value, 1));
  return ::fminf(value, __shfl_xor_sync(kAll, value, 2));
}

// What stands in the sums for columns behind the last one.
template <int kRowTiles, int kSums>
__device__ __forceinline__ void hide_columns(int column, int columns, float value,
                                             // outputs
                                             float (&sums)[kRowTiles][kSums]) {
  CISC_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const bool outside = column + i / 4 * 8 + i % 2 >= columns;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) sums[m][i] = outside ? value : sums[m][i];
  }
}

// Scales of the columns of a strip that a thread has.
struct Scales {
  float at[kStrip];

  // from: of the strip's first column that the thread has
  __device__ __forceinline__ static Scales of(const float* from) {
    Scales s;
    CISC_UNROLL
    for (int i = 0; i < kStrip; ++i) s.at[i] = __ldg(from + i / 2 * 8 + i % 2);
    return s;
  }
};

// Those of a tile, read as they are needed. from: of the thread's first column
class ScalesThere {
 public:
  __device__ __forceinline__ explicit ScalesThere(const float* from) : from_(from) {}

  __device__ __forceinline__ Scales strip(int number) const { return Scales::of(from_ + number * 32); }

 private:
  const float* from_;
};

// The first strip's in registers, read while the tile's products are made.
class ScalesAhead {
 public:
  __device__ __forceinline__ explicit ScalesAhead(const float* from)
      : from_(from), first_(Scales::of(from)) {}

  __device__ __forceinline__ Scales strip(int number) const {
    return number == 0 ? first_ : Scales::of(from_ + number * 32);
  }

 private:
  const float* from_;
  Scales first_;
};

// All of them.
template <int kSums>
class ScalesHeld {
 public:
  __device__ __forceinline__ explicit ScalesHeld(const float* from) {
    CISC_UNROLL
    for (int strip = 0; strip < kSums / 16; ++strip) strips_[strip] = Scales::of(from + strip * 32);
  }

  __device__ __forceinline__ const Scales& strip(int number) const { return strips_[number]; }

 private:
  Scales strips_[kSums / 16];
};

// f(strip's number, its first column for this thread, scales) for all strips of a tile
template <int kSums, typename OfTile, typename Function>
__device__ __forceinline__ void each_strip(int column, const OfTile& scales, const Function& f) {
  Scales now = scales.strip(0);
  CISC_UNROLL
  for (int strip = 0; strip < kSums / 16; ++strip) {
    // The next one's come while this one is looked at.
    const Scales next = strip + 1 < kSums / 16 ? scales.strip(strip + 1) : now;
    f(strip, strip * 32 + column, now);
    now = next;
  }
}

// NaN becomes more than any cosine.
__device__ __forceinline__ float rank_of(float value) { return isnan(value) ? kInfinity : value; }

// NaN if one of them is.
__device__ __forceinline__ float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return max(a, b);
#else
  return a > b || isnan(a) ? a : b;
#endif
}

__device__ __forceinline__ float largest(const float (&values)[kStrip]) {
  return larger(larger(larger(values[0], values[1]), larger(values[2], values[3])),
                larger(larger(values[4], values[5]), larger(values[6], values[7])));
}

// The largest as signed bits, right where it is not negative.
__device__ __forceinline__ int32_t largest_bits(const float (&values)[kStrip]) {
  int32_t bits[kStrip];
  CISC_UNROLL
  for (int i = 0; i < kStrip; ++i) bits[i] = __float_as_int(values[i]);
  return __vimax3_s32(__vimax3_s32(bits[0], bits[1], bits[2]), __vimax3_s32(bits[3], bits[4], bits[5]),
                      __vimax3_s32(bits[6], bits[7], bits[7]));
}

// Whether a strip may have a product above `bar`.
template <bool kBits>
__device__ __forceinline__ bool passes(const float (&values)[kStrip], float bar) {
  if constexpr (kBits) return largest_bits(values) > __float_as_int(bar) || bar < 0.0f;
  return !(largest(values) <= bar);
}

template <int kRowTiles_, bool kBits>
struct Max {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr float kHidden = -kInfinity;

  __device__ explicit Max(const Sweep&) {}

  __device__ __forceinline__ static const float* scales(const Sweep& sweep) { return sweep.guide_scale; }
  __device__ __forceinline__ int column() const { return place_.column(); }

  __device__ __forceinline__ void begin(const Place& place) {
    place_ = place;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        best_[m][half] = -kInfinity;
        index_[m][half] = -1;
      }
    }
  }

  __device__ __forceinline__ void segment(int32_t first, int32_t behind) {
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        // Nothing is above infinity.
        bar_[m][half] = place_.meets(m, half, first, behind) ? best_[m][half] : kInfinity;
      }
    }
  }

  template <int kSums, typename OfTile>
  __device__ __forceinline__ void tile(float (&sums)[kRowTiles][kSums], const OfTile& scales, int32_t first,
                                       int columns) {
    if (columns < kSums * 2) hide_columns(place_.column(), columns, kHidden, sums);
    each_strip<kSums>(place_.column(), scales, [&](int strip, int column, const Scales& scale) {
      CISC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        CISC_UNROLL
        for (int half = 0; half < 2; ++half) {
          float values[kStrip];
          CISC_UNROLL
          for (int i = 0; i < kStrip; ++i) {
            values[i] = sums[m][sum_of(strip, half, i)] * scale.at[i];
          }
          if (!passes<kBits>(values, bar_[m][half])) continue;
          CISC_UNROLL
          for (int i = 0; i < kStrip; ++i) {
            const float value = rank_of(values[i]);
            if (!(value > bar_[m][half])) continue;
            bar_[m][half] = best_[m][half] = value;
            index_[m][half] = first + column + i / 2 * 8 + i % 2;
          }
        }
      }
    });
  }

  // write(m, half, what): into the state of a row
  template <typename Write>
  __device__ __forceinline__ void end(const Write& write) {
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        State state = State::none();
        state.best = best_[m][half];
        state.index = index_[m][half];
        CISC_UNROLL
        for (int bits = 1; bits < 4; bits *= 2) {
          const float best = __shfl_xor_sync(kAll, state.best, bits);
          const int32_t index = __shfl_xor_sync(kAll, state.index, bits);
          state.merge_best(best, index);
        }
        if (place_.lane % 4 == 0) write(m, half, state);
      }
    }
  }

 private:
  Place place_;
  float best_[kRowTiles][2], bar_[kRowTiles][2];
  int32_t index_[kRowTiles][2];
};

// The best few of each row behind those that were found before, in the order of pack_winner.
template <int kRowTiles_>
struct TopK {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr float kHidden = -kInfinity;

  __device__ explicit TopK(const Sweep&) {}

  __device__ __forceinline__ static const float* scales(const Sweep& sweep) { return sweep.guide_scale; }
  __device__ __forceinline__ int column() const { return place_.column(); }

  __device__ __forceinline__ void begin(const Place& place) {
    place_ = place;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        bound_[m][half] = kInfinity;
        bound_index_[m][half] = -1;
        CISC_UNROLL
        for (int i = 0; i < kFoundAtOnce; ++i) {
          value_[m][half][i] = -kInfinity;
          index_[m][half][i] = -1;
        }
      }
    }
  }

  // winner: the last of those that were found before, or -1 if all were found
  __device__ __forceinline__ void bound(int m, int half, int64_t winner) {
    bound_[m][half] = winner == -1 ? -kInfinity : value_of(winner);
    bound_index_[m][half] = winner == -1 ? INT32_MAX : pixel_of(winner);
  }

  __device__ __forceinline__ void segment(int32_t first, int32_t behind) {
    set_meets(place_, first, behind, meets_);
  }

  template <int kSums, typename OfTile>
  __device__ __forceinline__ void tile(float (&sums)[kRowTiles][kSums], const OfTile& scales, int32_t first,
                                       int columns) {
    if (columns < kSums * 2) hide_columns(place_.column(), columns, kHidden, sums);
    // A tile's columns lie behind what it is compared with: of equal ones they are the worse.
    float bar[kRowTiles][2];
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float shared = shared_bar(m, half);  // by all threads of the warp
        bar[m][half] = meets_[m][half] ? shared : kInfinity;
      }
    }
    each_strip<kSums>(place_.column(), scales, [&](int strip, int column, const Scales& scale) {
      CISC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        CISC_UNROLL
        for (int half = 0; half < 2; ++half) {
          float values[kStrip];
          CISC_UNROLL
          for (int i = 0; i < kStrip; ++i) {
            values[i] = sums[m][sum_of(strip, half, i)] * scale.at[i];
          }
          float& least = bar[m][half];
          if (!passes<false>(values, least)) continue;
          // Code of one product for all: that of eight would not fit the instruction cache.
          CISC_ROLL
          for (int i = 0; i < kStrip; ++i) {
            const float value = rank_of(values[0]);
            CISC_UNROLL
            for (int next = 1; next < kStrip; ++next) values[next - 1] = values[next];
            if (!(value > least)) continue;
            const int32_t index = first + column + i / 2 * 8 + i % 2;
            const bool found =
                value > bound_[m][half] || (value == bound_[m][half] && index <= bound_index_[m][half]);
            if (!found) insert<true>(value, index, value_[m][half], index_[m][half]);
            least = ::fmaxf(least, value_[m][half][kFoundAtOnce - 1]);
          }
        }
      }
    });
  }

  // write(m, half, state, values, indices): of a row
  template <typename Write>
  __device__ __forceinline__ void end(const Write& write) {
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        CISC_UNROLL
        for (int bits = 1; bits < 4; bits *= 2) {
          float values[kFoundAtOnce];
          int32_t indices[kFoundAtOnce];
          CISC_UNROLL
          for (int i = 0; i < kFoundAtOnce; ++i) {
            values[i] = __shfl_xor_sync(kAll, value_[m][half][i], bits);
            indices[i] = __shfl_xor_sync(kAll, index_[m][half][i], bits);
          }
          CISC_UNROLL
          for (int i = 0; i < kFoundAtOnce; ++i) {
            if (indices[i] >= 0) insert<false>(values[i], indices[i], value_[m][half], index_[m][half]);
          }
        }
        State state = State::none();
        state.index = 0;
        CISC_UNROLL
        for (int i = 0; i < kFoundAtOnce; ++i) state.index += index_[m][half][i] >= 0 ? 1 : 0;
        if (place_.lane % 4 == 0) write(m, half, state, value_[m][half], index_[m][half]);
      }
    }
  }

 private:
  // What a winner of the row is above, by what its four threads have in front of a tile: of one of them all
  // eight, of two the best four, or of each the best two.
  __device__ __forceinline__ float shared_bar(int m, int half) const {
    static_assert(kFoundAtOnce == 8, "eight are as good or better");
    const float (&values)[kFoundAtOnce] = value_[m][half];
    const float of_two = ::fminf(values[3], __shfl_xor_sync(kAll, values[3], 1));
    return ::fmaxf(least_of_row(values[1]), largest_of_row(::fmaxf(values[7], of_two)));
  }

  // Best first; of equal ones the lowest index: kLater, that of those that are there.
  template <bool kLater>
  __device__ __forceinline__ static void insert(float value, int32_t index,
                                                // outputs
                                                float (&values)[kFoundAtOnce],
                                                int32_t (&indices)[kFoundAtOnce]) {
    bool here = false;
    CISC_UNROLL
    for (int i = 0; i < kFoundAtOnce; ++i) {
      here = here || value > values[i] || (!kLater && value == values[i] && index < indices[i]);
      // From its place on, all move on by one.
      const float out = values[i];
      const int32_t of = indices[i];
      values[i] = here ? value : out;
      indices[i] = here ? index : of;
      value = here ? out : value;
      index = here ? of : index;
    }
  }

  Place place_;
  float value_[kRowTiles][2][kFoundAtOnce], bound_[kRowTiles][2];
  int32_t index_[kRowTiles][2][kFoundAtOnce], bound_index_[kRowTiles][2];
  bool meets_[kRowTiles][2];
};

// Weights relative to a cosine that no other of the thread's columns is far above. A row's numbers are
// products with the guide's unit vectors; its own length is put in at the end.
template <int kRowTiles_>
struct Softmax {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr float kHidden = -1e30f;  // no weight, and finite, as 0 times it is to be 0
  static constexpr float kLeast = -1e20f;   // products are above, hidden ones below
  // More than the weights of a tile's columns in a thread, none above 1: seven bits, that arguments of exp2
  // may lose.
  static constexpr float kMost = 128.0f;

  __device__ explicit Softmax(const Sweep& sweep) : steepness_(sweep.steepness) {}

  __device__ __forceinline__ static const float* scales(const Sweep& sweep) { return sweep.guide_scale; }
  __device__ __forceinline__ int column() const { return place_.column(); }

  __device__ __forceinline__ void begin(const Place& place) {
    place_ = place;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        total_[m][half] = weighted_[m][half] = {};
        top_[m][half] = -kInfinity;
        slope_[m][half] = 0.0f;
      }
    }
  }

  // scale: times which the row is a unit vector
  __device__ __forceinline__ void scale(int m, int half, float scale) {
    slope_[m][half] = scale * steepness_;
  }

  __device__ __forceinline__ void segment(int32_t first, int32_t behind) {
    set_meets(place_, first, behind, meets_);
  }

  template <int kSums, typename OfTile>
  __device__ __forceinline__ void tile(float (&sums)[kRowTiles][kSums], const OfTile& scales, int32_t,
                                       int columns) {
    static_assert(kSums / 2 < static_cast<int>(kMost), "the weights of a tile");
    if (columns < kSums * 2) hide_columns(place_.column(), columns, kHidden, sums);
    float totals[kRowTiles][2], weighteds[kRowTiles][2];
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        totals[m][half] = weighteds[m][half] = 0.0f;
        // With a branch for each, the compiler takes one row after the other, and few registers.
        if (!meets_[m][half]) continue;
        each_strip<kSums>(0, scales, [&](int strip, int, const Scales& scale) {
          CISC_UNROLL
          for (int i = 0; i < kStrip; ++i) sums[m][sum_of(strip, half, i)] *= scale.at[i];
        });
        weigh(m, half, sums[m], totals[m][half], weighteds[m][half]);
      }
    }
    bool far = false;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        far = far || (meets_[m][half] && (totals[m][half] > kMost || top_[m][half] == -kInfinity));
      }
    }
    // With a row's first tile, and now and then.
    if (far && raise(sums)) {
      CISC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        CISC_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (meets_[m][half]) weigh(m, half, sums[m], totals[m][half], weighteds[m][half]);
        }
      }
    }
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (!meets_[m][half]) continue;
        total_[m][half].add(totals[m][half]);
        weighted_[m][half].add(weighteds[m][half]);
      }
    }
  }

  template <typename Write>
  __device__ __forceinline__ void end(const Write& write) {
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        State state = State::none();
        state.top = top_[m][half];
        state.total = total_[m][half].exact();
        state.weighted = weighted_[m][half].exact();
        CISC_UNROLL
        for (int bits = 1; bits < 4; bits *= 2) {
          State other = State::none();
          other.top = __shfl_xor_sync(kAll, state.top, bits);
          other.total = __shfl_xor_sync(kAll, state.total, bits);
          other.weighted = __shfl_xor_sync(kAll, state.weighted, bits);
          state.merge(other, Reduction::softmax, static_cast<double>(slope_[m][half]));
        }
        if (place_.lane % 4 == 0) write(m, half, state);
      }
    }
  }

 private:
  // Weights of a row's columns in the tile.
  template <int kSums>
  __device__ __forceinline__ void weigh(int m, int half, const float (&sums)[kSums],
                                        // outputs
                                        float& totals, float& weighteds) const {
    const float top = top_[m][half] > -kInfinity ? top_[m][half] : 0.0f;
    CISC_UNROLL
    for (int strip = 0; strip < kSums / 16; ++strip) {
      float total = 0.0f, weighted = 0.0f;
      CISC_UNROLL
      for (int i = 0; i < kStrip; ++i) {
        // The largest is 0 above itself: the slope may be huge.
        const float above = sums[sum_of(strip, half, i)] - top;
        const float weight = fast_exp2(above * slope_[m][half]);
        total = i == 0 ? weight : total + weight;
        weighted = i == 0 ? weight * above : fmaf(weight, above, weighted);
      }
      totals = strip == 0 ? total : totals + total;
      weighteds = strip == 0 ? weighted : weighteds + weighted;
    }
  }

  // Make the weights of rows relative to the largest product that there is now; whether one is larger. No
  // weight of this tile is then above 1.
  template <int kSums>
  __device__ __forceinline__ bool raise(const float (&sums)[kRowTiles][kSums]) {
    bool raised = false;
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        float to = -kInfinity;
        CISC_UNROLL
        for (int i = 0; i < kSums / 2; ++i) to = ::fmaxf(to, sums[m][sum_of(0, half, i)]);
        if (!meets_[m][half] || !(to > top_[m][half]) || to < kLeast) continue;
        if (top_[m][half] > -kInfinity) {
          const float by = top_[m][half] - to, factor = fast_exp2(by * slope_[m][half]);
          weighted_[m][half].shift(factor, by, total_[m][half]);
          total_[m][half].shift(factor, 0.0f, {});
        }
        top_[m][half] = to;
        raised = true;
      }
    }
    return raised;
  }

  Place place_;
  float steepness_;
  Sum total_[kRowTiles][2], weighted_[kRowTiles][2];
  float top_[kRowTiles][2], slope_[kRowTiles][2];  // slope: of the exponent, in a product
  bool meets_[kRowTiles][2];
};

// A group of query rows that meets a part of the guide.
struct Group {
  int32_t image, unit, split, first;  // first: position

  __device__ __forceinline__ int64_t row(const Sweep& p, int32_t position) const {
    return static_cast<int64_t>(unit) * p.rows + position - first;
  }
  __device__ __forceinline__ int64_t result(const Sweep& p, int32_t position) const {
    return (static_cast<int64_t>(unit) * p.splits + split) * p.rows + position - first;
  }
};

// f(m, half, position) for a thread's rows
template <int kRowTiles, typename Function>
__device__ __forceinline__ void each_row(const Place& place, const Function& f) {
  CISC_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) f(m, half, place.position(m, half));
  }
}

// What a reducer has to know of its rows beforehand.
template <int kRowTiles, bool kBits>
__device__ __forceinline__ void prepare(const Sweep&, const Group&, const Place&, Max<kRowTiles, kBits>&) {}

template <int kRowTiles>
__device__ __forceinline__ void prepare(const Sweep& p, const Group& group, const Place& place,
                                        TopK<kRowTiles>& reducer) {
  if (p.bounds == nullptr) return;
  each_row<kRowTiles>(place, [&](int m, int half, int32_t position) {
    reducer.bound(m, half, p.bounds[group.row(p, position)]);
  });
}

template <int kRowTiles>
__device__ __forceinline__ void prepare(const Sweep& p, const Group& group, const Place& place,
                                        Softmax<kRowTiles>& reducer) {
  each_row<kRowTiles>(place, [&](int m, int half, int32_t position) {
    const bool inside = position < p.query_pixels;
    reducer.scale(
        m, half,
        inside ? p.query_scale[static_cast<int64_t>(group.image) * p.query_pixels + position] : 0.0f);
  });
}

template <typename Reducer>
__device__ __forceinline__ void finish(const Sweep& p, const Group& group, const Place& place,
                                       Reducer& reducer) {
  reducer.end([&](int m, int half, const State& state) {
    p.states[group.result(p, place.position(m, half))] = state;
  });
}

template <int kRowTiles>
__device__ __forceinline__ void finish(const Sweep& p, const Group& group, const Place& place,
                                       TopK<kRowTiles>& reducer) {
  reducer.end([&](int m, int half, const State& state, const float (&values)[kFoundAtOnce],
                  const int32_t (&indices)[kFoundAtOnce]) {
    const int64_t result = group.result(p, place.position(m, half));
    p.states[result] = state;
    CISC_UNROLL
    for (int i = 0; i < kFoundAtOnce; ++i) {
      if (i < state.index) p.winners[result * kFoundAtOnce + i] = pack_winner(values[i], indices[i]);
    }
  });
}

}  // namespace cisc::cross_similarity::reduce
