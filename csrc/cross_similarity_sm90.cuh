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

// What all threads of a warp have, so that the compiler knows it.
template <typename T>
__device__ __forceinline__ T of_warp(T value) {
  return __shfl_sync(kAll, value, 0);
}

// Makes the products of a group's rows with tiles, to its registers.
template <typename S, Matrix type>
class Products {
 public:
  using Sums = SumOf<type>[S::kRowTiles][S::kSums];
  using Held = uint32_t[S::kHeld][4];

  __device__ __forceinline__ Products(const RowShape& shape, const Layout<S>& layout, unsigned char* tiles,
                                      Barriers* barriers, int group)
      : shape_(shape),
        layout_(layout),
        barriers_(barriers),
        group_(group),
        tiles_(shared_address(tiles)),
        steps_(S::kHeldChunks > 0 ? S::kHeldChunks : shape.steps()),
        in_turn_(layout.in_turn(steps_)) {
    if (in_turn_ && group == 1) meet_without_waiting(kTurn, kGroups * kWarpGroup);
  }

  // The other group's last turn has no taker.
  __device__ __forceinline__ void end() const {
    if (in_turn_ && group_ == 0) meet(kTurn, kGroups * kWarpGroup);
  }

  // Those with the next tile.
  __device__ __forceinline__ void make(const Held& held,
                                       // outputs
                                       Sums& sums) {
    [[maybe_unused]] constexpr int kUnrolled = S::kHeldChunks > 0 ? S::kHeldChunks : 1;
    if (in_turn_) meet(kTurn + group_, kGroups * kWarpGroup);
    // Of the warp, so that what follows is computed once for it.
    ring_.stage = of_warp(ring_.stage);
    ring_.parity = of_warp(ring_.parity);
    const uint32_t first = of_warp(tiles_);
    const uint32_t rows = first + static_cast<uint32_t>(of_warp(group_)) * S::kRowTiles * 64 * kChunkBytes;
    int32_t previous = 0;
#pragma unroll kUnrolled
    for (int32_t step = 0; step < steps_; ++step) {
      barrier_wait(&barriers_->full[ring_.stage], ring_.parity);
      const auto stage = static_cast<uint32_t>(layout_.stage(ring_.stage));
      const uint32_t query = S::kResident
                                 ? rows + static_cast<uint32_t>(layout_.query(shape_.query_chunk(step)))
                                 : rows + stage + S::kGuideBytes;
      products_begin();
      multiply(step, fragments::descriptor(query), fragments::descriptor(first + stage), held, sums);
      products_commit();
      if (step > 0) {
        products_wait<1>();
        release(previous);
      }
      previous = ring_.stage;
      ring_.next(layout_.stages);
    }
    if (in_turn_) meet_without_waiting(kTurn + 1 - group_, kGroups * kWarpGroup);
    products_wait<0>();
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) hold(sums[m]);
    release(previous);
  }

 private:
  // Of a step. a, b: descriptors of the rows' chunk and of the tile's
  __device__ __forceinline__ static void multiply(int32_t step, uint64_t a, uint64_t b, const Held& held,
                                                  // outputs
                                                  Sums& sums) {
    constexpr int kBytes = 32, kSteps = kChunkBytes / kBytes;  // of a row, that an instruction multiplies
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const bool adds = step > 0 || k > 0;
      const uint64_t columns = fragments::further(b, k * kBytes);
      if constexpr (S::kHeldChunks > 0) {
        multiply_64<type, false>(sums[0], held[step * kSteps + k], columns, adds);
      } else {
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m) {
          const uint64_t here = fragments::further(a, m * 64 * kChunkBytes + k * kBytes);
          if constexpr (type == Matrix::s8) {
            multiply_64(sums[m], here, columns, adds);
          } else {
            multiply_64<type, false>(sums[m], here, columns, adds);
          }
        }
      }
    }
  }

  // A warp of each group lets go of a stage, in all blocks that share it.
  __device__ __forceinline__ void release(int32_t stage) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    Barrier* empty = &barriers_->empty[stage];
    if constexpr (S::kCluster > 1) {
      if (lane < S::kCluster) barrier_arrive_at(empty, static_cast<uint32_t>(lane));
    } else {
      if (lane == 0) barrier_arrive(empty);
    }
  }

  const RowShape& shape_;
  const Layout<S>& layout_;
  Barriers* barriers_;
  int group_;
  uint32_t tiles_;  // in shared memory
  int32_t steps_;
  bool in_turn_;
  Ring ring_;
};

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

