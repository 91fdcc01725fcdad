// The reduction of a sweep that screens: of products of int8 rows, which guide pixels can be the best of a
// query pixel. See cross_similarity_bounds.h for V and W.
#pragma once

#include "cross_similarity_reduce.cuh"

namespace cisc::cross_similarity::reduce {

constexpr int kListed = 14;   // candidates of a row that a thread has at a time
constexpr int kStaged = 3;    // the first of the named barriers of groups whose steps are in shared memory
constexpr int kStagings = 2;  // tiles whose steps are there: one group's threads may be a tile apart

struct alignas(8) Candidate {
  float most;  // V
  int32_t position;
};

// Columns of a row whose V is above the largest W so far, in lists in shared memory: each thread has one for
// each of its rows. A list that is full is rid of those that a larger W has since ruled out, then of that
// with the least V: what was lost matters only if it is not ruled out in the end. kThreads: of a block, that
// multiply; kColumns: of a tile
template <int kThreads, int kColumns>
struct Screen {
  static constexpr int kRowTiles = 1;
  static constexpr int kListBytes = kListed * 2 * kThreads * static_cast<int>(sizeof(Candidate));
  static constexpr int kStepBytes = kColumns * static_cast<int>(sizeof(Step));
  static constexpr int kBytes = kListBytes + kThreads / kWarpGroup * kStagings * kStepBytes;

  static_assert(kColumns == 2 * kWarpGroup, "a thread brings two steps");
  static_assert(4 * kListed <= kCandidates, "the lists of a row");

  __device__ explicit Screen(const Sweep&) {}

  __device__ __forceinline__ static const Step* scales(const Sweep& sweep) { return sweep.guide_steps; }

  // memory: kBytes of the block's; thread: of those that multiply
  __device__ __forceinline__ void take_memory(unsigned char* memory, int thread) {
    lists_ = reinterpret_cast<Candidate*>(memory) + thread;
    group_ = thread / kWarpGroup;
    steps_ = reinterpret_cast<Step*>(memory + kListBytes) + group_ * kStagings * kColumns;
    thread_ = thread % kWarpGroup;
  }

  __device__ __forceinline__ void begin(const Place& place) {
    place_ = place;
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      least_[half] = lost_[half] = -kInfinity;
      count_[half] = 0;
    }
  }

  __device__ __forceinline__ void bounds(int half, const Bounds& bounds) { bounds_[half] = bounds; }

