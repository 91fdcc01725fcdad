// What the backward sweep of "softmax" on tensor cores is given. Each chip has a function that launches it
// (cross_similarity_backward_sm90.cu).
#pragma once

#include "cross_similarity_backward.cuh"
#include "cross_similarity_tiles.h"
#include "tensor_cores.cuh"

namespace cisc::cross_similarity {

constexpr int kGradientParts = 64;  // of an image's incoming gradient, whose largest are found apart

// Of the images whose sides are packed, without NaN: it is in the scales.
struct BackwardSweep {
  Kernel kernel;
  bool to_query;  // the held side is the query
  Matrix type;
  RowShape shape;
  const uint16_t *held_rows, *streamed_rows;  // [images,pixels,width]
  const float *held_scale, *streamed_scale;   // [images,pixels]: times which a row is a unit vector
  float* largest;  // [images,kGradientParts], workspace of the guide's gradient, which need not be filled
};

void backward_sm90(const Gpu& gpu, const BackwardSweep& sweep);

}  // namespace cisc::cross_similarity
