// Backward of "softmax" of cross_similarity on a GPU, and of "mean" between two wide label maps: the tiles of
// cosines once more, as factors of the other side's unit vectors.
//
// For a pair: C multiply-adds for its cosine, made anew for each 64 channels of the result, and C for the
// result: 5 times as many as forward for 256 channels, for each side.
#pragma once

#include "cross_similarity_backward.cuh"

namespace cisc::cross_similarity {
namespace {

// A tile, and what is known of its pixels.
struct PairTile {
  Tile tile;
  float grad[kTile], value[kTile], log_total[kTile];  // of the query's pixels, held or streamed
  int counts[kThreads];
  float members[kTile];  // of the guide, that a held pixel's class has
  double along[kThreads];
  int any;
};

// Guide pixels of each held pixel's label, of the list in the tile, to shared.members. With barriers.
__device__ void count_members(const Side& guide, int64_t b, PairTile& shared) {
  Tile& tile = shared.tile;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  int count = 0;
  const int64_t tiles = ceil_div(tile.list.length(), kTile);
  for (int64_t number = 0; number < tiles; ++number) {
    set_streamed(guide, b, number, false, 0, tile);
    __syncthreads();
    for (int i = 0; i < kColumns; ++i) count += compared(tile, row, part * kColumns + i) ? 1 : 0;
    __syncthreads();
  }
  shared.counts[threadIdx.x] = count;
  __syncthreads();
  if (part == 0) {
    for (int i = 1; i < kParts; ++i) count += shared.counts[i * kTile + row];
    shared.members[row] = static_cast<float>(count);
  }
  __syncthreads();
}

// A thread's 4 x 4 sums of many terms. What they have lost is known to 8 bits, as registers are short.
struct MicroSums {
  static constexpr uint32_t kHigh = 0xffff0000u;
  float value[kMicro][kMicro] = {};
  uint32_t lost[kMicro][kMicro / 2] = {};  // upper halves of two float32

  __device__ __forceinline__ void add(const float (&terms)[kMicro][kMicro]) {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; j += 2) {
        uint32_t& both = lost[i][j / 2];
        const float low = add_compensated(terms[i][j], __uint_as_float(both << 16), value[i][j]);
        const float high = add_compensated(terms[i][j + 1], __uint_as_float(both & kHigh), value[i][j + 1]);
        both = (__float_as_uint(high) & kHigh) | __float_as_uint(low) >> 16;
      }
    }
  }
};

// sums += the tile's factors times 64 channels of the streamed pixels' unit vectors. With barriers.
__device__ __forceinline__ void add_vectors(const Side& streamed, int64_t first_channel, Tile& tile,
                                            // outputs
                                            MicroSums& sums) {
  float piece[kMicro][kMicro] = {};
  const int at = static_cast<int>(threadIdx.x) % kDepth, channel = static_cast<int>(threadIdx.x) / kDepth;
#pragma unroll 1
  for (int first = 0; first < kTile; first += kDepth) {
    for (int i = 0; i < kMicro; ++i) {
      const int c = channel + i * (kThreads / kDepth);
      const float unit = tile.streamed.unit(streamed, first + at, first_channel + c);
      // What is not finite is in the factors already; 0 times it must stay 0.
      tile.streamed_units[at * kPitch + c] = isnan(unit) ? 0.0f : unit;
    }
    __syncthreads();
    add_products(tile.cosines + first * kPitch, tile.streamed_units, piece);
    __syncthreads();
  }
  sums.add(piece);
}

