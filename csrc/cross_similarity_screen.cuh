// The reduction of a sweep that screens: of products of int8 rows, which guide pixels can be the best of a
// query pixel. See cross_similarity_bounds.h for V and W.
#pragma once

#include "cross_similarity_reduce.cuh"

namespace cisc::cross_similarity::reduce {

constexpr int kListed = 16;  // candidates of a row that a thread has at a time

struct Candidate {
  float most;  // V
  int32_t position;
};

// Columns of a row whose V is above the largest W so far, in lists in shared memory: each thread has one for
// each of its rows. A list that is full is rid of those that a larger W has since ruled out; one that stays
// full leaves the row open. kThreads: that multiply, of a block
template <int kThreads>
struct Screen {
  static constexpr int kRowTiles = 1;
  static constexpr int kListBytes = kListed * 2 * kThreads * static_cast<int>(sizeof(Candidate));

  __device__ explicit Screen(const Sweep&) {}

  __device__ __forceinline__ static const Step* scales(const Sweep& sweep) { return sweep.guide_steps; }

  __device__ __forceinline__ void take_lists(unsigned char* lists, int thread) {
    lists_ = reinterpret_cast<Candidate*>(lists) + thread;
  }

  __device__ __forceinline__ void begin(const Place& place) {
    place_ = place;
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      least_[half] = -kInfinity;
      count_[half] = 0;
      open_[half] = false;
    }
  }

  __device__ __forceinline__ void bounds(int half, const Bounds& bounds) { bounds_[half] = bounds; }

  __device__ __forceinline__ void segment(int32_t first, int32_t behind) {
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t position = place_.position(0, half);
      // Nothing is above infinity.
      bar_[half] = position >= first && position < behind && !open_[half] ? least_[half] : kInfinity;
    }
  }

  template <int kSums>
  __device__ __forceinline__ void tile(int32_t (&sums)[1][kSums], const Step* steps, int32_t first,
                                       int columns) {
    CISC_UNROLL
    for (int strip = 0; strip < kSums / 16; ++strip) {
      const int column = strip * 4 * 8 + place_.column();
      Step step[kStrip];
      CISC_UNROLL
      for (int i = 0; i < kStrip; ++i) step[i] = steps[column + i / 2 * 8 + i % 2];
      CISC_UNROLL
      for (int half = 0; half < 2; ++half) {
        float values[kStrip];
        CISC_UNROLL
        for (int i = 0; i < kStrip; ++i) {
          values[i] = bounds_[half].most(sums[0][strip * 16 + i / 2 * 4 + half * 2 + i % 2], step[i]);
        }
        if (!passes<false>(values, bar_[half])) continue;
        unsigned above = 0;
        CISC_UNROLL
        for (int i = 0; i < kStrip; ++i) above |= values[i] > bar_[half] ? 1u << i : 0u;
        // Few of them are, mostly one.
        CISC_ROLL
        while (above != 0) {
          const int i = __ffs(above) - 1, at = column + i / 2 * 8 + i % 2;
          above &= above - 1;
          // Behind the last column something else lies.
          if (at < columns) take(half, pick(values, i), steps[at].error, first + at);
        }
      }
    }
    share();
  }

  // write(half, state, from, list): of a row; this thread has the row's candidates from that number on
  template <typename Write>
  __device__ __forceinline__ void end(const Write& write) {
    share();
    CISC_UNROLL
    for (int half = 0; half < 2; ++half) {
      keep(half);
      float top = -kInfinity;
      CISC_ROLL
      for (int i = 0; i < count_[half]; ++i) top = ::fmaxf(top, listed(half, i).most);
      State state = State::none();
      // Each of the four threads that share the row counts those in front.
      const int own = count_[half], quad = place_.lane % 4;
      int32_t from = 0;
      state.index = 0;
      CISC_UNROLL
      for (int thread = 0; thread < 4; ++thread) {
        const int lane = place_.lane - quad + thread;
        const int32_t count = __shfl_sync(kAll, own, lane);
        from += thread < quad ? count : 0;
        state.index += count;
        state.top = ::fmaxf(state.top, __shfl_sync(kAll, top, lane));
        state.open = __shfl_sync(kAll, open_[half] ? 1 : 0, lane) != 0 ? 1 : state.open;
      }
      state.best = least_[half];
      if (state.index > kCandidates) state.open = 1;
      if (state.open != 0) state.index = 0;
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
    if (least > least_[half]) least_[half] = bar_[half] = least;
    if (count_[half] == kListed) keep(half);
    if (count_[half] == kListed) {
      open_[half] = true;
      bar_[half] = kInfinity;
      return;
    }
    listed(half, count_[half]++) = {most, position};
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
  Bounds bounds_[2];
  float least_[2], bar_[2];  // the largest W; what V has to be above
  int32_t count_[2];
  bool open_[2];
};

template <int kThreads>
__device__ __forceinline__ void prepare(const Sweep& p, const Group& group, const Place& place,
                                        Screen<kThreads>& reducer) {
  each_row<1>(place, [&](int, int half, int32_t position) {
    const int64_t row = static_cast<int64_t>(group.image) * p.query_pixels + position;
    reducer.bounds(half, position < p.query_pixels ? Bounds::of(p.query_steps[row], p.slack) : Bounds{});
  });
}

template <int kThreads>
__device__ __forceinline__ void finish(const Sweep& p, const Group& group, const Place& place,
                                       Screen<kThreads>& reducer) {
  reducer.end([&](int half, const State& state, int32_t from) {
    const int64_t result = group.result(p, place.position(0, half));
    if (place.lane % 4 == 0) p.states[result] = state;
    if (state.open != 0) return;
    CISC_ROLL
    for (int i = 0; i < reducer.count(half); ++i) {
      p.candidates[result * kCandidates + from + i] = reducer.listed(half, i).position;
    }
  });
}

}  // namespace cisc::cross_similarity::reduce
