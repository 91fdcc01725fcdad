// How the backward sweep of "softmax" on sm_90a cuts its work: shared memory, what a block does, and which
// pixels it meets.
#pragma once

#include "cross_similarity_backward_sweep.cuh"
#include "cross_similarity_groups.cuh"

namespace cisc::cross_similarity::sm90 {
namespace {

constexpr int kHeldRows = kBackwardRows, kStreamedRows = 64;  // of a block, of a tile
static_assert(kHeldRows == kGroups * 64, "a group's product has 64 rows");
constexpr int kHeldBytes = kHeldRows * kChunkBytes,
              kStreamedBytes = kStreamedRows * kChunkBytes;  // of a chunk
constexpr int kMostBackwardStages = 24, kColumnStages = 4;
constexpr int kGatherers = kStreamedRows;  // threads, behind the first warp of the group that brings
constexpr int kGathersRegisters = 56, kSumsRegisters = 224;
constexpr int kGroupsMeet = kTurn + kGroups;  // a named barrier
// Slopes, relative to the incoming gradient, are p (1 + (cosine - value) / temperature). As log2 of the total
// is the weights' entropy in bits, that is less than 1 + ln(pixels) < 22.5. A row's scale is at most 2^-8.
// So slopes times scales times 2^19 stay below 22.5 * 2^11, which float16 has.
constexpr int kSlopeBits = 19;
constexpr int kRestBits = 11;  // what rounding to float16 takes away, is multiplied by so much

// What is known of a streamed row.
struct alignas(16) Column {
  float scale;   // times which it is a unit vector
  float weight;  // of the guide's gradient: incoming gradient, scale and the constants
  float value, log_total;
};

// Shared memory: the held chunks, stages, what is known of the streamed rows, barriers.
struct BackwardBarriers {
  Barrier full[kMostBackwardStages], empty[kMostBackwardStages];
  Barrier columns_full[kColumnStages], columns_empty[kColumnStages], held_full;
  int32_t exponent;              // of a block's slopes: they are relative to 2 to the power of it
  int32_t exponents[kHeldRows];  // of a row's
};

// Behind all tiles a block's sums lie in shared memory, a row of `pitch` for each pixel.
template <int kSlice>
struct Sums {
  static constexpr int kPitch = kSlice * kChunk16 + 1;
  float at[kHeldRows * kPitch];
  double along[kHeldRows];
  int32_t exponent[kHeldRows];
};

// kSlice: chunks of channels that a block makes the gradient of
template <int kSlice>
struct BackwardLayout {
  RowShape shape;
  bool kept;  // all chunks of the held rows, and of one tile; else chunks of both are brought for each step
  int32_t stages;

  CISC_HD static BackwardLayout of(const RowShape& shape) {
    const int64_t left = kSharedBytes - kSwizzleBytes - static_cast<int64_t>(sizeof(BackwardBarriers)) -
                         static_cast<int64_t>(kColumnStages * kStreamedRows * sizeof(Column));
    const int64_t all = shape.all_chunks();
    BackwardLayout layout{shape, left - all * kHeldBytes >= all * kStreamedBytes, 0};
    const int64_t fit = (left - layout.held_chunks() * kHeldBytes) / layout.stage_bytes();
    layout.stages = static_cast<int32_t>(fit < kMostBackwardStages ? fit : kMostBackwardStages);
    return layout;
  }

  CISC_HD int32_t held_chunks() const { return kept ? shape.all_chunks() : 0; }
  CISC_HD int32_t stage_bytes() const { return kStreamedBytes + (kept ? 0 : kHeldBytes); }
  CISC_HD int32_t stage(int32_t number) const { return held_chunks() * kHeldBytes + number * stage_bytes(); }
  CISC_HD int32_t columns() const { return stage(stages); }
  CISC_HD int32_t barriers() const {
    return columns() + static_cast<int32_t>(kColumnStages * kStreamedRows * sizeof(Column));
  }
  CISC_HD int64_t bytes() const {
    const int64_t tiles = barriers() + static_cast<int64_t>(sizeof(BackwardBarriers));
    const auto sums = static_cast<int64_t>(sizeof(Sums<kSlice>));
    return (tiles > sums ? tiles : sums) + kSwizzleBytes;
  }

