// How cross_similarity cuts its work, and what its kernels are given. Needs no torch header.
//
// The pixels of one image are held: a tile of them lies along the vectors' lanes. Those of the other are
// streamed past, in panels of a few. Both are packed in bounded pieces, sorted by class, so that no product
// is made between pixels of different classes and no mask is needed. The query is held, but for the guide's
// gradient of "softmax", where the roles are swapped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "bilinear.h"
#include "convert.h"
#include "isa.h"
#include "work.h"

namespace cisc::cross_similarity {

enum class Reduction : int32_t { max, topk, softmax, mean };

constexpr const char* kReductionNames[] = {"max", "topk", "softmax", "mean"};

// false where there is no such name.
inline bool find_reduction(const std::string& name, Reduction* to) {
  for (int32_t i = 0; i < 4; ++i) {
    if (name != kReductionNames[i]) continue;
    *to = static_cast<Reduction>(i);
    return true;
  }
  return false;
}

struct Shape {
  int64_t tile;   // held pixels
  int64_t panel;  // streamed pixels
};

// What registers hold, by instruction set.
constexpr Shape shape_of(Isa isa) {
  return isa == Isa::portable ? Shape{8, 6} : isa == Isa::avx2 ? Shape{16, 6} : Shape{32, 12};
}

constexpr int64_t kPieceBytes = 16 << 20;   // panels packed at a time
constexpr int64_t kBlockBytes = 512 << 10;  // of panels that stay in the second cache
constexpr int64_t kHeldBytes = 256 << 10;   // of tiles that a thread packs at a time
constexpr int64_t kStatePixels = 1 << 18;   // held pixels that panels are packed for
constexpr int64_t kSumsBytes = 16 << 20;    // gradients to unit vectors at hand
constexpr int64_t kEntries = 1 << 20;       // pairs of pixels in lists at hand
constexpr int64_t kThreadsBytes = 8 << 20;  // what threads hold, all together
constexpr int64_t kSlopeRows = 288;         // streamed pixels whose slopes are at hand, a multiple of panels
constexpr int64_t kMeasured = 256;          // pixels of a task of `measure`
constexpr int64_t kParameters = 3;          // of a query pixel in "softmax": see Parameter

// What is kept of each held pixel from one piece to the next.
enum Field : int32_t { kBest, kIndex, kTop, kTotal, kTotalLost, kWeighted, kWeightedLost, kFields };

// Gradient and value of a query pixel, and log2 of the sum of exp((cosine - value) / temperature).
enum Parameter : int32_t { kGrad, kValue, kLogTotal };

// Tiles and panels of two images, and what they take.
struct Plan {
  Shape shape;
  int64_t depth;         // words of 32 bits of a packed pixel
  int64_t row_words;     // of a panel in pairs of pixels, or 0
  int64_t panels;        // of a piece
  int64_t block;         // panels that many tiles pass in turn
  int64_t tiles;         // of a task, at most
  int64_t held_tiles;    // whose state, or sums, are at hand
  int64_t fields;        // floats of state of a held pixel; channels where it is a gradient
  int64_t thread_bytes;  // workspace of a thread
};

// pairs: bfloat16 in pairs of channels; backward: of "softmax"
inline Plan plan(Shape shape, int64_t channels, int64_t held, int64_t streamed, bool pairs, bool backward,
                 Reduction reduction) {
  Plan p;
  p.shape = shape;
  p.depth = std::max<int64_t>(pairs ? ceil_div(channels, 2) : channels, 1);
  p.row_words = pairs && backward ? channels * shape.panel / 2 : 0;
  const int64_t panel_bytes = 4 * (shape.panel * (p.depth + 1 + (backward ? kParameters : 0)) + p.row_words);
  const int64_t tile_bytes = 4 * shape.tile * (p.depth + 1);
  p.panels = std::max<int64_t>(std::min(kPieceBytes / panel_bytes, ceil_div(streamed, shape.panel)), 1);
  p.block = std::max<int64_t>(kBlockBytes / panel_bytes, 1);
  p.tiles = std::max<int64_t>(kHeldBytes / tile_bytes, 1);
  p.fields = backward                          ? channels
             : reduction == Reduction::topk    ? 0
             : reduction == Reduction::softmax ? static_cast<int64_t>(kFields)
                                               : kIndex + 1;
  const int64_t most =
      backward ? kSumsBytes / std::max<int64_t>(4 * channels * shape.tile, 1) : kStatePixels / shape.tile;
  p.held_tiles = std::clamp<int64_t>(most, 1, std::max<int64_t>(ceil_div(held, shape.tile), 1));
  p.tiles = std::min(p.tiles, p.held_tiles);
  p.thread_bytes = p.tiles * tile_bytes;
  if (backward) p.thread_bytes += 4 * shape.tile * (kSlopeRows + kParameters);
  return p;
}

// 1 / length of a vector is scale * (rest + low): a power of two, 0 for what is shorter than eps or not
// finite, times a number about 1, NaN for what is not finite.
struct Lengths {
  float *scale, *rest, *low;  // [pixels]
};

// Sizes of a call, by which its workspace is known.
struct Problem {
  Shape shape;
  int64_t channels, query, guide, slots, k;  // query, guide: pixels
  Reduction reduction;
  bool pairs;

