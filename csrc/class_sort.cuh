// Items sorted by bins on a GPU, stable: class_sort.h.
//
// A warp has consecutive items, 32 at a time. Those of a bin are ranked by their lanes, and counted for each
// warp; counts of the warps and chunks in front are added. No order of writes is left to chance.
#pragma once

#include "class_sort.h"
#include "device.cuh"

namespace cisc::class_sort {
namespace {

constexpr int kChunkThreads = 256, kLoneThreads = 1024, kPlaceThreads = 1024;
constexpr int64_t kLoneItems = 8 * kLoneThreads;  // of an image, that one block sorts alone
constexpr int kPlaceBatch = 16;                   // counts that a thread asks for at a time

static_assert(kChunkThreads == kBins && kChunk % kChunkThreads == 0, "a thread has a bin");

// Sum of the totals of the bins in front. The first threads have a bin each, all of the block take part; with
// a barrier.
__device__ __forceinline__ int32_t sum_in_front(int32_t total) {
  CISC_SHARED(of_warp, int32_t[kBins / kWarp]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int32_t sum = total;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (warp < kBins / kWarp && lane == kWarp - 1) of_warp[warp] = sum;
  __syncthreads();
  int32_t front = sum - total;
#pragma unroll
  for (int i = 0; i < kBins / kWarp; ++i) front += i < warp ? of_warp[i] : 0;
  return front;
}

// A block has a chunk of an image's items.
template <typename Bins>
__global__ void __launch_bounds__(kChunkThreads)
    count_bins_kernel(Bins bins, int64_t items, int64_t chunks,
                      // outputs
                      int32_t* counts /* [images,chunks,kBins] */) {
  CISC_SHARED(here, int32_t[kBins]);
  const int64_t image = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk + threadIdx.x;
  here[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kChunk; i += kChunkThreads) {
    const int32_t bin = first + i < items ? bins(image, first + i) : -1;
    if (bin >= 0) atomicAdd(&here[bin], 1);
  }
  __syncthreads();
  counts[static_cast<int64_t>(blockIdx.x) * kBins + threadIdx.x] = here[threadIdx.x];
}

// A block has an image, a few threads a bin: each has some of the chunks.
template <int threads>
__global__ void __launch_bounds__(threads)
    place_bins_kernel(int64_t chunks,
                      // outputs
                      int32_t* counts /* [images,chunks,kBins], of a bin become those in front */,
                      int32_t* starts /* [images,kBins + 1] */) {
  constexpr int parts = threads / kBins;
  CISC_SHARED(sums, int32_t[parts][kBins]);
  const int64_t image = blockIdx.x;
  const int bin = static_cast<int>(threadIdx.x) % kBins, part = static_cast<int>(threadIdx.x) / kBins;
  const int64_t end = chunks * (part + 1) / parts;
  int32_t* of_bin = counts + image * chunks * kBins + bin;
  const auto each = [&](const auto& f) {
    for (int64_t chunk = chunks * part / parts; chunk < end; chunk += kPlaceBatch) {
      int32_t here[kPlaceBatch];
#pragma unroll
      for (int i = 0; i < kPlaceBatch; ++i) here[i] = chunk + i < end ? of_bin[(chunk + i) * kBins] : 0;
#pragma unroll
      for (int i = 0; i < kPlaceBatch; ++i) f(chunk + i, here[i]);
    }
  };
  int32_t sum = 0;
  each([&](int64_t, int32_t here) { sum += here; });
  sums[part][bin] = sum;
  __syncthreads();
  int32_t total = 0, front = 0;
#pragma unroll
  for (int i = 0; i < parts; ++i) {
    if (i == part) front = total;
    total += sums[i][bin];
  }
  const int32_t start = sum_in_front(part == 0 ? total : 0);
  each([&](int64_t chunk, int32_t here) {
    if (chunk < end) of_bin[chunk * kBins] = front;
    front += here;
  });
  if (part > 0) return;
  starts[image * (kBins + 1) + bin] = start;
  if (bin == kBins - 1) starts[image * (kBins + 1) + kBins] = start + total;
}

// A block has a chunk of an image's items, `rounds` for each thread; alone: all of them, and what lies in
// front is known to it.
template <int threads, int rounds, bool alone, typename Bins>
__global__ void __launch_bounds__(threads)
    scatter_kernel(Bins bins, int64_t items, int64_t chunks, const int32_t* counts,
                   // outputs
                   int32_t* starts /* [images,kBins + 1], if alone */, int32_t* order /* [images,items] */) {
  constexpr int warps = threads / kWarp;
  CISC_SHARED(places, int32_t[warps][kBins]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const unsigned lower = (1u << lane) - 1u;  // lanes
  const int64_t image = blockIdx.x / chunks;
  const int64_t first = (blockIdx.x % chunks * warps + warp) * (rounds * kWarp) + lane;
  int32_t bin[rounds], rank[rounds];  // rank: among those of the bin that the warp has
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    bin[i] = first + i * kWarp < items ? bins(image, first + i * kWarp) : -1;
  }
  for (int i = lane; i < kBins; i += kWarp) places[warp][i] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const unsigned same = __match_any_sync(kAll, bin[i]);
    const int32_t front = bin[i] >= 0 ? places[warp][bin[i]] : 0;
    rank[i] = front + __popc(same & lower);
    __syncwarp();
    if (bin[i] >= 0 && (same & lower) == 0) places[warp][bin[i]] = front + __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int32_t place = 0;
  if (alone) {
    int32_t total = 0;
#pragma unroll
    for (int i = 0; i < warps; ++i) total += thread < kBins ? places[i][thread] : 0;
    place = sum_in_front(total);
    if (thread < kBins) starts[image * (kBins + 1) + thread] = place;
    if (thread == kBins - 1) starts[image * (kBins + 1) + kBins] = place + total;
  } else {
    place = starts[image * (kBins + 1) + thread] + counts[static_cast<int64_t>(blockIdx.x) * kBins + thread];
  }
  if (thread < kBins) {
#pragma unroll
    for (int i = 0; i < warps; ++i) {
      const int32_t count = places[i][thread];
      places[i][thread] = place;
      place += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    if (bin[i] < 0) continue;
    order[image * items + places[warp][bin[i]] + rank[i]] = static_cast<int32_t>(first + i * kWarp);
  }
}

// Host: items by bins(image, item) in [0,kBins), -1 = left out; those of a bin ascending.
template <typename Launcher, typename Bins>
void sort_items(const Launcher& gpu, const Bins& bins, int64_t images, int64_t items,
                int32_t* counts,  // workspace [images,chunks,kBins]
                // outputs
                int32_t* order /* [images,items] */, int32_t* starts /* [images,kBins + 1] */) {
  if (items <= kLoneItems) {
    gpu.launch(scatter_kernel<kLoneThreads, kLoneItems / kLoneThreads, true, Bins>, images, kLoneThreads, 0,
               bins, items, int64_t{1}, counts, starts, order);
    return;
  }
  const int64_t chunks = chunks_of(items);
  gpu.launch(count_bins_kernel<Bins>, images * chunks, kChunkThreads, 0, bins, items, chunks, counts);
  gpu.launch(place_bins_kernel<kPlaceThreads>, images, kPlaceThreads, 0, chunks, counts, starts);
  gpu.launch(scatter_kernel<kChunkThreads, kChunk / kChunkThreads, false, Bins>, images * chunks,
             kChunkThreads, 0, bins, items, chunks, counts, starts, order);
}

}  // namespace
}  // namespace cisc::class_sort