  // Chunks of a slice, those of the rests behind; a slice that ends behind the last chunk has that again.
  CISC_HD int32_t slice_chunks() const { return shape.split ? 2 * kSlice : kSlice; }
  CISC_HD int32_t slice_chunk(int32_t slice, int32_t number) const {
    const int32_t chunk = slice * kSlice + number % kSlice, last = shape.chunks - 1;
    return (chunk < last ? chunk : last) + number / kSlice * shape.chunks;
  }
};

struct BackwardParameters {
  TensorMap held, streamed;
  BackwardSweep sweep;
  int32_t tiles, slices;  // of an image's held pixels, of channels

  // Steps make the sums of forward, though the roles may be swapped.
  __device__ __forceinline__ int32_t held_chunk(int32_t step) const {
    return sweep.to_query ? sweep.shape.query_chunk(step) : sweep.shape.guide_chunk(step);
  }
  __device__ __forceinline__ int32_t streamed_chunk(int32_t step) const {
    return sweep.to_query ? sweep.shape.guide_chunk(step) : sweep.shape.query_chunk(step);
  }
};

// What a block does.
struct BackwardItem {
  int32_t slice, image;
  int32_t first, behind;  // of the held positions

  __device__ __forceinline__ static BackwardItem of(const BackwardParameters& parameters) {
    const auto number = static_cast<int32_t>(blockIdx.x), tile = number / parameters.slices;
    const auto pixels = static_cast<int32_t>(parameters.sweep.kernel.held.pixels);
    BackwardItem item;
    item.slice = number - tile * parameters.slices;
    item.image = tile / parameters.tiles;
    item.first = (tile - item.image * parameters.tiles) * kHeldRows;
    item.behind = item.first + kHeldRows < pixels ? item.first + kHeldRows : pixels;
    return item;
  }
};

// Streamed positions [begin,end) that held ones [first,behind) meet in a slot.
struct Part {
  int32_t slot, begin, end, first, behind;
};

// All parts of a block's item.
class Parts {
 public:
  __device__ __forceinline__ Parts(const Kernel& p, const BackwardItem& item, bool to_query)
      : p_(p),
        item_(item),
        b_(p.held.first + item.image),
        to_query_(to_query),
        walk_(p.classes.own ? Walk::of_own(item.first, item.behind, p.held.starts_of(b_),
                                           p.streamed.starts_of(b_), class_sort::kBins, kStreamedRows)
                            : Walk::none()) {}

  __device__ __forceinline__ bool next(Part* part) {
    if (p_.classes.own) {
      Segment segment;
      if (!walk_.next(&segment)) return false;
      *part = {0, segment.begin, segment.end, segment.first_query, segment.behind_query};
      return true;
    }
    while (slot_ < p_.slots) {
      const int32_t slot = slot_++;
      const int64_t wanted = p_.classes.at(b_, slot);
      if (wanted < 0 || wanted >= class_sort::kBins) continue;
      const int32_t* starts = (to_query_ ? p_.streamed : p_.held).starts_of(b_) + wanted;
      *part = {slot, 0, static_cast<int32_t>(p_.streamed.pixels), item_.first, item_.behind};
      if (to_query_) {
        part->begin = starts[0];
        part->end = starts[1];
      } else {
        if (part->first < starts[0]) part->first = starts[0];
        if (part->behind > starts[1]) part->behind = starts[1];
      }
      if (part->begin < part->end && part->first < part->behind) return true;
    }
    return false;
  }

 private:
  const Kernel& p_;
  const BackwardItem& item_;
  int64_t b_;
  bool to_query_;
  Walk walk_;
  int32_t slot_ = 0;
};

}  // namespace
}  // namespace cisc::cross_similarity::sm90
