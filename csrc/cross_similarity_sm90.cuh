// The sweep of cross_similarity on sm_90a: TMA, wgmma, clusters. See docs/pixel_similarity.md.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cross_similarity_groups.cuh"
#include "cross_similarity_items.cuh"
#include "cross_similarity_reduce.cuh"

namespace cisc::cross_similarity::sm90 {

// Behind the tiles in shared memory.
struct Barriers {
  Barrier full[kMostStages], empty[kMostStages], query_full, query_empty;
};

static_assert(sizeof(Barriers) == kBarrierBytes);

// Elements of a chunk, and sums of products.
template <Matrix type>
constexpr int kChunkOf = type == Matrix::s8 ? kChunkBytes : kChunk16;
template <Matrix type>
using SumOf = std::conditional_t<type == Matrix::s8, int32_t, float>;

struct Parameters {
  TensorMap query, guide;
  Sweep sweep;
};

#ifdef CISC_HOPPER

// One thread brings the tiles of all items.
template <typename S, Matrix type>
__device__ __forceinline__ void bring(const Parameters& parameters, const Layout<S>& layout,
                                      unsigned char* tiles, Barriers* barriers) {
  const Sweep& p = parameters.sweep;
  const uint32_t rank = S::kCluster > 1 ? cluster_rank() : 0;
  const int32_t clusters = static_cast<int32_t>(gridDim.x) / S::kCluster, items = p.units * p.splits;
  const int32_t steps = p.shape.steps();
  Ring ring, queries;
  for (auto number = static_cast<int32_t>(blockIdx.x) / S::kCluster; number < items; number += clusters) {
    const auto item = Item<S::kColumns>::of(p, number);
    if (p.skips(item.unit)) continue;
    const auto query_row = item.image * p.query_pixels + item.first + static_cast<int32_t>(rank) * S::kRows;
    Walk walk = item.walk(p);
    bool brought = false;
    Segment segment;
    while (walk.next(&segment)) {
      if (S::kResident && !brought) {
        brought = true;
        barrier_wait(&barriers->query_empty, queries.parity ^ 1);
        barrier_expect(&barriers->query_full, static_cast<uint32_t>(layout.query(layout.query_chunks)));
#pragma unroll 1
        for (int32_t chunk = 0; chunk < layout.query_chunks; ++chunk) {
          copy_tile(&parameters.query, chunk * kChunkOf<type>, query_row, &barriers->query_full,
                    tiles + layout.query(chunk));
        }
        queries.next(1);
      }
      for (int32_t tile = segment.first_tile; tile < segment.end_tile; ++tile) {
        const int32_t guide_row = item.image * p.guide_pixels + segment.begin + tile * S::kColumns;
#pragma unroll 1
        for (int32_t step = 0; step < steps; ++step) {
          Barrier* full = &barriers->full[ring.stage];
          unsigned char* stage = tiles + layout.stage(ring.stage);
          barrier_wait(&barriers->empty[ring.stage], ring.parity ^ 1);
          barrier_expect(full, S::kStageBytes);
          const int32_t column = p.shape.guide_chunk(step) * kChunkOf<type>;
          if constexpr (S::kCluster > 1) {
            constexpr int kShare = S::kColumns / S::kCluster;
            copy_tile_to((1 << S::kCluster) - 1, &parameters.guide, column,
                         guide_row + static_cast<int32_t>(rank) * kShare, full,
                         stage + rank * kShare * kChunkBytes);
          } else {
            copy_tile(&parameters.guide, column, guide_row, full, stage);
          }
          if constexpr (!S::kResident) {
            copy_tile(&parameters.query, p.shape.query_chunk(step) * kChunkOf<type>, query_row, full,
                      stage + S::kGuideBytes);
          }
          ring.next(layout.stages);
        }
      }
    }
  }
}

// A warp of each group lets go of a stage, in all blocks that share it.
template <typename S>
__device__ __forceinline__ void release(Barrier* empty, int lane) {
  if constexpr (S::kCluster > 1) {
    if (lane < S::kCluster) barrier_arrive_at(empty, static_cast<uint32_t>(lane));
  } else {
    if (lane == 0) barrier_arrive(empty);
  }
}

// The products of a group's rows with a tile, to its registers.
template <typename S, Matrix type>
__device__ __forceinline__ void multiply(const RowShape& shape, const Layout<S>& layout, uint32_t tiles,
                                         int group, int lane, Barriers* barriers,
                                         const uint32_t (&held)[S::kHeld][4], Ring& ring,
                                         // outputs
                                         SumOf<type> (&sums)[S::kRowTiles][S::kSums]) {
  constexpr int kBytes = 32;  // of a row, that an instruction multiplies
  constexpr uint64_t kTile = 64 * kChunkBytes >> 4, kNext = kBytes >> 4;  // as descriptors count
  [[maybe_unused]] constexpr int kUnrolled = S::kHeldChunks > 0 ? S::kHeldChunks : 1,
                                 kSteps = kChunkBytes / kBytes;
  const int32_t steps = S::kHeldChunks > 0 ? S::kHeldChunks : shape.steps();
  int32_t previous = 0;
  const bool in_turn = layout.in_turn(steps);
  if (in_turn) meet(kTurn + group, kGroups * kWarpGroup);
#pragma unroll kUnrolled
  for (int32_t step = 0; step < steps; ++step) {
    barrier_wait(&barriers->full[ring.stage], ring.parity);
    const auto stage = tiles + static_cast<uint32_t>(layout.stage(ring.stage));
    const uint32_t query =
        (S::kResident ? tiles + static_cast<uint32_t>(layout.query(shape.query_chunk(step)))
                      : stage + S::kGuideBytes) +
        static_cast<uint32_t>(group) * S::kRowTiles * 64 * kChunkBytes;
    const uint64_t a = fragments::descriptor(query), b = fragments::descriptor(stage);
    products_begin();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const bool adds = step > 0 || k > 0;
      if constexpr (S::kHeldChunks > 0) {
        multiply_64<type, false>(sums[0], held[step * kSteps + k], b + k * kNext, adds);
      } else {
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          if constexpr (type == Matrix::s8) {
            multiply_64(sums[m], a + m * kTile + k * kNext, b + k * kNext, adds);
          } else {
            multiply_64<type, false>(sums[m], a + m * kTile + k * kNext, b + k * kNext, adds);
          }
        }
      }
    }
    products_commit();
    if (step > 0) {
      products_wait<1>();
      release<S>(&barriers->empty[previous], lane);
    }
    previous = ring.stage;
    ring.next(layout.stages);
  }
  if (in_turn) meet_without_waiting(kTurn + 1 - group, kGroups * kWarpGroup);
  products_wait<0>();
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) hold(sums[m]);
  release<S>(&barriers->empty[previous], lane);
}

