// What is left to do behind a sweep: the guide's parts are put together, winners' cosines computed in
// float32, positions become pixels.
#pragma once

#include "cross_similarity_items.cuh"
#include "cross_similarity_rows.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kFinishThreads = 128;

struct Finish {
  Sweep sweep;
  Side query, guide;
  Form form;
  int64_t k, found_before;  // "topk": winners of a pixel, and those of earlier sweeps
  bool last;                // "topk": no sweep follows
  bool values;              // "max": the value is wanted, not the index alone
  // outputs
  float* similarity;  // [B,S,h,w]
  int64_t* index;     // [B,S,h,w], or null
  int64_t* saved;     // [B,S,h,w,k] of "topk"
  float* log_totals;  // [B,S,h,w] of "softmax"
  int64_t* bounds;    // [units,rows] of "topk": Sweep::bounds of the next one

  // Cosine of two pixels, to all threads of a warp.
  __device__ __forceinline__ float cosine(int64_t image, int64_t query_position,
                                          int64_t guide_position) const {
    const int64_t row = image * query.pixels + query_position, other = image * guide.pixels + guide_position;
    if (form != Form::rounded) return sweep.packed.cosine(row, other);
    const int64_t b = query.first + image;
    const int64_t pixel = query.pixel_at(b, query_position), there = guide.pixel_at(b, guide_position);
    float sum = 0.0f;
    for (int64_t c = static_cast<int>(threadIdx.x) % kWarp; c < query.channels; c += kWarp) {
      sum = fmaf(query.unit(b, pixel, c), guide.unit(b, there, c), sum);
    }
    return warp_sum(sum);
  }

  // Of "max", by one thread of a warp.
  __device__ __forceinline__ void write_best(int64_t place, int64_t image, float value,
                                             int32_t guide_position) const {
    if (threadIdx.x % kWarp != 0) return;
    if (values) similarity[place] = value;
    if (index != nullptr) index[place] = guide.pixel_at(guide.first + image, guide_position);
  }
};

// Winners of a row, of this sweep and those before; with the last, their mean and indices.
__device__ __forceinline__ void finish_topk(const Finish& p, int64_t result, int64_t image, int64_t position,
                                            int64_t place, int64_t row) {
  const Sweep& sweep = p.sweep;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t* saved = p.saved + place * p.k;
  if (lane == 0) {
    const int64_t most = p.k - p.found_before < kFoundAtOnce ? p.k - p.found_before : kFoundAtOnce;
    Heap heap{saved + p.found_before, most, 0};
    for (int32_t split = 0; split < sweep.splits; ++split) {
      const int64_t from = result + split * static_cast<int64_t>(sweep.rows);
      for (int32_t i = 0; i < sweep.states[from].index; ++i) {
        const int64_t winner = sweep.winners[from * kFoundAtOnce + i];
        if (heap.wants(winner)) heap.push(winner);
      }
    }
    if (!p.last) p.bounds[row] = heap.count == most ? heap.at[0] : -1;
    if (p.last) {
      Heap all{saved, p.k, p.found_before + heap.count};
      while (all.count > 0 && saved[all.count - 1] == -1) --all.count;
      all.sort_by_index();
    }
  }
  __syncwarp();
  if (!p.last) return;
  double sum = 0.0;
  int64_t count = 0, best = -1;
  float most = -kInfinity;
  for (; count < p.k && saved[count] != -1; ++count) {
    const int32_t winner = pixel_of(saved[count]);
    const float value = p.cosine(image, position, winner), rank = isnan(value) ? kInfinity : value;
    sum += static_cast<double>(value);
    const int64_t pixel = p.guide.pixel_at(p.guide.first + image, winner);
    if (rank > most) {
      most = rank;
      best = pixel;
    }
    __syncwarp();
    if (lane == 0) saved[count] = pixel;
  }
  if (lane != 0 || count == 0) return;
  p.similarity[place] = static_cast<float>(sum / static_cast<double>(count));
  if (p.index != nullptr) p.index[place] = best;
}

// A warp has a query row of a unit.
template <Reduction reduction>
__global__ void __launch_bounds__(kFinishThreads, 4) finish_kernel(Finish p) {
  const Sweep& sweep = p.sweep;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x) / kWarp;
  const auto unit = static_cast<int32_t>(row / sweep.rows);
  if (unit >= sweep.units || sweep.skips(unit)) return;
  const auto item = Item<1>::of(sweep, unit);
  const int64_t position = item.first + row % sweep.rows, b = p.query.first + item.image;
  if (position >= p.query.count(b)) return;
  const int64_t place = (b * sweep.slots + item.slot) * p.query.pixels + p.query.pixel_at(b, position);
  const int64_t result = static_cast<int64_t>(unit) * sweep.splits * sweep.rows + row % sweep.rows;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (reduction == Reduction::topk) return finish_topk(p, result, item.image, position, place, row);
  const auto scale =
      static_cast<double>(sweep.query_scale[static_cast<int64_t>(item.image) * p.query.pixels + position]);
  const double steepness = static_cast<double>(sweep.steepness);
  State state = State::none();
  for (int32_t split = 0; split < sweep.splits; ++split) {
    state.merge(sweep.states[result + split * static_cast<int64_t>(sweep.rows)], reduction,
                steepness * scale);
  }
  if (reduction == Reduction::max) {
    if (state.index < 0) return;
    const float value = p.values ? p.cosine(item.image, position, state.index) : 0.0f;
    p.write_best(place, item.image, value, state.index);
  } else {
    if (state.total == 0.0 || lane != 0) return;
    float log_total;
    p.similarity[place] = state.mean(scale, steepness, &log_total);
    p.log_totals[place] = log_total;
  }
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

// A warp has a query row of a unit that was screened: the best of its candidates by their cosines in float32.
// Units with a flag are left to another sweep, that of `p`.
__global__ void __launch_bounds__(kFinishThreads, 4) finish_screen_kernel(Finish p, Sweep screen) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x) / kWarp;
  const auto unit = static_cast<int32_t>(row / screen.rows);
  if (unit >= screen.units || !p.sweep.skips(unit)) return;
  const auto item = Item<1>::of(screen, unit);
  const int64_t position = item.first + row % screen.rows, b = p.query.first + item.image;
  if (position >= p.query.count(b)) return;
  const int64_t result = static_cast<int64_t>(unit) * screen.splits * screen.rows + row % screen.rows;
  float least = -kInfinity;
  for (int32_t split = 0; split < screen.splits; ++split) {
    least = ::fmaxf(least, screen.states[result + split * static_cast<int64_t>(screen.rows)].best);
  }
  State best = State::none();
  for (int32_t split = 0; split < screen.splits; ++split) {
    const int64_t from = result + split * static_cast<int64_t>(screen.rows);
    const State& state = screen.states[from];
    if (!(state.top >= least)) continue;
    for (int32_t i = 0; i < state.index; ++i) {
      const int32_t candidate = screen.candidates[from * kCandidates + i];
      best.merge_best(p.cosine(item.image, position, candidate), candidate);
    }
  }
  if (best.index < 0) return;
  const int64_t place = (b * screen.slots + item.slot) * p.query.pixels + p.query.pixel_at(b, position);
  p.write_best(place, item.image, best.best, best.index);
}

}  // namespace
}  // namespace cisc::cross_similarity
