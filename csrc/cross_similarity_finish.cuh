// What is left to do behind a sweep: the guide's parts are put together, winners' cosines computed in
// float32, positions become pixels.
//
// Bytes: states and winners of each row, the query's rows, a row of the guide for each winner.
#pragma once

#include <type_traits>

#include "cross_similarity_items.cuh"
#include "cross_similarity_rows.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kFinishThreads = 128;
// Blocks that a multiprocessor has room for; of kernels that need more registers.
constexpr int kFinishBlocks = 7, kWideBlocks = 4;
constexpr int kCosines = 4;       // of a row, that are computed together
constexpr int kStatesAtOnce = 4;  // of a row, that are read together
constexpr int kVectorDepth = 4;   // components that a thread reads at once

// A pixel's unit vector.
struct UnitVector {
  int64_t offset;
  float scale, rest, low;

  __device__ __forceinline__ static UnitVector of(const Side& side, int64_t b, int64_t pixel) {
    const int64_t at = (b - side.first) * side.pixels + pixel;
    return {side.offset(b, pixel), side.scale[at], side.rest[at], side.low[at]};
  }

  // Every kRowLanes-th component from the channel on; those behind the last one are 0.
  __device__ __forceinline__ void read(const Side& side, int64_t channel,
                                       // outputs
                                       float (&values)[kVectorDepth]) const {
    read_channels(side.image, offset + channel * side.image.stride_c, kRowLanes, side.channels - channel,
                  values);
#pragma unroll
    for (int i = 0; i < kVectorDepth; ++i) values[i] = unit_of(values[i], scale, rest, low);
  }
};

struct Finish {
  Sweep sweep;
  Side query, guide;
  int64_t k, found_before;  // "topk": winners of a pixel, and those of earlier sweeps
  bool last;                // "topk": no sweep follows
  bool values;              // "max": the value is wanted, not the index alone
  // outputs
  float* similarity;  // [B,S,h,w]
  int64_t* index;     // [B,S,h,w], or null
  int64_t* saved;     // [B,S,h,w,k] of "topk"
  float* log_totals;  // [B,S,h,w] of "softmax"
  int64_t* bounds;    // [units,rows] of "topk": Sweep::bounds of the next one

  // Cosines of a pixel and n others, to all threads that share a row; of those that are not there, with a
  // position below 0, any number. All threads of a warp.
  // form: of the rows; what is rounded is read from the features
  template <Form form, int n>
  __device__ __forceinline__ void cosines(int32_t image, int32_t query_position,
                                          const int32_t (&guide_positions)[n],
                                          // outputs
                                          float (&values)[n]) const {
    int64_t others[n];
    const int64_t position = query_position < 0 ? 0 : query_position;
#pragma unroll
    for (int j = 0; j < n; ++j) others[j] = guide_positions[j] < 0 ? 0 : guide_positions[j];
    if constexpr (form == Form::rounded) {
      cosines_of_features(query.first + image, position, others, values);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) others[j] += image * guide.pixels;
      sweep.packed.cosines<form == Form::split>(image * query.pixels + position, others, values);
    }
  }

  // Of "max", by one thread.
  __device__ __forceinline__ void write_best(int64_t place, float value, int64_t pixel) const {
    if (values) similarity[place] = value;
    if (index != nullptr) index[place] = pixel;
  }

  // The guide's pixel for its position, where indices are wanted.
  __device__ __forceinline__ int64_t guide_pixel(int32_t image, int32_t position) const {
    return index != nullptr ? guide.pixel_at(guide.first + image, position) : -1;
  }

 private:
  template <int n>
  __device__ __forceinline__ void cosines_of_features(int64_t b, int64_t position, const int64_t (&others)[n],
                                                      // outputs
                                                      float (&values)[n]) const {
    const auto own = UnitVector::of(query, b, query.pixel_at(b, position));
    UnitVector vectors[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      vectors[j] = UnitVector::of(guide, b, guide.pixel_at(b, others[j]));
      values[j] = 0.0f;
    }
    for (int64_t c = row_lane(); c < query.channels; c += kRowLanes * kVectorDepth) {
      float left[kVectorDepth], right[kVectorDepth];
      own.read(query, c, left);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        vectors[j].read(guide, c, right);
#pragma unroll
        for (int i = 0; i < kVectorDepth; ++i) values[j] = fmaf(left[i], right[i], values[j]);
      }
    }
    // Threads without a channel in the last round have not taken part: they meet here.
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = row_sum(values[j]);
  }
};