  Plan plan(bool held_is_query, bool backward, Reduction by) const {
    return cross_similarity::plan(shape, channels, held_is_query ? query : guide,
                                  held_is_query ? guide : query, pairs, backward, by);
  }
};

// Pixels whose gradients to unit vectors are at hand together.
inline int64_t summed_pixels(int64_t channels) {
  return std::max<int64_t>(kSumsBytes / (4 * std::max<int64_t>(channels, 1)), 1);
}

// Query pixels whose winners are in lists together.
inline int64_t listed_pixels(int64_t channels, int64_t winners) {
  return std::clamp<int64_t>(kEntries / std::max<int64_t>(winners, 1), 1, summed_pixels(channels));
}

// Of threads that take `items` in turn.
inline int64_t shared_bytes(int64_t threads, int64_t items, int64_t bytes) {
  return crew_size(threads, items, bytes, kThreadsBytes) * bytes;
}

inline int64_t sweep_bytes(const Plan& p, int64_t threads, bool parameters) {
  const int64_t held = p.held_tiles * p.shape.tile;
  const int64_t panel = p.shape.panel * (p.depth + 1 + (parameters ? kParameters : 0)) + p.row_words;
  return 4 * p.panels * panel + 4 * held * p.fields + shared_bytes(threads, p.held_tiles, p.thread_bytes);
}

// What a call takes beyond its results.
inline int64_t workspace_bytes(const Problem& p, int64_t threads, bool backward) {
  constexpr int64_t kOrder = 4, kCode = 4, kEntry = 8, kSum = 4, kOffset = 8;
  const int64_t both = p.query + p.guide, winners = p.reduction == Reduction::topk ? p.k : 1;
  const int64_t tile_bytes = 4 * p.shape.tile * (2 * p.channels + 2 + p.shape.panel);
  const auto tiles_bytes = [&](int64_t pixels) {
    return shared_bytes(threads, ceil_div(pixels, p.shape.tile), tile_bytes);
  };
  const auto rows_bytes = [&](int64_t pixels) { return shared_bytes(threads, p.channels, 4 * pixels); };
  int64_t bytes = 0;
  if (p.reduction == Reduction::mean) {
    const int64_t means = ceil_div(p.slots, p.shape.panel) * p.shape.panel * p.channels * kSum;
    const int64_t lists = backward ? kEntry * (kEntries + p.query) + 2 * means : kEntry * p.guide;
    bytes =
        2 * means + lists + rows_bytes(std::max(p.query, p.guide)) + tiles_bytes(std::max(p.query, p.guide));
    if (!backward) bytes += sweep_bytes(p.plan(true, false, Reduction::max), threads, false);
  } else if (!backward) {
    bytes = sweep_bytes(p.plan(true, false, p.reduction), threads, false);
  } else if (p.reduction == Reduction::softmax) {
    bytes = std::max(sweep_bytes(p.plan(true, true, p.reduction), threads, false),
                     sweep_bytes(p.plan(false, true, p.reduction), threads, true)) +
            tiles_bytes(std::max(p.query, p.guide));
  } else {
    const int64_t queries = std::min(listed_pixels(p.channels, p.slots * winners), p.query);
    const int64_t guides = std::min(summed_pixels(p.channels), p.guide), all = p.query * p.slots * winners;
    const int64_t to_query = queries * (p.slots * winners * kEntry + kOffset + p.channels * kSum) +
                             rows_bytes(p.guide) + tiles_bytes(queries);
    const int64_t to_guide = std::min(all, std::max(kEntries, p.query * p.slots)) * kEntry +
                             guides * (2 * kOffset + p.channels * kSum) + 4 * p.guide + rows_bytes(p.query) +
                             tiles_bytes(guides);
    bytes = std::max(to_query, to_guide);
  }
  return bytes + both * (12 + kOrder) + std::max(p.query, p.guide) * kCode + p.slots * 2 * kOffset;
}

// What forward gives, of a query pixel and slot: similarity, the index where it is asked for, winners or
// totals.
inline int64_t output_bytes(Reduction reduction, int64_t k, bool indexed) {
  constexpr int64_t kValue = 4, kIndex = 8;
  const int64_t saved = reduction == Reduction::topk      ? kIndex * k
                        : reduction == Reduction::softmax ? kValue
                                                          : 0;
  return kValue + (indexed || reduction == Reduction::max ? kIndex : 0) + saved;
}

// A byte of each pixel of the guide, and in own-label mode of the query.
inline int64_t label_bytes(int64_t query_pixels, int64_t guide_pixels, bool own) {
  return guide_pixels + (own ? query_pixels : 0);
}

// Of one pair of images of which all pixels are of one class.
inline Work work(const Problem& p, int64_t query_bytes, int64_t guide_bytes, bool own, bool indexed,
                 bool backward) {
  const int64_t pairs = p.query * p.guide, both = p.query + p.guide;
  const int64_t winners = (p.reduction == Reduction::topk ? p.k : 1) * p.slots;
  const int64_t operands = p.channels * (p.query * query_bytes + p.guide * guide_bytes);
  const int64_t outputs = p.query * p.slots * output_bytes(p.reduction, p.k, indexed);
  Work w;
  // Lengths, scaling; reductions: a scaled product, a comparison.
  w.flops = 6 * p.channels * both;
  w.bytes = 2 * operands + label_bytes(p.query, p.guide, own) + (backward ? 4 * p.query * p.slots : outputs);
  if (p.reduction == Reduction::mean) {
    w.flops += 2 * p.channels * both * p.slots * (backward ? 2 : 1);
    w.bytes += operands;
  } else if (!backward) {
    w.flops += pairs * (2 * p.channels + 2);
    if (p.reduction == Reduction::softmax) w.flops += pairs * (kFunction + 5);
    const Plan plan = p.plan(true, false, p.reduction);
    const int64_t pieces = ceil_div(ceil_div(p.guide, p.shape.panel), plan.panels);
    w.bytes += (pieces - 1) * p.channels * p.query * query_bytes;
  } else if (p.reduction == Reduction::softmax) {
    // The cosines twice, and a product each way.
    w.flops += 2 * pairs * (4 * p.channels + kFunction + 9);
    w.bytes += 2 * operands + 8 * p.query * p.slots;
  } else {
    w.flops += 4 * p.channels * p.query * winners + 6 * p.channels * both;
    w.bytes += 2 * operands + 8 * p.query * winners;
  }
  return w;
}

// An image as kernels read it.
struct Pixels {
  Image<const void*> image;  // stride_b is not looked at
  int64_t channels, width, pixels;
  Lengths lengths;
};

// Pixels order[first], ..., order[first + n - 1]; no order: first, first + 1, ...
struct Positions {
  const int32_t* order;
  int64_t first, n;

