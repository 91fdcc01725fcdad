// The sweep of cross_similarity on sm_80 and later chips: cp.async, ldmatrix, mma.sync. See
// docs/pixel_similarity.md.
#pragma once

#include "cross_similarity_cuts.h"
#include "cross_similarity_items.cuh"
#include "cross_similarity_reduce.cuh"

namespace cisc::cross_similarity::sm80 {

struct Parameters {
  Sweep sweep;
  Layout layout;
};

__device__ __forceinline__ unsigned char* tiles_in(unsigned char* memory) {
  return memory + (kAlignment - shared_address(memory) % kAlignment) % kAlignment;
}

// What the block's walk has come to, in shared memory: in registers of each thread it would displace others.
struct Ahead {
  alignas(Walk) unsigned char bytes[sizeof(Walk)];
  Segment segment;
  bool any;

  __device__ __forceinline__ Walk& walk() { return *reinterpret_cast<Walk*>(bytes); }

  // Whether there is one more segment. All threads take part; the one that has set the walk goes on.
  __device__ __forceinline__ bool next(bool goes) {
    __syncthreads();
    if (goes) any = walk().next(&segment);
    __syncthreads();
    return any;
  }
};

// What the groups of a block leave of each row, and what is put together of it.
template <typename Reducer>
struct Results {
  State states[kGroups][rows_of(Reducer::kRowTiles)];

  __device__ __forceinline__ void keep(int group, int first_row, Reducer& reducer) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    reducer.end([&](int m, int half, const State& state) {
      states[group][first_row + m * 16 + fragments::row(lane, 2 * half)] = state;
    });
  }

  // scale: times which the query's row is a unit vector
  __device__ __forceinline__ void write(const Sweep& p, int row, float scale, int64_t result) const {
    State state = states[0][row];
    for (int group = 1; group < kGroups; ++group) {
      state.merge(states[group][row], p.reduction, static_cast<double>(scale * p.steepness));
    }
    p.states[result] = state;
  }
};

template <int kRowTiles>
struct Results<reduce::TopK<kRowTiles>> {
  int32_t counts[kGroups][rows_of(kRowTiles)];
  int64_t winners[kGroups][kFoundAtOnce][rows_of(kRowTiles)];

  __device__ __forceinline__ void keep(int group, int first_row, reduce::TopK<kRowTiles>& reducer) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    reducer.end([&](int m, int half, const State& state, const float (&values)[kFoundAtOnce],
                    const int32_t (&indices)[kFoundAtOnce]) {
      const int row = first_row + m * 16 + fragments::row(lane, 2 * half);
      counts[group][row] = state.index;
      CISC_UNROLL
      for (int i = 0; i < kFoundAtOnce; ++i) winners[group][i][row] = pack_winner(values[i], indices[i]);
    });
  }

  // The best of two lists, each of which has its best first.
  __device__ __forceinline__ void write(const Sweep& p, int row, float, int64_t result) const {
    static_assert(kGroups == 2, "two lists");
    int left = 0, right = 0, count = 0;  // taken of each, and of both
    for (; count < kFoundAtOnce; ++count) {
      const bool some = left < counts[0][row], others = right < counts[1][row];
      if (!some && !others) break;
      const bool other = !some || (others && winners[1][right][row] > winners[0][left][row]);
      p.winners[result * kFoundAtOnce + count] = other ? winners[1][right][row] : winners[0][left][row];
      left += other ? 0 : 1;
      right += other ? 1 : 0;
    }
    State state = State::none();
    state.index = count;
    p.states[result] = state;
  }
};

#if defined(CISC_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Rows of a chunk for some threads that follow each other, each of which copies 16 bytes of every few rows.
// from: of the first row's chunk; row_bytes: from one row to the next; inside: rows that there are, of kRows
template <int kRows, int kCopiers>
__device__ __forceinline__ void bring_rows(const unsigned char* from, int64_t row_bytes, int32_t inside,
                                           int thread,
                                           // outputs
                                           unsigned char* tile) {
  constexpr int kStep = kCopiers / kPieces;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "the swizzle is the same in each step");
  const int row = thread / kPieces, byte = thread % kPieces * 16;
  from += row * row_bytes + byte;
  tile += fragments::swizzled(row, byte);
  CISC_UNROLL
  for (int i = 0; i < kRows; i += kStep) {
    copy_16(from, row + i < inside, tile + i * kChunkBytes);
    from += kStep * row_bytes;
  }
}

