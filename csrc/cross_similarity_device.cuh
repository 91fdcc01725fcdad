// What both directions of cross_similarity share on a GPU: lengths of vectors, pixels sorted by class, tiles
// of 64 x 64 cosines.
//
// Plain float32 for every chip. A cosine is summed in the same order wherever its pixels stand and whichever
// of the two images stays, so that equal vectors tie exactly and backward meets the bits of forward.
#pragma once

#include <algorithm>

#include "class_sort.cuh"
#include "cross_similarity_arguments.h"
#include "cross_similarity_plan.h"
#include "cross_similarity_state.cuh"
#include "device.cuh"
#include "tensors.h"

namespace cisc::cross_similarity {
namespace {

using class_sort::kBins;
using class_sort::kTile;
using class_sort::Schedule;
using class_sort::SkipList;

constexpr int kThreads = 256;
constexpr int kParts = kThreads / kTile;  // threads that share a pixel
constexpr int kDepth = 16;                // channels at hand
constexpr int kPitch = kTile + 4;         // of rows in shared memory: rows start in other banks, aligned
constexpr int kColumns = kTile / kParts;  // of a tile, that a thread reduces
constexpr int kMicro = 4;                 // products of a thread: 4 x 4
constexpr int kMicros = kTile / kMicro;   // threads along a side of the tile

static_assert(kDepth == kParts * kMicro && kThreads * kMicro * kMicro == kTile * kTile, "a thread's share");
static_assert(kThreads == kBins, "a thread has a bin");

}  // namespace

// What functions of other files are given.
namespace on_gpu {

// The classes [B,S] that are asked for; none in own-label mode, where there is one slot.
struct SlotClasses : Classes {
  bool own;
};

// One image of each pair. Workspace holds the images from `first` on.
struct Side {
  Image<const void*> image;
  int64_t channels, width, height, pixels, first;
  float *scale, *rest, *low;  // [images,pixels]: 1 / length is scale * (rest + low), NaN if not finite
  Labels labels;
  int64_t label_height, label_width;
  int32_t* order;   // [images,pixels], sorted by bins; null: as they lie
  int32_t* starts;  // [images,kBins + 1]

  __device__ int64_t offset(int64_t b, int64_t pixel) const {
    const bool linear = image.stride_y == width * image.stride_x;
    const int64_t y = linear ? 0 : pixel / width;
    return b * image.stride_b + y * image.stride_y + (pixel - y * width) * image.stride_x;
  }

  __device__ int64_t label(int64_t b, int64_t pixel) const {
    return labels.at(b, nearest_source(pixel / width, label_height, height),
                     nearest_source(pixel % width, label_width, width));
  }

  __device__ const int32_t* starts_of(int64_t b) const { return starts + (b - first) * (kBins + 1); }

  // Pixels in the order.
  __device__ int64_t count(int64_t b) const { return order != nullptr ? starts_of(b)[kBins] : pixels; }

  // A component of a pixel's unit vector.
  __device__ __forceinline__ float unit(int64_t b, int64_t pixel, int64_t channel) const;