// The 16 rows of a warp, of all chunks, to its registers.
template <typename S>
__device__ __forceinline__ void hold_rows(const Layout<S>& layout, const unsigned char* tiles, int first_row,
                                          int lane,
                                          // outputs
                                          uint32_t (&held)[S::kHeld][4]) {
  // Of the four matrices [8,8] of 16 rows and 16 numbers, a lane names a row of one.
  const int row = first_row + lane % 16, half = lane / 16;
#pragma unroll
  for (int chunk = 0; chunk < S::kHeldChunks; ++chunk) {
#pragma unroll
    for (int k = 0; k < kChunk16 / 16; ++k) {
      load_matrices(tiles + layout.query(chunk) + fragments::swizzled(row, k * 32 + half * 16),
                    held[chunk * (kChunk16 / 16) + k]);
    }
  }
}

// A group multiplies and reduces its rows of all items.
template <typename S, Matrix type, typename Reducer>
__device__ __forceinline__ void reduce_all(const Parameters& parameters, const Layout<S>& layout,
                                           unsigned char* tiles, Barriers* barriers, int group) {
  const Sweep& p = parameters.sweep;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  const uint32_t rank = S::kCluster > 1 ? cluster_rank() : 0;
  const int32_t clusters = static_cast<int32_t>(gridDim.x) / S::kCluster, items = p.units * p.splits;
  // Of the cluster's rows, the first of the warp.
  const int first_row =
      static_cast<int>(rank) * S::kRows + group * S::kRowTiles * 64 + fragments::first_row(warp);
  Reducer reducer(p);
  if constexpr (S::kMoreBytes > 0) reducer.take_memory(tiles + layout.more(), static_cast<int>(threadIdx.x));
  uint32_t held[S::kHeld][4];
  Ring ring, queries;
  const bool in_turn = layout.in_turn(p.shape.steps());
  if (in_turn && group == 1) meet_without_waiting(kTurn, kGroups * kWarpGroup);
  for (auto number = static_cast<int32_t>(blockIdx.x) / S::kCluster; number < items; number += clusters) {
    const auto item = Item<S::kColumns>::of(p, number);
    if (p.skips(item.unit)) continue;
    const reduce::Group rows{item.image, item.unit, item.split, item.first};
    const reduce::Place place{item.first + first_row, 64, lane};
    reducer.begin(place);
    reduce::prepare(p, rows, place, reducer);
    Walk walk = item.walk(p);
    bool brought = false;
    Segment segment;
    while (walk.next(&segment)) {
      if (S::kResident && !brought) {
        brought = true;
        barrier_wait(&barriers->query_full, queries.parity);
        queries.next(1);
        if constexpr (S::kHeldChunks > 0) {
          hold_rows<S>(layout, tiles, group * 64 + fragments::first_row(warp), lane, held);
        }
      }
      reducer.segment(segment.first_query, segment.behind_query);
      for (int32_t tile = segment.first_tile; tile < segment.end_tile; ++tile) {
        const int32_t first = segment.begin + tile * S::kColumns, left = segment.end - first;
        const auto* scales = Reducer::scales(p) + (item.image * p.guide_pixels + first);
        if constexpr (S::kMoreBytes > 0) reducer.ahead(scales);
        SumOf<type> sums[S::kRowTiles][S::kSums];
        multiply<S, type>(p.shape, layout, shared_address(tiles), group, lane, barriers, held, ring, sums);
        reducer.tile(sums, scales, first, left < S::kColumns ? left : S::kColumns);
      }
    }
    if (brought && lane == 0) barrier_arrive(&barriers->query_empty);
    reduce::finish(p, rows, place, reducer);
  }
  // The other group's last turn has no taker.
  if (in_turn && group == 0) meet(kTurn, kGroups * kWarpGroup);
}