// Products of a warp's rows with its group's columns, of one chunk.
// query, guide: of the lane's row in the first matrices that it names, swizzled
template <int kRowTiles, Matrix type>
__device__ __forceinline__ void multiply(const unsigned char* tiles, uint32_t query, uint32_t guide,
                                         // outputs
                                         float (&sums)[kRowTiles][kSums]) {
  CISC_UNROLL
  for (int k = 0; k < kChunk16 / 16; ++k) {
    // The swizzle leaves what is above the 128 bytes of a row alone.
    const uint32_t along = static_cast<uint32_t>(k) * 32;
    uint32_t a[kRowTiles][4];
    CISC_UNROLL
    for (int m = 0; m < kRowTiles; ++m) load_matrices(tiles + (query ^ along) + m * 16 * kChunkBytes, a[m]);
    CISC_UNROLL
    for (int n = 0; n < kGroupColumns / 16; ++n) {
      uint32_t b[4];
      load_matrices(tiles + (guide ^ along) + n * 16 * kChunkBytes, b);
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
      CISC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_16x8<type>(a[m], left, reinterpret_cast<float (&)[4]>(sums[m][8 * n]));
        multiply_16x8<type>(a[m], right, reinterpret_cast<float (&)[4]>(sums[m][8 * n + 4]));
      }
    }
  }
}

// Until the copies of the stage that comes next are there, of those of `stages` - 1.
__device__ __forceinline__ void wait_for_stage(int32_t stages) {
  if (stages == 2) return copies_wait<0>();
  if (stages == 3) return copies_wait<1>();
  copies_wait<2>();
}
static_assert(sizeof(Ahead) <= kReserved);
static_assert(kFewestStages == 2 && kMostStages == 4, "numbers of stages that are waited for");

#endif