// A block has 64 pixels of the side that the gradient goes to, and 64 of their channels.
template <bool softmax, bool to_query>
__global__ void __launch_bounds__(kThreads, 2) pair_gradient_kernel(Kernel p) {
  CISC_SHARED(shared, PairTile);
  Tile& tile = shared.tile;
  const int64_t slices = ceil_div(p.held.channels, kTile), tiles = ceil_div(p.held.pixels, kTile);
  const int64_t first_channel = blockIdx.x % slices * kTile, number = blockIdx.x / slices;
  const int64_t b = p.held.first + number / tiles;
  if (softmax && p.of_shared_bins) {
    const Side &query = to_query ? p.held : p.streamed, &guide = to_query ? p.streamed : p.held;
    if (!meets_shared_bin(query, guide, p.classes, b)) return;
  }
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  const bool own = !softmax || p.classes.own;  // "mean" of classes has its own kernels
  if (part == 0) {
    const int64_t position = number % tiles * kTile + row;
    const bool inside = position < p.held.count(b);
    tile.held.set(p.held, b, row, inside ? position : -1, to_query && !own, 0);
  }
  MicroSums sums;
  shared.along[threadIdx.x] = 0.0;
  for (int64_t slot = 0; slot < (softmax ? p.slots : 1); ++slot) {
    const int64_t wanted = own ? 0 : p.classes.at(b, slot);
    if (!own && wanted < 0) continue;
    __syncthreads();
    if (!own && to_query && part == 0) tile.held.label[row] = wanted;
    // The pixels of the other side; those of the guide first, to be counted.
    if (!softmax && !to_query) {
      list_bins_of_held(p.held, b, tile);
      count_members(p.held, b, shared);
    }
    if (own) {
      list_bins_of_held(p.streamed, b, tile);
    } else if (to_query) {
      const int32_t* starts = p.streamed.starts_of(b) + class_sort::bin_of(wanted);
      list_range(starts[0], starts[1], tile);
    } else {
      if (threadIdx.x == 0) shared.any = 0;
      __syncthreads();
      if (tile.held.pixel[row] >= 0 && tile.held.label[row] == wanted)
        shared.any = 1;  // whoever writes, the same
      __syncthreads();
      list_range(0, shared.any != 0 ? p.streamed.pixels : 0, tile);
    }
    if (!softmax && to_query) count_members(p.streamed, b, shared);
    const auto set_parameters = [&](int64_t pixel) {
      const bool none = pixel < 0;
      shared.grad[row] = none ? 0.0f : p.grad.at(b, slot, pixel);
      if (!softmax) return;
      shared.value[row] = none ? 0.0f : p.similarity[p.place(b, slot, pixel)];
      shared.log_total[row] = none ? 0.0f : p.log_totals[p.place(b, slot, pixel)];
    };
    if (to_query && part == 0) set_parameters(tile.held.pixel[row]);
    const auto end = static_cast<int32_t>(ceil_div(tile.list.length(), kTile));
    for (int32_t at = 0; at < end; ++at) {
      set_streamed(p.streamed, b, at, !own && !to_query, wanted, tile);
      // The same threads have set these pixels.
      if (!to_query && part == 0) set_parameters(tile.streamed.pixel[row]);
      __syncthreads();
      compute_cosines<false>(p.held, p.streamed, tile);
      float product = 0.0f;
#pragma unroll 4
      for (int i = 0; i < kColumns; ++i) {
        const int column = part * kColumns + i;
        float* factor = tile.cosines + column * kPitch + row;
        const float cosine = *factor;
        const int of_query = to_query ? row : column;
        const float grad = shared.grad[of_query];
        float slope;
        if (softmax) {
          // d value / d cosine = p (1 + (cosine - value) / temperature)
          const float above = cosine - shared.value[of_query];
          const float probability =
              fast_exp2(min(0.0f, fmaf(above, p.steepness, -shared.log_total[of_query])));
          slope = grad * probability * fmaf(above, p.inverse_temperature, 1.0f);
        } else {
          slope = isnan(cosine) ? cosine : grad / shared.members[row];
        }
        const bool counts = cosine != -kInfinity;
        slope = counts ? slope : 0.0f;
        product += counts ? slope * cosine : 0.0f;
        *factor = slope;
      }
      shared.along[threadIdx.x] += static_cast<double>(product);
      __syncthreads();
      add_vectors(p.streamed, first_channel, tile, sums);
    }
  }
  const int first_row = static_cast<int>(threadIdx.x) / kMicros * kMicro;
  const int column = static_cast<int>(threadIdx.x) % kMicros * kMicro;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
#pragma unroll
    for (int j = 0; j < kMicro; ++j) tile.cosines[(column + j) * kPitch + first_row + i] = sums.value[i][j];
  }
  __syncthreads();
  const int64_t pixel = tile.held.pixel[row];
  if (pixel < 0) return;
  double along = 0.0;
  for (int i = 0; i < kParts; ++i) along += shared.along[i * kTile + row];
  const int64_t to = p.target.offset(b, pixel);
  for (int c = part; c < kTile && first_channel + c < p.held.channels; c += kParts) {
    const float unit = tile.held.unit(p.held, row, first_channel + c);
    p.target.write(
        to, first_channel + c,
        through_norm(tile.cosines[c * kPitch + row], unit, along, tile.held.scale[row], tile.held.rest[row]));
  }
}

}  // namespace
}  // namespace cisc::cross_similarity
