// What a sweep on tensor cores is given: packed rows of both sides, and where the results go. Each chip has a
// function that launches it (cross_similarity_sm80.cu, cross_similarity_sm90.cu).
#pragma once

#include "class_sort.h"
#include "cross_similarity.h"
#include "cross_similarity_arguments.h"
#include "cross_similarity_bounds.h"
#include "cross_similarity_plan.h"
#include "cross_similarity_state.cuh"
#include "cross_similarity_tiles.h"
#include "device.cuh"
#include "labels.h"
#include "tensor_cores.cuh"

namespace cisc::cross_similarity {

constexpr int kRowNumbers = 8;                     // of 16 bits, that a thread reads at once
constexpr int kRowLanes = kChunk16 / kRowNumbers;  // threads that share a row, chunk by chunk

// This thread among those of its row.
__device__ __forceinline__ int row_lane() { return static_cast<int>(threadIdx.x) % kRowLanes; }

// Sum over the threads that share a row, the same to all of them, in a fixed order. All threads of a warp.
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance);
  }
  return value;
}

// Rows of 16-bit numbers of both sides.
struct Packed {
  Matrix type;
  RowShape shape;
  const uint16_t *query_rows, *guide_rows;  // [images,pixels,width]
  const float *query_scale, *guide_scale;   // [images,pixels]: times which a row is a unit vector
  float error;                              // what a cosine of rows may be off from that of the features

  // Cosines of a row and n others, to all threads that share it. All threads of a warp, for four rows.
  // kSplit: shape.split
  template <bool kSplit, int n>
  __device__ __forceinline__ void cosines(int64_t row, const int64_t (&others)[n],
                                          // outputs
                                          float (&values)[n]) const {
    const float scale = query_scale[row];
    float scales[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      scales[j] = guide_scale[others[j]];
      values[j] = 0.0f;
    }
    if (!kSplit && type == Matrix::bf16) {
      add_products<BFloat16, false>(row, others, values);
    } else {
      add_products<Float16, kSplit>(row, others, values);
    }
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = row_sum(values[j]) * (scale * scales[j]);
  }

 private:
  // A thread's part of the products of rows.
  template <typename Number, bool kSplit, int n>
  __device__ __forceinline__ void add_products(int64_t row, const int64_t (&others)[n],
                                               // outputs
                                               float (&sums)[n]) const {
    using Numbers = Pack<uint16_t, kRowNumbers>;
    constexpr int kHalves = kSplit ? 2 : 1, kDepth = n == 1 ? 4 / kHalves : 1;  // chunks read at once
    const int64_t width = shape.width();
    const int first = row_lane() * kRowNumbers;
    const uint16_t *a = query_rows + row * width + first, *b[n];
#pragma unroll
    for (int j = 0; j < n; ++j) b[j] = guide_rows + others[j] * width + first;
#pragma unroll 1
    for (int32_t chunk = 0; chunk < shape.chunks; chunk += kDepth) {
      Numbers left[kDepth][kHalves], right[kDepth][n][kHalves];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const bool inside = chunk + d < shape.chunks;
          const int32_t at = opaque((chunk + half * shape.chunks) * kChunk16) + d * kChunk16;
          left[d][half] = inside ? read_pack<kRowNumbers>(a + at) : Numbers{};
#pragma unroll
          for (int j = 0; j < n; ++j) {
            right[d][j][half] = inside ? read_pack<kRowNumbers>(b[j] + at) : Numbers{};
          }
        }
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int i = 0; i < kRowNumbers; ++i) {
          const float of_left = widen<Number>(left[d], i);
#pragma unroll
          for (int j = 0; j < n; ++j) sums[j] = fmaf(of_left, widen<Number>(right[d][j], i), sums[j]);
        }
      }
    }
  }

  // A number of a row, in one piece or two.
  template <typename Number, int kHalves>
  __device__ __forceinline__ static float widen(const Pack<uint16_t, kRowNumbers> (&halves)[kHalves], int i) {
    float value = Number{halves[0].at[i]}.widen();
    if constexpr (kHalves == 2) value += Number{halves[1].at[i]}.widen();
    return value;
  }
};

// Of the images whose sides are packed.
struct Sweep {
  Matrix type;
  RowShape shape;
  const void *query_rows, *guide_rows;         // [images,pixels,width]
  const float *query_scale, *guide_scale;      // [images,pixels]: times which a row is a unit vector
  int32_t images, query_pixels, guide_pixels;  // of those images, and of one
  const int32_t *query_starts,
      *guide_starts;    // [images,kBins + 1]; of the query in own-label mode, else null
  int64_t first_image;  // of all
  Classes classes;      // [B,S]; without it own-label mode
  int32_t bins;         // those in front of it have one label each
  // Units: a tile of the query's `rows`, for each slot and image; of the launch, in order of those. Each
  // meets the guide in `splits`.
  int32_t slots, tiles, rows, splits, first_unit, units;
  Reduction reduction;  // max, topk or softmax
  float steepness;
  // [units,rows] of "topk", or null: the last winner that was found before, packed; -1: there are no more
  const int64_t* bounds;
  // [units], or null: units where it is 0 are left out
  const int32_t* flags;
  // Of a sweep that screens, by rows of int8: [images,pixels] each, and Bounds::slack
  const Step *query_steps, *guide_steps;
  float slack;
  Packed packed;
  // outputs: positions in the guide's order
  State* states;     // [units,splits,rows]
  int64_t* winners;  // [units,splits,rows,kFoundAtOnce] of "topk", packed, the best first
  // [units,splits,rows,kCandidates] of a sweep that screens. Its states have how many there are as their
  // index, what the best one's V is above as `best`, the largest V as `top`, and `open` where some are
  // lacking.
  int32_t* candidates;

  CISC_HD bool skips(int32_t unit) const { return flags != nullptr && flags[unit] == 0; }
  CISC_HD bool own() const { return query_starts != nullptr; }
};

// How a chip cuts, for rows of this shape.
class_sort::Cut cut_sm80(const RowShape& shape, Matrix type, Reduction reduction);
class_sort::Cut cut_sm90(const RowShape& shape, Matrix type, Reduction reduction);

void sweep_sm80(const Gpu& gpu, const Sweep& sweep);
void sweep_sm90(const Gpu& gpu, const Sweep& sweep);

// The candidates for "max" by rows of int8; and how it cuts, as sweeps do that have flags.
class_sort::Cut cut_screen_sm90();
void screen_sm90(const Gpu& gpu, const Sweep& sweep);

// Whether forward compares the pixels on tensor cores: cosines then differ in their last bits from the plain
// kernel's.
bool by_sweep(const Gpu& gpu, const Inputs& in);

// "softmax" by the plain kernel, for a backward of it that goes with such a forward: of cosines in the same
// bits. outputs, filled as for nothing that is compared: similarity and log_totals, [B,S,h,w] float32
// of_shared_bins: only of images that meets_shared_bin
void softmax_by_plain(const Gpu& gpu, const Inputs& in, bool of_shared_bins,
                      // outputs
                      Tensor& similarity, Tensor& log_totals);

}  // namespace cisc::cross_similarity