  CISC_HD int64_t operator[](int64_t i) const { return order != nullptr ? order[first + i] : first + i; }
};

// A candidate of "topk".
struct Entry {
  float value;
  int32_t index;
};

// Panels of one class that pass a tile.
struct Run {
  // Words of 32 bits: unit vectors in float32; or bfloat16, channels 2c and 2c + 1, as unit vectors over
  // `rest`.
  const float* held;           // [depth,tile]
  const float* held_rest;      // [tile]
  const float* streamed;       // [panels,depth,panel]
  const float* streamed_rest;  // [panels,panel]
  int64_t depth, rows;         // words of a pixel, streamed pixels: the last panel may be cut short
  // Forward
  int32_t first;       // position of the first streamed pixel in the order of its image
  bool begins;         // these are the first of their class
  float* state;        // [fields,tile]; "topk" has none
  void* const* heaps;  // [tile] candidates of "topk", worst first; null behind the last pixel
  int64_t k, seen;     // of "topk": how many are wanted, and how many of the class have passed before
  float steepness;     // log2(e) / temperature
  // Backward of "softmax"
  const float* streamed_rows;  // [panels,channels,panel / 2]: bfloat16 of pixels 2r and 2r + 1, if in pairs
  int64_t channels;
  float inverse_temperature;
  const float* held_parameters;      // [kParameters,tile], or null where they are streamed
  const float* streamed_parameters;  // [panels,kParameters,panel]
  float* slopes;                     // [kSlopeRows,tile], for the time being
  float* sums;                       // [channels,tile], added to
};

// Entries start[i] .. start[i + 1] - 1 of segment i: pixels and their weights.
struct Segments {
  int64_t count;
  const int64_t* start;
  const int32_t* pixel;
  const float* weight;
};

struct Kernels {
  // Fills the lengths of n <= kMeasured pixels.
  void (*measure)(const Pixels&, double eps, int64_t first, int64_t n);
  // to: [depth,tile] or [depth,panel]; rest: [tile] or [panel], 1 for unit vectors; 0 for what is
  // shorter than eps or not finite, and behind the last pixel
  void (*pack_tile)(const Pixels&, const Positions&, bool pairs, float* to, float* rest);
  void (*pack_panel)(const Pixels&, const Positions&, bool pairs, float* to, float* rest);
  void (*reduce)(Reduction, bool pairs, bool index, const Run&);
  // streamed: [depth,panel] in pairs of channels; to: [channels,panel / 2] in pairs of pixels
  void (*pair_rows)(const float* streamed, int64_t channels, float* to);
  void (*back)(bool pairs, const Run&);
  // to: [panel,tile], the products of a tile with a panel, held and streamed in float32
  void (*products)(const float* held, const float* streamed, int64_t depth, float* to);
  // sums [channels,tile] += slopes [rows,tile] times panels
  void (*add_products)(const float* slopes, const float* streamed, int64_t rows, int64_t channels,
                       float* sums);
  // to: [segments], sums over a channel, weighted; row: [pixels], of the thread
  void (*segment_sums)(const Pixels&, int64_t channel, const Segments&, float* row, float* to);
  // From gradients to unit vectors, sums[c * stride + i], to those of the pixels; tile: [channels + 1,tile]
  void (*finish)(const Pixels&, const Positions&, const float* sums, int64_t stride, const Image<void*>& to,
                 float* tile);
};
extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

}  // namespace cisc::cross_similarity