  __device__ int64_t pixel_at(int64_t b, int64_t position) const {
    return order != nullptr ? order[(b - first) * pixels + position] : position;
  }
};

__device__ __forceinline__ float read_element(Float kind, const void* data, int64_t at) {
  return with_elements(kind, data, [&](const auto* elements) { return elements[at].widen(); });
}

__device__ __forceinline__ void write_element(Float kind, void* data, int64_t at, float value) {
  with_elements(kind, data, [&](auto* elements) { elements[at] = elements[at].narrow(value); });
}

// Every step-th channel of a pixel, from that at `offset` on; 0 behind the first `count` channels.
template <int n>
__device__ __forceinline__ void read_channels(const Image<const void*>& image, int64_t offset, int step,
                                              int64_t count,
                                              // outputs
                                              float (&values)[n]) {
  with_elements(image.kind, image.data, [&](const auto* elements) {
    const auto* from = elements + offset;
#pragma unroll
    for (int i = 0; i < n; ++i) values[i] = i * step < count ? from[i * step * image.stride_c].widen() : 0.0f;
  });
}

// A component of a unit vector. Short vectors are not divided by a length whose inverse overflows, nor long
// ones multiplied by one that is rounded: a power of two brings them near 1 first.
__device__ __forceinline__ float unit_of(float value, float scale, float rest, float low) {
  const float near = scale == 0.0f ? 0.0f : value * scale;
  return fmaf(near, rest, near * low);
}

__device__ __forceinline__ float Side::unit(int64_t b, int64_t pixel, int64_t channel) const {
  const int64_t place = (b - first) * pixels + pixel;
  return unit_of(read_element(image.kind, image.data, offset(b, pixel) + channel * image.stride_c),
                 scale[place], rest[place], low[place]);
}

// Whether pixels of an image are compared whose labels are no bytes, so that their bin has others, too.
__device__ inline bool meets_shared_bin(const Side& query, const Side& guide, const SlotClasses& classes,
                                        int64_t b) {
  const auto has_any = [&](const Side& side) {
    const int32_t* starts = side.starts_of(b) + kBins - 1;
    return starts[0] < starts[1];
  };
  if (classes.own) return has_any(query) && has_any(guide);
  for (int64_t slot = 0; slot < classes.slots; ++slot) {
    if (classes.at(b, slot) >= kBins - 1) return true;
  }
  return false;
}

}  // namespace on_gpu

using namespace on_gpu;

namespace {

// A power of two in halves, as the whole may be none that float32 has.
__device__ __forceinline__ float times_power(float value, int exponent) {
  const int half = exponent / 2;
  return value * ::ldexpf(1.0f, half) * ::ldexpf(1.0f, exponent - half);
}

// 1 / the length of a vector, as scale * (rest + low).
struct Length {
  double norm;
  bool finite, exists;  // exists: finite, and long enough to have a direction
  float scale, rest, low;
};

__device__ inline Length inverse_length(double norm, double eps) {
  constexpr double kLeast = std::numeric_limits<float>::min();
  const bool finite = norm - norm == 0.0;
  Length length{norm, finite, finite && norm >= eps && norm >= kLeast, 0.0f, finite ? 0.0f : kNan, 0.0f};
  if (!length.exists) return length;
  int exponent = 0;
  ::frexp(norm, &exponent);
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  length.scale = ::ldexpf(1.0f, -exponent);
  const double wanted = 1.0 / (norm * static_cast<double>(length.scale));
  length.rest = static_cast<float>(wanted);
  length.low = static_cast<float>(wanted - static_cast<double>(length.rest));
  return length;
}

// Bins of pixels by their labels.
struct LabelBins {
  Side side;
  bool ignores;
  int64_t ignore_index;

  __device__ int32_t operator()(int64_t image, int64_t item) const {
    const int64_t label = side.label(side.first + image, item);
    return ignores && label == ignore_index ? -1 : class_sort::bin_of(label);
  }
};

// Pixels of a tile, in shared memory.
struct Pixels {
  int64_t offset[kTile], label[kTile];
  int32_t pixel[kTile];  // -1: none
  float scale[kTile], rest[kTile], low[kTile];

  // position: in the side's order, or -1 for none; label: what stands for that of the pixel, where given
  __device__ void set(const Side& side, int64_t b, int at, int64_t position, bool given, int64_t value) {
    pixel[at] = -1;
    offset[at] = label[at] = 0;
    scale[at] = rest[at] = low[at] = 0.0f;
    if (position < 0) return;
    const int64_t of = side.pixel_at(b, position), place = (b - side.first) * side.pixels + of;
    pixel[at] = static_cast<int32_t>(of);
    offset[at] = side.offset(b, of);
    label[at] = given ? value : side.label(b, of);
    scale[at] = side.scale[place];
    rest[at] = side.rest[place];
    low[at] = side.low[place];
  }

  __device__ float unit(const Side& side, int at, int64_t channel) const {
    if (pixel[at] < 0 || channel >= side.channels) return 0.0f;
    const float value =
        read_element(side.image.kind, side.image.data, offset[at] + channel * side.image.stride_c);
    return unit_of(value, scale[at], rest[at], low[at]);
  }
};

// A block's 64 pixels that stay, 64 of those that pass, and their cosines.
struct Tile {
  Pixels held, streamed;
  SkipList list;                                // positions of the streamed side
  int32_t bins[kTile], from[kTile], to[kTile];  // of the held pixels; their ranges in another side
  alignas(16) float held_units[kDepth * kPitch], streamed_units[kDepth * kPitch];  // [channel,pixel]
  alignas(16) float cosines[kTile * kPitch];                                       // [streamed,held]
};

// Whether two pixels of the tile are compared.
__device__ __forceinline__ bool compared(const Tile& tile, int held, int streamed) {
  return tile.held.pixel[held] >= 0 && tile.streamed.pixel[streamed] >= 0 &&
         tile.held.label[held] == tile.streamed.label[streamed];
}

__device__ __forceinline__ void fetch(const Side& side, const Pixels& pixels, int64_t first,
                                      // outputs
                                      float (&values)[kMicro]) {
  const int at = threadIdx.x % kTile;
  const int64_t channel = first + threadIdx.x / kTile;
  const bool inside = pixels.pixel[at] >= 0;
  const int64_t offset = pixels.offset[at] + channel * side.image.stride_c;
  read_channels(side.image, offset, kParts, inside ? side.channels - channel : 0, values);
}

__device__ __forceinline__ void put_units(const Pixels& pixels, const float (&values)[kMicro],
                                          // outputs
                                          float* units) {
  const int at = threadIdx.x % kTile, part = threadIdx.x / kTile;
  const float scale = pixels.scale[at], rest = pixels.rest[at], low = pixels.low[at];
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    units[(part + i * kParts) * kPitch + at] = unit_of(values[i], scale, rest, low);
  }
}

// sums += the products of 16 rows [16,64] of each, 4 x 4 of them for each thread
__device__ __forceinline__ void add_products(const float* a, const float* b,
                                             // outputs
                                             float (&sums)[kMicro][kMicro]) {
  const int row = threadIdx.x / kMicros * kMicro, column = threadIdx.x % kMicros * kMicro;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const auto left = read_pack<kMicro>(a + k * kPitch + row);
    const auto right = read_pack<kMicro>(b + k * kPitch + column);
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) sums[i][j] = fmaf(left.at[i], right.at[j], sums[i][j]);
    }
  }
}