  __device__ __forceinline__ void segment(int32_t first, int32_t behind) {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      // Nothing is above infinity.
      bar_[half] = place_.meets(0, half, first, behind) ? ::fmaxf(least_[half], lost_[half]) : kInfinity;
    }
  }

  // The next tile's steps are on their way while its products are made.
  __device__ __forceinline__ void ahead(const Step* steps) {
    CISC_UNROLL
    for (int i = 0; i < 2; ++i) ahead_[i] = steps[2 * thread_ + i];
  }

  template <int kSums>
  __device__ __forceinline__ void tile(int32_t (&sums)[1][kSums], int32_t first, int columns) {
    static_assert(2 * kSums == kColumns, "a tile");
    Step* steps = steps_ + staging_ * kColumns;
    staging_ ^= 1;
    write_pack(steps + 2 * thread_, Pack<Step, 2>{{ahead_[0], ahead_[1]}});
#ifdef CISC_HOPPER
    meet(kStaged + group_, kWarpGroup);
#endif
    steps += place_.column();
    CISC_UNROLL
    for (int strip = 0; strip < kSums / 16; ++strip) {
      Step step[kStrip];
      CISC_UNROLL
      for (int i = 0; i < kStrip; i += 2) {
        const auto two = read_pack<2>(steps + strip * 4 * 8 + i / 2 * 8);
        step[i] = two.at[0];
        step[i + 1] = two.at[1];
      }
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        float values[kStrip];
        CISC_UNROLL
        for (int i = 0; i < kStrip; ++i) {
          values[i] = bounds_[half].most(sums[0][sum_of(strip, half, i)], step[i]);
        }
        if (!passes<false>(values, bar_[half])) continue;
        unsigned above = 0;
        CISC_UNROLL
        for (int i = 0; i < kStrip; ++i) above |= values[i] > bar_[half] ? 1u << i : 0u;
        // Few of them are, mostly one.
        CISC_ROLL
        while (above != 0) {
          const int i = __ffs(above) - 1, at = strip * 4 * 8 + i / 2 * 8 + i % 2;
          above &= above - 1;
          // Behind the last column something else lies.
          if (at + place_.column() < columns)
            take(half, pick(values, i), steps[at].error, first + place_.column() + at);
        }
      }
    }
    share();
  }

  // The cosine of each row's candidate with the largest V is computed, and rules out what is below. All
  // threads of a warp.
  __device__ __forceinline__ void sharpen(const Sweep& p, const Group& group) {
    share();
    const int64_t image = group.image;
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      Candidate top{-kInfinity, -1};
      CISC_ROLL
      for (int i = 0; i < count_[half]; ++i) {
        if (listed(half, i).most > top.most) top = listed(half, i);
      }
      CISC_UNROLL
      for (int bits = 1; bits < 4; bits *= 2) {
        const float most = __shfl_xor_sync(kAll, top.most, bits);
        const int32_t position = __shfl_xor_sync(kAll, top.position, bits);
        if (most > top.most || (most == top.most && position > top.position)) top = {most, position};
      }
      // Four rows at a time have eight threads each.
      float cosine = -kInfinity;
      CISC_ROLL
      for (int first = 0; first < 8; first += kWarp / kRowLanes) {
        const int row = first + place_.lane / kRowLanes;
        const int32_t position = __shfl_sync(kAll, top.position, 4 * row);
        const bool there = position >= 0;
        const int64_t other[1] = {image * p.guide_pixels + (there ? position : 0)};
        float value[1];
        const int64_t own_row = image * p.query_pixels + (there ? place_.first + row + 8 * half : 0);
        if (p.packed.shape.split) {
          p.packed.cosines<true>(own_row, other, value);
        } else {
          p.packed.cosines<false>(own_row, other, value);
        }
        const int own = place_.lane / 4 - first;  // of this thread's candidates
        const float here = __shfl_sync(kAll, value[0], (own & 3) * kRowLanes);
        if (own == (own & 3)) cosine = here;
      }
      // One that is NaN is infinite already.
      if (top.position >= 0 && top.most < kInfinity) {
        const Step query = p.query_steps[image * p.query_pixels + place_.position(0, half)];
        least_[half] = ::fmaxf(least_[half], Bounds::of_cosine(query, cosine, p.slack + p.packed.error));
      }
      keep(half);
    }
  }

  // write(half, state, from): of a row; this thread has the row's candidates from that number on
  template <typename Write>
  __device__ __forceinline__ void end(const Write& write) const {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      float top = -kInfinity;
      CISC_ROLL
      for (int i = 0; i < count_[half]; ++i) top = ::fmaxf(top, listed(half, i).most);
      State state = State::none();
      state.best = least_[half];
      state.index = 0;
      // Each of the four threads that share the row counts those in front.
      const int open = lost_[half] > least_[half] ? 1 : 0, own = count_[half], quad = place_.lane % 4;
      int32_t from = 0;
      CISC_UNROLL
      for (int thread = 0; thread < 4; ++thread) {
        const int lane = place_.lane - quad + thread;
        const int32_t count = __shfl_sync(kAll, own, lane);
        from += thread < quad ? count : 0;
        state.index += count;
        state.top = ::fmaxf(state.top, __shfl_sync(kAll, top, lane));
        state.open |= __shfl_sync(kAll, open, lane);
      }
      write(half, state, from);
    }
  }

  __device__ __forceinline__ int count(int half) const { return count_[half]; }
  __device__ __forceinline__ Candidate& listed(int half, int i) const {
    return lists_[(i * 2 + half) * kThreads];
  }

 private:
  __device__ __forceinline__ static float pick(const float (&values)[kStrip], int i) {
    const bool one = (i & 1) != 0, two = (i & 2) != 0, four = (i & 4) != 0;
    const float a = one ? values[1] : values[0], b = one ? values[3] : values[2];
    const float c = one ? values[5] : values[4], d = one ? values[7] : values[6];
    const float low = two ? b : a, high = two ? d : c;
    return four ? high : low;
  }

  __device__ __forceinline__ void take(int half, float most, float error, int32_t position) {
    // The bar may have been raised since.
    if (!(most > bar_[half])) return;
    const float least = bounds_[half].least(most, error);
    least_[half] = ::fmaxf(least_[half], least);
    bar_[half] = ::fmaxf(bar_[half], least);
    if (count_[half] == kListed) keep(half);
    int place = count_[half];
    if (place == kListed) {
      float lost = most;
      CISC_ROLL
      for (int i = 0; i < kListed; ++i) {
        if (listed(half, i).most < lost) {
          lost = listed(half, i).most;
          place = i;
        }
      }
      lost_[half] = ::fmaxf(lost_[half], lost);
      bar_[half] = ::fmaxf(bar_[half], lost);
      if (place == kListed) return;
    } else {
      ++count_[half];
    }
    listed(half, place) = {most, position};
  }

  // Rid the list of those that are ruled out.
  __device__ __forceinline__ void keep(int half) {
    int kept = 0;
    CISC_ROLL
    for (int i = 0; i < count_[half]; ++i) {
      const Candidate candidate = listed(half, i);
      if (candidate.most >= least_[half]) listed(half, kept++) = candidate;
    }
    count_[half] = kept;
  }

  // The four threads of a row tell each other of the largest W.
  __device__ __forceinline__ void share() {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      CISC_UNROLL
      for (int bits = 1; bits < 4; bits *= 2) {
        least_[half] = ::fmaxf(least_[half], __shfl_xor_sync(kAll, least_[half], bits));
      }
      bar_[half] = ::fmaxf(bar_[half], least_[half]);
    }
  }

  Place place_;
  Candidate* lists_ = nullptr;  // [kListed,2,kThreads], from this thread's on
  Step* steps_ = nullptr;       // [kStagings,kColumns], of the group
  int group_ = 0, thread_ = 0, staging_ = 0;
  Step ahead_[2];
  Bounds bounds_[2];
  float least_[2], bar_[2], lost_[2];  // the largest W; what V has to be above; the largest V that was lost
  int32_t count_[2];
};

template <int kThreads, int kColumns>
__device__ __forceinline__ void prepare(const Sweep& p, const Group& group, const Place& place,
                                        Screen<kThreads, kColumns>& reducer) {
  each_row<1>(place, [&](int, int half, int32_t position) {
    const int64_t row = static_cast<int64_t>(group.image) * p.query_pixels + position;
    reducer.bounds(half, position < p.query_pixels ? Bounds::of(p.query_steps[row], p.slack) : Bounds{});
  });
}

template <int kThreads, int kColumns>
__device__ __forceinline__ void finish(const Sweep& p, const Group& group, const Place& place,
                                       Screen<kThreads, kColumns>& reducer) {
  reducer.sharpen(p, group);
  reducer.end([&](int half, const State& state, int32_t from) {
    const int64_t result = group.result(p, place.position(0, half));
    if (place.lane % 4 == 0) p.states[result] = state;
    CISC_ROLL
    for (int i = 0; i < reducer.count(half); ++i) {
      p.candidates[result * kCandidates + from + i] = reducer.listed(half, i).position;
    }
  });
}

}  // namespace cisc::cross_similarity::reduce
