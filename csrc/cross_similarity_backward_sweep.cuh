// What the backward sweep of "softmax" on tensor cores is given. Each chip has a function that launches it
// (cross_similarity_backward_sm90.cu).
#pragma once

#include "cross_similarity_backward.cuh"
#include "cross_similarity_tiles.h"
#include "tensor_cores.cuh"

namespace cisc::cross_similarity {

constexpr int kBackwardRows = 128;  // of the side that the gradient goes to, that a block has

// Of the images whose sides are packed, without NaN: it is in the scales.
struct BackwardSweep {
  Kernel kernel;
  bool to_query;  // the held side is the query
  Matrix type;
  RowShape shape;
  const uint16_t *held_rows, *streamed_rows;  // [images,pixels,width]
  const float *held_scale, *streamed_scale;   // [images,pixels]: times which a row is a unit vector
  // [images, tiles of kBackwardRows pixels], workspace of the guide's gradient, which need not be filled
  int32_t* exponents;
};

void backward_sm90(const Gpu& gpu, const BackwardSweep& sweep);

}  // namespace cisc::cross_similarity