#endif  // CISC_HOPPER

template <typename S, Matrix type, typename Reducer>
__global__ void __cluster_dims__(S::kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    sweep_kernel(const __grid_constant__ Parameters parameters) {
#ifdef CISC_HOPPER
  CISC_DYNAMIC_SHARED(memory);
  unsigned char* tiles = tiles_in(memory);
  const auto layout = Layout<S>::of(parameters.sweep.shape);
  auto* barriers = reinterpret_cast<Barriers*>(tiles + layout.barriers());
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpGroup;
  if (thread == 0) {
    prefetch_map(&parameters.query);
    prefetch_map(&parameters.guide);
    for (int32_t stage = 0; stage < layout.stages; ++stage) {
      barrier_set(&barriers->full[stage], 1);
      barrier_set(&barriers->empty[stage], kWarps * S::kCluster);
    }
    barrier_set(&barriers->query_full, 1);
    barrier_set(&barriers->query_empty, kWarps);
    barriers_set();
  }
  if constexpr (S::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (group == kGroups) {
    keep_registers<kBringsRegisters>();
    if (thread == kGroups * kWarpGroup) bring<S, type>(parameters, layout, tiles, barriers);
  } else {
    take_registers<kMultipliesRegisters>();
    reduce_all<S, type, Reducer>(parameters, layout, tiles, barriers, group);
  }
  // No block leaves while another one may arrive at its barriers.
  if constexpr (S::kCluster > 1) {
    __syncwarp();
    cluster_sync();
  }
#endif
}

// What launches the sweep of rows of a shape.
template <typename S, Matrix type, typename Reducer>
void launch(const Gpu& gpu, const Sweep& sweep) {
  const auto layout = Layout<S>::of(sweep.shape);
  const int64_t width = static_cast<int64_t>(sweep.shape.all_chunks()) * kChunkOf<type>;
  const int64_t query_rows = static_cast<int64_t>(sweep.images) * sweep.query_pixels;
  const int64_t guide_rows = static_cast<int64_t>(sweep.images) * sweep.guide_pixels;
  const Parameters parameters{
      tensor_map(gpu, type, sweep.query_rows, query_rows, width, S::kRows),
      tensor_map(gpu, type, sweep.guide_rows, guide_rows, width, S::kColumns / S::kCluster), sweep};
  const int64_t items = static_cast<int64_t>(sweep.units) * sweep.splits;
  // Items are alike but in own-label mode, where a cluster for each leaves it to the chip who takes the next.
  const int64_t clusters =
      sweep.own() ? items : std::min(items, std::max<int64_t>(gpu.multiprocessors() / S::kCluster, 1));
  gpu.launch_clusters(sweep_kernel<S, type, Reducer>, S::kCluster, clusters * S::kCluster, kThreads,
                      layout.bytes(), parameters);
}

}  // namespace cisc::cross_similarity::sm90