// Cosines of the held pixels with the streamed ones, to tile.cosines; -inf for those that are not compared.
// The pixels are in place before, with a barrier behind; afterwards there has been one. ahead: read channels
// while those before are multiplied, which takes 8 registers.
template <bool ahead = true>
__device__ __forceinline__ void compute_cosines(const Side& held, const Side& streamed, Tile& tile) {
  float sums[kMicro][kMicro] = {};
  float held_values[kMicro], streamed_values[kMicro];
  if (ahead) fetch(held, tile.held, 0, held_values);
  if (ahead) fetch(streamed, tile.streamed, 0, streamed_values);
  for (int64_t c = 0; c < held.channels; c += kDepth) {
    if (!ahead) fetch(held, tile.held, c, held_values);
    if (!ahead) fetch(streamed, tile.streamed, c, streamed_values);
    put_units(tile.held, held_values, tile.held_units);
    put_units(tile.streamed, streamed_values, tile.streamed_units);
    __syncthreads();
    if (ahead) fetch(held, tile.held, c + kDepth, held_values);
    if (ahead) fetch(streamed, tile.streamed, c + kDepth, streamed_values);
    // In pieces of a few channels: a sum of many terms of one sign would lose a rounding to each.
    float piece[kMicro][kMicro] = {};
    add_products(tile.streamed_units, tile.held_units, piece);
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) sums[i][j] += piece[i][j];
    }
    __syncthreads();
  }
  const int row = threadIdx.x / kMicros * kMicro, column = threadIdx.x % kMicros * kMicro;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    Pack<float, kMicro> pack;
#pragma unroll
    for (int j = 0; j < kMicro; ++j) {
      pack.at[j] = compared(tile, column + j, row + i) ? sums[i][j] : -kInfinity;
    }
    write_pack(tile.cosines + (row + i) * kPitch + column, pack);
  }
  __syncthreads();
}

// The ranges of a side that has the labels of the held pixels, to tile.list. Held pixels come by bins that
// never fall. With barriers.
__device__ __forceinline__ void list_bins_of_held(const Side& other, int64_t b, Tile& tile) {
  const int at = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (at < kTile) {
    const bool held = tile.held.pixel[at] >= 0;
    const int32_t bin = held ? class_sort::bin_of(tile.held.label[at]) : -1;
    tile.bins[at] = bin;
    tile.from[at] = held ? other.starts_of(b)[bin] : 0;
    tile.to[at] = held ? other.starts_of(b)[bin + 1] : 0;
  }
  __syncthreads();
  if (at == 0) {
    tile.list.clear();
    tile.list.add_rows(tile.bins, tile.from, tile.to, kTile);
  }
  __syncthreads();
}

// One range, to tile.list. With barriers.
__device__ __forceinline__ void list_range(int64_t begin, int64_t end, Tile& tile) {
  __syncthreads();
  if (threadIdx.x == 0) {
    tile.list.clear();
    tile.list.add(begin, end);
  }
  __syncthreads();
}

// The list's tile `number` of a side, or what there is of it. With no barrier.
__device__ __forceinline__ void set_streamed(const Side& side, int64_t b, int64_t number, bool given,
                                             int64_t value, Tile& tile) {
  const int at = static_cast<int>(threadIdx.x);
  if (at >= kTile) return;
  const int64_t place = number * kTile + at;
  tile.streamed.set(side, b, at, place < tile.list.length() ? tile.list.position(place) : -1, given, value);
}

// All arguments on one GPU.
inline void check_devices(const Inputs& in) {
  const auto same = [&](const char* name, const Tensor& tensor) {
    check_same_device(in.op, name, tensor, in.query);
  };
  same("guide", in.guide);
  same("guide_labels", in.guide_labels);
  if (in.classes) same("classes", *in.classes);
  if (in.query_labels) same("query_labels", *in.query_labels);
}

}  // namespace
}  // namespace cisc::cross_similarity