// A query row of a unit, which a thread or kRowLanes together have.
struct FinishedRow {
  int32_t image, position;
  int64_t number;  // among the rows of all units
  int64_t place;   // of its outputs
  int64_t result;  // of its first part
  bool there;      // else it is behind the image's last one

  // lanes: threads that share a row
  __device__ __forceinline__ static FinishedRow of(const Finish& p, const Sweep& sweep, int lanes) {
    const int rows = kFinishThreads / lanes;
    const auto item = Item<1>::of(sweep, unit(sweep, lanes));
    const int32_t unit_first = unit(sweep, lanes) * (sweep.rows / rows);
    const int32_t row =
        (static_cast<int32_t>(blockIdx.x) - unit_first) * rows + static_cast<int32_t>(threadIdx.x) / lanes;
    const int64_t b = p.query.first + item.image;
    FinishedRow r{};
    r.image = item.image;
    r.position = item.first + row;
    r.number = static_cast<int64_t>(unit(sweep, lanes)) * sweep.rows + row;
    r.result = static_cast<int64_t>(unit(sweep, lanes)) * sweep.splits * sweep.rows + row;
    r.there = r.position < p.query.count(b);
    if (r.there) r.place = (b * sweep.slots + item.slot) * p.query.pixels + p.query.pixel_at(b, r.position);
    return r;
  }

  // The block's: units have whole blocks.
  __device__ __forceinline__ static int32_t unit(const Sweep& sweep, int lanes) {
    return static_cast<int32_t>(blockIdx.x) / (sweep.rows / (kFinishThreads / lanes));
  }

  // Number of the result that a part of the guide has left, of parts(sweep).
  __device__ __forceinline__ int64_t part(const Sweep& sweep, int32_t number_of_part) const {
    return result + number_of_part * static_cast<int64_t>(sweep.rows);
  }
  __device__ __forceinline__ static int32_t parts(const Sweep& sweep) { return sweep.splits; }

  // What all parts have come to. steepness: of what states hold
  __device__ __forceinline__ State merged(const Sweep& sweep, Reduction reduction, double steepness) const {
    State state = State::none();
    for (int32_t first = 0; first < parts(sweep); first += kStatesAtOnce) {
      State states[kStatesAtOnce];
#pragma unroll
      for (int i = 0; i < kStatesAtOnce; ++i) {
        states[i] = there && first + i < parts(sweep) ? sweep.states[part(sweep, first + i)] : State::none();
      }
#pragma unroll
      for (int i = 0; i < kStatesAtOnce; ++i) state.merge(states[i], reduction, steepness);
    }
    return state;
  }
};

// Eight threads share a row.
template <Form form>
__global__ void __launch_bounds__(kFinishThreads, form == Form::exact ? kFinishBlocks : kWideBlocks)
    finish_max_kernel(Finish p) {
  const Sweep& sweep = p.sweep;
  if (sweep.skips(FinishedRow::unit(sweep, kRowLanes))) return;
  const auto row = FinishedRow::of(p, sweep, kRowLanes);
  const int32_t best[1] = {row.merged(sweep, Reduction::max, 0.0).index};
  const bool found = row.there && best[0] >= 0;
  if (!__any_sync(kAll, found)) return;
  const int64_t pixel = found ? p.guide_pixel(row.image, best[0]) : -1;
  float value[1] = {0.0f};
  if (p.values) p.cosines<form>(row.image, row.there ? row.position : -1, best, value);
  if (found && row_lane() == 0) p.write_best(row.place, value[0], pixel);
}

// A thread has a row.
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) finish_softmax_kernel(Finish p) {
  const Sweep& sweep = p.sweep;
  const auto row = FinishedRow::of(p, sweep, 1);
  if (!row.there) return;
  const auto scale = static_cast<double>(sweep.query_scale[row.image * p.query.pixels + row.position]);
  const double steepness = static_cast<double>(sweep.steepness);
  const State state = row.merged(sweep, Reduction::softmax, steepness * scale);
  if (state.total == 0.0) return;
  float log_total;
  p.similarity[row.place] = state.mean(scale, steepness, &log_total);
  p.log_totals[row.place] = log_total;
}

static_assert(kRowLanes == kFoundAtOnce && kFoundAtOnce % kCosines == 0, "a thread has a winner of its row");
constexpr int64_t kNoWinner = INT64_MIN;  // worse than all
constexpr int32_t kBehind = INT32_MAX;    // behind all positions

// Of this thread's value and that of the thread at a distance in its row, the larger one for the first of
// both, if so wanted, else for the second.
template <typename T>
__device__ __forceinline__ T exchanged_by(T value, int distance, bool larger_first) {
  const T other = __shfl_xor_sync(kAll, value, distance);
  const bool first = (row_lane() & distance) == 0;
  return (value > other) == (first == larger_first) ? value : other;
}