// A block has rows_of(Reducer::kRowTiles) rows of an item.
template <typename Reducer>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(const __grid_constant__ Parameters parameters) {
#if defined(CISC_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kRowTiles = Reducer::kRowTiles, kRows = rows_of(kRowTiles);
  CISC_DYNAMIC_SHARED(memory);
  unsigned char* tiles = tiles_in(memory);
  const Sweep& p = parameters.sweep;
  const Layout& layout = parameters.layout;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int group = thread / kGroupThreads, of_group = thread % kGroupThreads;
  const int first_row = of_group / kWarp * kRowTiles * 16;
  const bool resident = layout.resident();

  const int32_t parts = p.rows / kRows, number = static_cast<int32_t>(blockIdx.x);
  auto item = Item<kColumns>::of(p, number / parts);
  const reduce::Group rows{item.image, item.unit, item.split, item.first};
  item.first += number % parts * kRows;
  item.behind = item.first + kRows < item.behind ? item.first + kRows : item.behind;
  const reduce::Place place{item.first + first_row, 16, lane};
  Reducer reducer(p);
  reducer.begin(place);
  reduce::prepare(p, rows, place, reducer);

  const int64_t row_bytes = p.shape.width() * 2;
  const auto* query_rows = reinterpret_cast<const unsigned char*>(p.query_rows) +
                           (static_cast<int64_t>(item.image) * p.query_pixels + item.first) * row_bytes;
  const auto* guide_rows = reinterpret_cast<const unsigned char*>(p.guide_rows) +
                           static_cast<int64_t>(item.image) * p.guide_pixels * row_bytes;
  const float* guide_scale = p.guide_scale + static_cast<int64_t>(item.image) * p.guide_pixels;
  const int32_t query_inside = item.behind - item.first, steps = p.shape.steps();
  const auto share = static_cast<uint32_t>(group * kShareBytes);
  // Rows that the lane names: of 16 query rows first those of the first half of k, of 16 guide rows first 8.
  const auto query_lane = static_cast<uint32_t>(first_row * kChunkBytes) +
                          static_cast<uint32_t>(fragments::swizzled(lane % 16, lane / 16 * 16));
  const auto guide_lane =
      share + static_cast<uint32_t>(fragments::swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16));

  CISC_SHARED(ahead, Ahead);
  if (thread == 0) ahead.walk() = item.walk(p);
  bool first = true;  // step of all
  int32_t ready = 0;  // the stage that is multiplied next
  while (ahead.next(thread == 0)) {
    const Segment segment = ahead.segment;
    const int32_t tiles_here = segment.end_tile - segment.first_tile;
    int32_t filled = ready;  // the stage that is brought next
    int32_t bring_tile = 0, bring_step = 0;
    // Bring a stage, or nothing behind the last one.
    const auto bring = [&] {
      if (bring_tile < tiles_here) {
        unsigned char* stage = tiles + layout.stage(filled);
        const int32_t from =
            segment.begin + (segment.first_tile + bring_tile) * kColumns + group * kGroupColumns;
        const int64_t guide_column = static_cast<int64_t>(p.shape.guide_chunk(bring_step)) * kChunkBytes;
        bring_rows<kGroupColumns, kGroupThreads>(guide_rows + from * row_bytes + guide_column, row_bytes,
                                                 segment.end - from, of_group, stage + share);
        if (!resident) {
          const int64_t query_column = static_cast<int64_t>(p.shape.query_chunk(bring_step)) * kChunkBytes;
          bring_rows<kRows, kThreads>(query_rows + query_column, row_bytes, query_inside, thread,
                                      stage + kGroups * kShareBytes);
        }
        if (++bring_step == steps) {
          bring_step = 0;
          ++bring_tile;
        }
      }
      copies_commit();
      filled = filled + 1 == layout.stages ? 0 : filled + 1;
    };
    if (first) {
      CISC_ROLL
      for (int32_t chunk = 0; chunk < layout.query_chunks; ++chunk) {
        bring_rows<kRows, kThreads>(query_rows + static_cast<int64_t>(chunk) * kChunkBytes, row_bytes,
                                    query_inside, thread, tiles + layout.query(chunk));
      }
    }
    CISC_ROLL
    for (int32_t stage = 1; stage < layout.stages; ++stage) bring();

    reducer.segment(segment.first_query, segment.behind_query);
    for (int32_t tile = segment.first_tile; tile < segment.end_tile; ++tile) {
      float sums[kRowTiles][kSums];
      CISC_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        CISC_UNROLL
        for (int i = 0; i < kSums; ++i) sums[m][i] = 0.0f;
      }
      CISC_ROLL
      for (int32_t step = 0; step < steps; ++step) {
        wait_for_stage(layout.stages);
        // What others have brought is there, and they are done with the stage that is brought next. The
        // query's rows are brought by both groups.
        const bool all = first || !resident;
        meet(all ? kMeet : kMeet + 1 + group, all ? kThreads : kGroupThreads);
        first = false;
        bring();
        const auto stage = static_cast<uint32_t>(layout.stage(ready));
        const uint32_t query =
            query_lane + (resident ? layout.query(p.shape.query_chunk(step)) : stage + kGroups * kShareBytes);
        if (p.type == Matrix::bf16) {
          multiply<kRowTiles, Matrix::bf16>(tiles, query, stage + guide_lane, sums);
        } else {
          multiply<kRowTiles, Matrix::f16>(tiles, query, stage + guide_lane, sums);
        }
        ready = ready + 1 == layout.stages ? 0 : ready + 1;
      }
      const int32_t from = segment.begin + tile * kColumns + group * kGroupColumns, left = segment.end - from;
      if (left <= 0) continue;
      reducer.tile(sums, reduce::ScalesThere(guide_scale + from + fragments::column(lane, 0)), from,
                   left < kGroupColumns ? left : kGroupColumns);
    }
  }

  // All threads have met behind the last segment: tiles are done with.
  auto* results = reinterpret_cast<Results<Reducer>*>(tiles);
  results->keep(group, first_row, reducer);
  __syncthreads();
  if (thread >= kRows) return;
  const int32_t position = item.first + thread;
  const bool inside = position < p.query_pixels;
  const float scale =
      inside ? p.query_scale[static_cast<int64_t>(item.image) * p.query_pixels + position] : 0.0f;
  results->write(p, thread, scale, rows.result(p, position));
#endif
}

// What launches the sweep: a block for each part of an item, so that the chip deals them out.
template <typename Reducer>
void launch(const Gpu& gpu, const Sweep& sweep, const Layout& layout) {
  static_assert(rows_of(Reducer::kRowTiles) <= kThreads, "a thread writes a row");
  static_assert(sizeof(Results<Reducer>) <= kFewestStages * kGroups * kShareBytes,
                "any layout has room for them");
  const int64_t parts = sweep.rows / rows_of(Reducer::kRowTiles);
  gpu.launch(sweep_kernel<Reducer>, static_cast<int64_t>(sweep.units) * sweep.splits * parts, kThreads,
             layout.bytes(), Parameters{sweep, layout});
}

}  // namespace cisc::cross_similarity::sm80