// A group's rows meet a tile, which begins at position `first` and has `columns`.
template <typename S, Matrix type, typename Scale, typename Reducer>
__device__ __forceinline__ void reduce_tile(const Scale* scales, int32_t first, int columns,
                                            const typename Products<S, type>::Held& held,
                                            Products<S, type>& products, Reducer& reducer) {
  typename Products<S, type>::Sums sums;
  if constexpr (std::is_same_v<Scale, Step>) {
    reducer.ahead(scales);
    products.make(held, sums);
    reducer.tile(sums, first, columns);
  } else {
    using OfTile = std::conditional_t<(S::kSums > 64), reduce::ScalesAhead, reduce::ScalesHeld<S::kSums>>;
    const OfTile of_tile(scales + reducer.column());
    products.make(held, sums);
    reducer.tile(sums, of_tile, first, columns);
  }
}

// A group multiplies and reduces its rows of all items.
template <typename S, Matrix type, typename Reducer>
__device__ __forceinline__ void reduce_all(const Parameters& parameters, const Layout<S>& layout,
                                           unsigned char* tiles, Barriers* barriers, int group) {
  const Sweep& p = parameters.sweep;
  Reducer reducer(p);
  if constexpr (S::kMoreBytes > 0) reducer.take_memory(tiles + layout.more(), static_cast<int>(threadIdx.x));
  uint32_t held[S::kHeld][4];
  Ring queries;
  Products<S, type> products(p.shape, layout, tiles, barriers, group);
  for (auto number = static_cast<int32_t>(blockIdx.x) / S::kCluster; number < p.units * p.splits;
       number += static_cast<int32_t>(gridDim.x) / S::kCluster) {
    // All registers go to the sums: what is known of an item is computed anew where it is asked for.
    const auto item_now = [&] { return Item<S::kColumns>::of(p, reduce::anew(number)); };
    const auto rows_of = [](const auto& item) {
      return reduce::Group{item.image, item.unit, item.split, item.first};
    };
    const auto place_of = [&](const auto& item) {
      const int thread = reduce::anew(static_cast<int32_t>(threadIdx.x));
      const uint32_t rank = S::kCluster > 1 ? cluster_rank() : 0;
      const int first_row = static_cast<int>(rank) * S::kRows + thread / kWarpGroup * S::kRowTiles * 64 +
                            fragments::first_row(thread / kWarp % 4);
      return reduce::Place{item.first + first_row, 64, thread % kWarp};
    };
    {
      const auto item = item_now();
      if (p.skips(item.unit)) continue;
      reducer.begin(place_of(item));
      reduce::prepare(p, rows_of(item), place_of(item), reducer);
    }
    bool brought = false;
    Walk::Mark mark{-1, 0};
    for (;;) {
      const auto item = item_now();
      Walk walk = item.walk(p);
      if (brought) walk.go_on(mark);
      Segment segment;
      if (!walk.next(&segment)) break;
      mark = {of_warp(walk.mark().bin), of_warp(walk.mark().passed)};
      if (S::kResident && !brought) {
        barrier_wait(&barriers->query_full, queries.parity);
        queries.next(1);
        if constexpr (S::kHeldChunks > 0) {
          const int thread = static_cast<int>(threadIdx.x);
          hold_rows<S>(layout, tiles, group * 64 + fragments::first_row(thread / kWarp % 4), thread % kWarp,
                       held);
        }
      }
      brought = true;
      reducer.segment(of_warp(segment.first_query), of_warp(segment.behind_query));
      const int32_t begin = of_warp(segment.begin), end = of_warp(segment.end);
      const int32_t end_tile = of_warp(segment.end_tile);
      const auto* scales = Reducer::scales(p) + item.image * p.guide_pixels;
      for (int32_t tile = of_warp(segment.first_tile); tile < end_tile; ++tile) {
        const int32_t first = begin + tile * S::kColumns, left = end - first;
        reduce_tile<S, type>(scales + first, first, left < S::kColumns ? left : S::kColumns, held, products,
                             reducer);
      }
    }
    if (S::kResident && brought && threadIdx.x % kWarp == 0) barrier_arrive(&barriers->query_empty);
    const auto item = item_now();
    reduce::finish(p, rows_of(item), place_of(item), reducer);
  }
  products.end();
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
