// Which tiles a group of query pixels meets on tensor cores, and in which steps their products are made.
// Shared by host and device code; needs no torch header.
#pragma once

#include <cstdint>

#include "class_sort.h"

namespace cisc::cross_similarity {

constexpr int kChunk16 = 64;  // numbers of 16 bits of a row that are multiplied in one step

// How vectors become rows of 16-bit numbers.
enum class Form : int32_t {
  exact,    // as they are, but for a power of two
  rounded,  // unit vectors times 256 in float16
  split     // the same, and behind it what rounding took away
};

// Of 16-bit numbers, `width` = chunks of 64 for the channels, twice as many where they are split.
struct RowShape {
  int32_t chunks;
  bool split;

  CISC_HD static RowShape of(int64_t channels, Form form) {
    return {static_cast<int32_t>(channels > 0 ? ceil_div(channels, kChunk16) : 1), form == Form::split};
  }

  CISC_HD int32_t all_chunks() const { return split ? 2 * chunks : chunks; }
  CISC_HD int64_t width() const { return static_cast<int64_t>(all_chunks()) * kChunk16; }

  // Steps of a product, the smallest first: rest times rest, where few channels leave errors no room to even
  // out; rounded times rest; rest times rounded; rounded times rounded.
  CISC_HD int32_t passes() const { return !split ? 1 : chunks == 1 ? 4 : 3; }
  CISC_HD int32_t steps() const { return passes() * chunks; }
  CISC_HD int32_t query_chunk(int32_t step) const {
    const int32_t gone = gone_passes(step), left = passes() - gone;
    return step - gone * chunks + (left == 4 || left == 2 ? chunks : 0);
  }
  CISC_HD int32_t guide_chunk(int32_t step) const {
    const int32_t gone = gone_passes(step), left = passes() - gone;
    return step - gone * chunks + (left >= 3 ? chunks : 0);
  }

 private:
  // step / chunks, of four passes at the most: a division would take as long as a step's products.
  CISC_HD int32_t gone_passes(int32_t step) const {
    return (step >= chunks ? 1 : 0) + (step >= 2 * chunks ? 1 : 0) + (step >= 3 * chunks ? 1 : 0);
  }
};

// Neighbouring tiles of a range of the guide's rows, and the query's rows that they are compared with.
struct Segment {
  int32_t begin, end;                 // of the guide's positions
  int32_t first_tile, end_tile;       // of the range, cut into tiles from its begin on
  int32_t first_query, behind_query;  // positions
};

// The segments that a group of the query's positions [first,behind) meets in one split of several.
class Walk {
 public:
  CISC_HD static Walk none() { return {0, 0, nullptr, nullptr, 0, 0, 1}; }

  // One class: all of the group meets its range.
  CISC_HD static Walk of_class(int32_t first, int32_t behind, const int32_t* guide_starts, int32_t bin,
                               int32_t columns) {
    return {first, behind, nullptr, guide_starts, bin, bin + 1, columns};
  }

  // Own label: the group's bins, below `bins`, each meets its own range. Positions are sorted by bins.
  CISC_HD static Walk of_own(int32_t first, int32_t behind, const int32_t* query_starts,
                             const int32_t* guide_starts, int32_t bins, int32_t columns) {
    const int32_t count = query_starts[bins];
    Walk walk{first, behind < count ? behind : count, query_starts, guide_starts, 0, bins, columns};
    if (walk.first_ >= walk.behind_) {
      walk.bin_ = bins;
      return walk;
    }
    // The last bin that begins at the group's first position or in front of it.
    int32_t low = 0, high = bins - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (query_starts[middle] <= first) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    walk.bin_ = low;
    while (walk.bins_ > low + 1 && query_starts[walk.bins_ - 1] >= walk.behind_) --walk.bins_;
    return walk;
  }

  // Tiles of all segments.
  CISC_HD int32_t tiles() const {
    int32_t sum = 0;
    for (int32_t bin = bin_; bin < bins_; ++bin) sum += meets(bin) ? tiles_of(bin) : 0;
    return sum;
  }

  // Leave only those of a split.
  CISC_HD void take(int32_t split, int32_t splits) {
    if (splits == 1) return;
    const int32_t all = tiles();
    first_tile_ = static_cast<int32_t>(static_cast<int64_t>(all) * split / splits);
    end_tile_ = static_cast<int32_t>(static_cast<int64_t>(all) * (split + 1) / splits);
  }

  // Where a walk stands: the same one begun anew goes on from there.
  struct Mark {
    int32_t bin, passed;
  };

  CISC_HD Mark mark() const { return {bin_, passed_}; }
  CISC_HD void go_on(const Mark& mark) {
    bin_ = mark.bin;
    passed_ = mark.passed;
  }

  CISC_HD bool next(Segment* segment) {
    for (; bin_ < bins_; ++bin_) {
      const int32_t tiles = meets(bin_) ? tiles_of(bin_) : 0;
      const int32_t low = first_tile_ > passed_ ? first_tile_ - passed_ : 0;
      const int32_t high = end_tile_ - passed_ < tiles ? end_tile_ - passed_ : tiles;
      passed_ += tiles;
      if (low >= high) continue;
      segment->begin = guide_starts_[bin_];
      segment->end = guide_starts_[bin_ + 1];
      segment->first_tile = low;
      segment->end_tile = high;
      segment->first_query = first_query(bin_);
      segment->behind_query = behind_query(bin_);
      ++bin_;
      return true;
    }
    return false;
  }

 private:
  CISC_HD Walk(int32_t first, int32_t behind, const int32_t* query_starts, const int32_t* guide_starts,
               int32_t bin, int32_t bins, int32_t columns)
      : first_(first),
        behind_(behind),
        query_starts_(query_starts),
        guide_starts_(guide_starts),
        bin_(bin),
        bins_(bins),
        columns_(columns) {}

  CISC_HD int32_t first_query(int32_t bin) const {
    if (query_starts_ == nullptr || query_starts_[bin] < first_) return first_;
    return query_starts_[bin];
  }
  CISC_HD int32_t behind_query(int32_t bin) const {
    if (query_starts_ == nullptr || query_starts_[bin + 1] > behind_) return behind_;
    return query_starts_[bin + 1];
  }
  CISC_HD bool meets(int32_t bin) const { return first_query(bin) < behind_query(bin); }
  CISC_HD int32_t tiles_of(int32_t bin) const {
    return (guide_starts_[bin + 1] - guide_starts_[bin] + columns_ - 1) / columns_;
  }

  int32_t first_, behind_;
  const int32_t *query_starts_, *guide_starts_;
  int32_t bin_, bins_, columns_;
  int32_t first_tile_ = 0, end_tile_ = INT32_MAX, passed_ = 0;
};

// A place in a ring of stages, and the parity of the round.
struct Ring {
  int32_t stage = 0;
  uint32_t parity = 0;

  CISC_HD void next(int32_t stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace cisc::cross_similarity