// The best of all parts, in order, one for each thread of the row. All threads of a warp.
__device__ __forceinline__ int64_t best_of_parts(const Sweep& sweep, const FinishedRow& row) {
  int64_t best = kNoWinner;
  const int reverse = kFoundAtOnce - 1 - row_lane();
#pragma unroll 2
  for (int32_t i = 0; i < FinishedRow::parts(sweep); ++i) {
    int64_t winner = kNoWinner;
    if (row.there) {
      const int64_t from = row.part(sweep, i), read = sweep.winners[from * kFoundAtOnce + reverse];
      if (reverse < sweep.states[from].index) winner = read;
    }
    // The better ones of one list and the other in reverse rise, then fall.
    best = winner > best ? winner : best;
#pragma unroll
    for (int distance = kFoundAtOnce / 2; distance > 0; distance /= 2) {
      best = exchanged_by(best, distance, true);
    }
  }
  return best;
}

// Positions of a row, one for each of its threads, ascending.
__device__ __forceinline__ int32_t sorted(int32_t position) {
#pragma unroll
  for (int size = 2; size <= kFoundAtOnce; size *= 2) {
#pragma unroll
    for (int distance = size / 2; distance > 0; distance /= 2) {
      position = exchanged_by(position, distance, (row_lane() & size) != 0);
    }
  }
  return position;
}

__device__ __forceinline__ int32_t position_of(int64_t winner) {
  return winner == -1 || winner == kNoWinner ? kBehind : pixel_of(winner);
}

// Sorts a row's winners in memory by their positions, ascending, those that are -1 behind all others. All
// threads of a warp.
__device__ __forceinline__ void sort_winners(bool there, int64_t k,
                                             // outputs
                                             int64_t* winners) {
  for (int64_t size = 2; size / 2 < k; size *= 2) {
    for (int64_t distance = size / 2; distance > 0; distance /= 2) {
      __syncwarp();
      // Every exchange brings the smaller one to the front, so that there is no need of what lies behind k.
      const int64_t apart = distance == size / 2 ? size - 1 : distance;
      for (int64_t i = row_lane();; i += kRowLanes) {
        const int64_t first = 2 * i - (i & (distance - 1)), second = first ^ apart;
        if (!there || first >= k) break;
        if (second >= k) continue;
        const int64_t left = winners[first], right = winners[second];
        if (position_of(left) <= position_of(right)) continue;
        winners[first] = right;
        winners[second] = left;
      }
    }
  }
  __syncwarp();
}

