// Pixels sorted by the class of their label on a GPU, and what of it a tile of pixels has to meet. Shared by
// host and device code; needs no torch header.
//
// A label goes to one of 256 bins. Bytes have a bin for each value; of wider labels those that are no byte
// share the last one, with 255, so that whoever meets it compares the labels too. The sort is stable: in
// chunks of items, the bins are counted; counts become places; each bin's items go to their place in order
// (class_sort.cuh).
#pragma once

#include <cstdint>

#include "bilinear.h"

namespace cisc::class_sort {

constexpr int kBins = 256;
constexpr int kChunk = 1024;      // items
constexpr int kTile = 64;         // pixels that are compared together
constexpr int64_t kBlocks = 512;  // that a launch should have: several for each multiprocessor of a large GPU
constexpr int64_t kLeastTiles = 4;  // of the streamed side, that are worth a block

CISC_HD int32_t bin_of(int64_t label) {
  return label >= 0 && label < kBins - 1 ? static_cast<int32_t>(label) : kBins - 1;
}

CISC_HD int64_t chunks_of(int64_t items) { return ceil_div(items, kChunk); }

// Positions of a sorted side that a tile has to meet: ranges one after the other, none twice.
struct SkipList {
  int32_t count;
  int32_t begin[kTile];
  int32_t behind[kTile];  // numbers of positions up to the end of a range

  CISC_HD void clear() { count = 0; }

  CISC_HD int64_t length() const { return count > 0 ? behind[count - 1] : 0; }

  CISC_HD void add(int64_t from, int64_t to) {
    if (from >= to) return;
    const int64_t before = length();
    begin[count] = static_cast<int32_t>(from);
    behind[count] = static_cast<int32_t>(before + to - from);
    ++count;
  }

  // Rows of a tile whose bins never fall, each with its bin's range [from,to) on the other side.
  CISC_HD void add_rows(const int32_t* bins, const int32_t* from, const int32_t* to, int rows) {
    for (int row = 0; row < rows; ++row) {
      if (row == 0 || bins[row] != bins[row - 1]) add(from[row], to[row]);
    }
  }

  // The position that comes as number `at` < length().
  CISC_HD int64_t position(int64_t at) const {
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (at < behind[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return begin[low] + (at - (low > 0 ? behind[low - 1] : 0));
  }
};

// What a block does.
struct Job {
  int64_t image, slot, tile, split;
};

// How tiles are cut, and how many blocks there should be.
struct Cut {
  int64_t rows;     // of the one side, that are a tile
  int64_t columns;  // of the other side, that are met together
  int64_t blocks;   // at least, where there is enough to do
  // That a large GPU runs at a time, and whose last round is to be full; 0: it does not matter.
  int64_t at_once = 0;
};

constexpr int64_t kBlockColumns = 2;  // times cut.columns, that take as long as a block's begin and end
constexpr int64_t kMostSplits = 32;   // for the sake of a full round
constexpr int64_t kWorth = 25;        // a part of the time that is to be saved by more splits

constexpr Cut kPlainCut{kTile, kTile, kBlocks};

// Tiles of one side, in order of images and slots; each meets what it has to of the other side in `splits`
// blocks.
struct Schedule {
  int64_t images, slots, tiles, splits, rows;  // rows: of a tile

  // By shapes alone, so that a sum has the same parts on every GPU. pixels, streamed: of an image
  CISC_HD static Schedule of(int64_t images, int64_t slots, int64_t pixels, int64_t streamed, Cut cut) {
    Schedule s{images, slots, ceil_div(pixels, cut.rows), 1, cut.rows};
    const int64_t all = s.units();
    if (all == 0) return s;
    const int64_t columns = ceil_div(streamed, cut.columns), most = columns / kLeastTiles;
    const int64_t wanted = ceil_div(cut.blocks, all);
    s.splits = wanted < most ? wanted : most;
    if (s.splits < 1) s.splits = 1;
    if (cut.at_once > 0) s.splits = fastest(all, columns, most, cut.at_once);
    return s;
  }

  // Splits with which rounds of so many blocks take the least time; more of them only where that is worth it.
  CISC_HD static int64_t fastest(int64_t units, int64_t columns, int64_t most, int64_t at_once) {
    int64_t best = 1, least = 0;
    for (int64_t splits = 1; splits <= kMostSplits && (splits == 1 || splits <= most); ++splits) {
      const int64_t time = ceil_div(units * splits, at_once) * (ceil_div(columns, splits) + kBlockColumns);
      if (splits == 1 || time * kWorth < least * (kWorth - 1)) {
        best = splits;
        least = time;
      }
    }
    return best;
  }

  CISC_HD int64_t units() const { return images * slots * tiles; }

  CISC_HD Job job(int64_t unit, int64_t split) const {
    return {unit / tiles / slots, unit / tiles % slots, unit % tiles, split};
  }

  // Units whose blocks' results fit together, one for each of the tile's pixels and each split.
  CISC_HD int64_t units_at_once(int64_t bytes, int64_t pixel_bytes) const {
    const int64_t fit = bytes / (splits * rows * pixel_bytes);
    return fit < 1 ? 1 : fit < units() ? fit : units();
  }

  // First of the list's tiles that a split meets; that of the next split is behind its last.
  CISC_HD int64_t first_tile(const SkipList& list, int64_t split) const {
    return ceil_div(list.length(), kTile) * split / splits;
  }
};

}  // namespace cisc::class_sort
