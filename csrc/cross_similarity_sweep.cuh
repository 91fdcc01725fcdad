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

constexpr int kRowNumbers = 8;  // of 16 bits, that a thread reads at once

// Rows of 16-bit numbers of both sides.
struct Packed {
  Matrix type;
  RowShape shape;
  const uint16_t *query_rows, *guide_rows;  // [images,pixels,width]
  const float *query_scale, *guide_scale;   // [images,pixels]: times which a row is a unit vector
  float error;                              // what a cosine of rows may be off from that of the features

  __device__ __forceinline__ float widen(uint16_t bits) const {
    return type == Matrix::bf16 ? BFloat16{bits}.widen() : Float16{bits}.widen();
  }

  // Cosine of two rows, to all threads of a warp.
  __device__ __forceinline__ float cosine(int64_t row, int64_t other) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t width = shape.width(), rest = static_cast<int64_t>(shape.chunks) * kChunk16;
    const uint16_t *a = query_rows + row * width, *b = guide_rows + other * width;
    float sum = 0.0f;
    for (int64_t c = lane * kRowNumbers; c < rest; c += kWarp * kRowNumbers) {
      const auto left = read_pack<kRowNumbers>(a + c), right = read_pack<kRowNumbers>(b + c);
      Pack<uint16_t, kRowNumbers> left_rest{}, right_rest{};
      if (shape.split) {
        left_rest = read_pack<kRowNumbers>(a + rest + c);
        right_rest = read_pack<kRowNumbers>(b + rest + c);
      }
#pragma unroll
      for (int i = 0; i < kRowNumbers; ++i) {
        sum = fmaf(widen(left.at[i]) + widen(left_rest.at[i]), widen(right.at[i]) + widen(right_rest.at[i]),
                   sum);
      }
    }
    return warp_sum(sum) * (query_scale[row] * guide_scale[other]);
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
  int64_t* winners;  // [units,splits,rows,kFoundAtOnce] of "topk", packed
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
void softmax_by_plain(const Gpu& gpu, const Inputs& in,
                      // outputs
                      Tensor& similarity, Tensor& log_totals);

}  // namespace cisc::cross_similarity
