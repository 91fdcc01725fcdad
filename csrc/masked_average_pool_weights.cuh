// The weights of the features' pixels, which both directions of masked_average_pool gather from the labels on
// a GPU: exactly, in integers.
#pragma once

#include <vector>

#include "labels.h"
#include "masked_average_pool_arguments.h"
#include "planes.cuh"
#include "tensors.h"

namespace cisc::masked_average_pool::device {

using planes::Group;
using planes::kWide;
using planes::Planes;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSlots = 32;            // of a word of Weights::present
constexpr int kDeep = 256;            // channels of a block
constexpr int kOwn = kDeep / kWarps;  // channels of a warp

// Consecutive pixels of one image, or all pixels of some: `columns` of `rows`.
struct Piece {
  int64_t image, images, row, rows, column, columns;

  CISC_HD int64_t pixels() const { return rows * columns; }
};

// Pixels [begin, end) of a piece.
struct Span {
  int64_t begin, end;
};

// Weights of the pixels of a piece, and which slots have any.
struct Weights {
  Piece piece;
  int64_t slots, words;    // words of kSlots slots
  int64_t each, segments;  // pixels of a segment of a row, and segments of a row
  int64_t width;           // of the features
  float* weight;           // [images,S,pixels]
  uint32_t* present;       // [images,rows*segments,words], a bit for each slot; unless S = 1

  CISC_HD int64_t first_pixel() const { return piece.row * width + piece.column; }

  __device__ __forceinline__ const float* of(int64_t image, int64_t slot) const {
    return weight + (image * slots + slot) * piece.pixels();
  }

  // The slots of a word that have weight in the segments of these pixels.
  __device__ __forceinline__ uint32_t bits(int64_t image, int64_t word, Span pixels) const {
    if (pixels.begin >= pixels.end) return 0;
    const int64_t last = segment_of(pixels.end - 1);
    uint32_t found = 0;
    for (int64_t t = segment_of(pixels.begin); t <= last; ++t) {
      found |= present[(image * piece.rows * segments + t) * words + word];
    }
    return found;
  }

  __device__ __forceinline__ int64_t segment_of(int64_t pixel) const {
    return pixel / piece.columns * segments + pixel % piece.columns / each;
  }
};

struct Geometry {
  int64_t batch, h, w, height, width;  // features, labels
  double unit() const { return 1.0 / (4.0 * static_cast<double>(height) * static_cast<double>(width)); }
};

struct Gather {
  Geometry g;
  Weights weights;
  const void* labels;  // [B,H,W]
  int64_t label_b, label_y, label_x;
  Classes classes;           // [B,S]
  int64_t tasks, shared_by;  // warps that share a segment
  bool count;
  double unit;
  unsigned long long* totals;  // [B,S], added to: 4 H W times the pixels of a class
  int* invalid;                // set where a class is below -1
};

__device__ __forceinline__ double pixels_of(unsigned long long total, double unit) {
  return static_cast<double>(total) * unit;
}

// Zeros, and NaN if any class is below -1: the result where labels have no pixels.
inline Tensor without_pixels(const Gpu& gpu, const Tensor& classes, const std::vector<int64_t>& size,
                             ScalarType dtype) {
  Tensor result = device_zeros(classes, size, dtype);
  spoil(gpu, classes, result);
  return result;
}

// The weights of one piece after another, and the pixels of the classes.
class Gatherer {
 public:
  // most_images: of a piece
  Gatherer(const Gpu& gpu, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w,
           int64_t most_images = INT64_MAX);

  // count: add this piece's pixels to the totals; each piece does so once
  Weights of(const Piece& piece, bool count);

  const unsigned long long* totals() const { return p_.totals; }
  const int* invalid() const { return p_.invalid; }

 private:
  const Gpu& gpu_;

 public:  // in the order in which one is made from those before
  const Geometry geometry;
  const int64_t slots;
  const std::vector<Piece> pieces;

 private:
  template <typename L>
  Weights launch(bool wide);

  Integer kind_;
  Gather p_;
  Tensor weight_, present_, totals_;
};

}  // namespace cisc::masked_average_pool::device