// Eight threads share a row: its winners, of this sweep and those before; with the last, their mean and
// indices.
// kMany: there are more winners than a sweep finds
template <Form form, bool kMany>
__global__ void __launch_bounds__(kFinishThreads, form == Form::exact && !kMany ? kFinishBlocks : kWideBlocks)
    finish_topk_kernel(Finish p) {
  const Sweep& sweep = p.sweep;
  const auto row = FinishedRow::of(p, sweep, kRowLanes);
  const int lane = row_lane(), first_lane = static_cast<int>(threadIdx.x) % kWarp - lane;
  int64_t* saved = p.saved + row.place * p.k;
  int64_t winner = best_of_parts(sweep, row);
  if (lane >= p.k - p.found_before) winner = kNoWinner;
  if (kMany && winner != kNoWinner) saved[p.found_before + lane] = winner;
  if (kMany && !p.last) {
    if (row.there && lane == kFoundAtOnce - 1) p.bounds[row.number] = winner != kNoWinner ? winner : -1;
    return;
  }
  if constexpr (kMany) sort_winners(row.there, p.k, saved);
  double sum = 0.0;
  int32_t count = 0, best = -1;
  float most = -kInfinity;
  // Eight winners, one for each thread.
  for (int64_t at = lane; at - lane < p.k; at += kFoundAtOnce) {
    int32_t own = kBehind, pixel = -1;
    if constexpr (kMany) {
      if (row.there && at < p.k) own = position_of(saved[at]);
    } else {
      own = sorted(position_of(winner));
    }
    if (!__any_sync(kAll, own != kBehind)) break;
    if (own != kBehind) {
      pixel = static_cast<int32_t>(p.guide.pixel_at(p.guide.first + row.image, own));
      saved[at] = pixel;
    }
    float value = 0.0f;
#pragma unroll 1
    for (int first = 0; first < kFoundAtOnce; first += kCosines) {
      int32_t others[kCosines];
#pragma unroll
      for (int j = 0; j < kCosines; ++j) {
        others[j] = __shfl_sync(kAll, own != kBehind ? own : -1, first_lane + first + j);
      }
      if (!__any_sync(kAll, others[0] >= 0)) break;
      float values[kCosines];
      p.cosines<form>(row.image, row.there ? row.position : -1, others, values);
#pragma unroll
      for (int j = 0; j < kCosines; ++j) {
        if (lane == first + j) value = values[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kFoundAtOnce; ++j) {
      const float one = __shfl_sync(kAll, value, first_lane + j), rank = isnan(one) ? kInfinity : one;
      const int32_t other = __shfl_sync(kAll, pixel, first_lane + j);
      if (other < 0) continue;
      sum += static_cast<double>(one);
      ++count;
      if (rank > most) {
        most = rank;
        best = other;
      }
    }
    if constexpr (!kMany) break;
  }
  if (lane != 0 || count == 0) return;
  p.similarity[row.place] = static_cast<float>(sum / static_cast<double>(count));
  if (p.index != nullptr) p.index[row.place] = best;
}

// A block has a unit that was screened: whether candidates of any row are lacking.
__global__ void __launch_bounds__(kFinishThreads, 4) flag_kernel(Sweep screen,
                                                                 // outputs
                                                                 int32_t* flags /* [units] */) {
  CISC_SHARED(found, int);
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const int64_t rows = static_cast<int64_t>(screen.splits) * screen.rows, first = blockIdx.x * rows;
  for (int64_t row = threadIdx.x; row < rows; row += kFinishThreads) {
    if (screen.states[first + row].open != 0) found = 1;  // whoever writes, the same
  }
  __syncthreads();
  if (threadIdx.x == 0) flags[blockIdx.x] = found;
}

// Eight threads share a row of a unit that was screened: the best of its candidates by their cosines in
// float32. Units with a flag are left to another sweep, that of `p`.
template <Form form>
__global__ void __launch_bounds__(kFinishThreads, kWideBlocks) finish_screen_kernel(Finish p, Sweep screen) {
  if (!p.sweep.skips(FinishedRow::unit(screen, kRowLanes))) return;
  const auto row = FinishedRow::of(p, screen, kRowLanes);
  const int32_t parts = row.there ? FinishedRow::parts(screen) : 0;
  float least = -kInfinity;
  for (int32_t i = 0; i < parts; ++i) least = ::fmaxf(least, screen.states[row.part(screen, i)].best);
  State best = State::none();
  for (int32_t i = 0; i < FinishedRow::parts(screen); ++i) {
    const int64_t from = row.part(screen, i);
    const int32_t count = i < parts && screen.states[from].top >= least ? screen.states[from].index : 0;
    for (int32_t first = 0; __any_sync(kAll, first < count); first += kCosines) {
      int32_t candidates[kCosines];
#pragma unroll
      for (int j = 0; j < kCosines; ++j) {
        candidates[j] = first + j < count ? screen.candidates[from * kCandidates + first + j] : -1;
      }
      float values[kCosines];
      p.cosines<form>(row.image, row.there ? row.position : -1, candidates, values);
#pragma unroll
      for (int j = 0; j < kCosines; ++j) best.merge_best(values[j], candidates[j]);
    }
  }
  if (best.index < 0 || row_lane() != 0) return;
  p.write_best(row.place, best.best, p.guide_pixel(row.image, best.index));
}

// Host: the kernel behind a sweep, of rows of a form. k: winners of "topk"
template <Form form>
void (*finish_kernel(Reduction reduction, int64_t k))(Finish) {
  if (reduction == Reduction::softmax) return finish_softmax_kernel;
  if (reduction == Reduction::max) return finish_max_kernel<form>;
  return k > kFoundAtOnce ? finish_topk_kernel<form, true> : finish_topk_kernel<form, false>;
}

// Host: f(a form's constant)
template <typename Function>
auto with_form(Form form, const Function& f) {
  switch (form) {
    case Form::split:
      return f(std::integral_constant<Form, Form::split>{});
    case Form::rounded:
      return f(std::integral_constant<Form, Form::rounded>{});
    default:
      return f(std::integral_constant<Form, Form::exact>{});
  }
}

// Host: blocks of a kernel that has `lanes` threads for each row of the units.
inline int64_t finish_blocks(const Sweep& sweep, int lanes) {
  const int rows = kFinishThreads / lanes;
  check(sweep.rows % rows == 0, kForward, "units of ", sweep.rows, " rows have no whole blocks");
  return static_cast<int64_t>(sweep.units) * (sweep.rows / rows);
}

}  // namespace
}  // namespace cisc::cross_similarity
