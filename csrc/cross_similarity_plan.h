// Workspace of cross_similarity's forward on a GPU, by shapes alone. Needs no torch header: _build.plan asks
// the same functions as the launchers.
#pragma once

#include <algorithm>

#include "class_sort.h"
#include "cross_similarity_cuts.h"

namespace cisc::cross_similarity {

constexpr int64_t kImageBytes = 16 << 20, kResultBytes = 24 << 20;  // of workspace
constexpr int64_t kScreenBytes = 40 << 20;   // of results: those of 131072 rows with their candidates fit
constexpr int64_t kPackedBytes = 256 << 20;  // of rows of several images
constexpr int64_t kScalePad = 256;           // scales behind the last row, that the last tile reads
constexpr int64_t kStateBytes = 32, kStepBytes = 8;
constexpr int kFoundAtOnce = 8;  // winners of "topk" that a sweep finds
constexpr int kCandidates = 56;  // of a row and split, that a screening sweep leaves at most

// Both sides of a pair, sorted, and packed as rows of 16-bit numbers where those are so wide.
struct PairSizes {
  int64_t batch, query_pixels, guide_pixels;
  bool own;            // own-label mode: the query is sorted too
  int64_t width;       // of a packed row, or 0
  int64_t byte_width;  // of a row of int8, or 0

  // 32-bit words for so many images: lengths, orders, scales.
  int64_t words(int64_t images) const {
    const auto of = [&](int64_t pixels, bool sorted) {
      const int64_t sorting =
          pixels + class_sort::chunks_of(pixels) * class_sort::kBins + class_sort::kBins + 1;
      const int64_t scales = width > 0 ? images * pixels + kScalePad : 0;
      return images * (3 * pixels + (sorted ? sorting : 0)) + scales;
    };
    return of(query_pixels, own) + of(guide_pixels, true);
  }

  // 16-bit numbers of packed rows.
  int64_t numbers(int64_t images) const { return images * (query_pixels + guide_pixels) * width; }

  // Bytes of rows of int8 and their steps: half as much again as of packed rows, and 8 a pixel.
  int64_t bytes(int64_t images) const {
    const int64_t pixels = images * (query_pixels + guide_pixels);
    return byte_width > 0 ? pixels * byte_width + (pixels + 2 * kScalePad) * kStepBytes : 0;
  }

  // Images whose sides are ready at a time.
  int64_t at_once() const {
    const int64_t fit = kImageBytes / std::max<int64_t>(words(1) * 4, 1);
    const int64_t packed = kPackedBytes / std::max<int64_t>(numbers(1) * 2 + bytes(1), 1);
    return std::min(std::max<int64_t>(fit, 1),
                    std::min(std::max<int64_t>(packed, 1), std::max<int64_t>(batch, 1)));
  }
};

// Winners of a pixel, of the plain kernel's "topk", that are kept in shared memory.
constexpr int64_t kSharedWinners = 32;

// Winners of a pixel that sweeps find, eight with each: for more the plain kernel, which takes one pass for
// all, has less to do.
constexpr int64_t kSweptWinners = 64;

// Whether a sweep compares the pixels, where a chip has one for the reduction.
inline bool is_swept(Reduction reduction, int64_t k, int64_t guide_pixels) {
  return guide_pixels > 0 && (reduction != Reduction::topk || k <= kSweptWinners);
}

// Results of a query row and each split, in bytes, and of a launch at most. What a row has once is counted
// with each.
struct ResultSizes {
  int64_t row_bytes, most_bytes;

  static ResultSizes of_sweep(Reduction reduction, bool screens) {
    const int64_t winners = reduction == Reduction::topk ? 8 * kFoundAtOnce + 8 : 0;
    return {kStateBytes + winners + (screens ? 4 * kCandidates + 8 : 0),
            screens ? kScreenBytes : kResultBytes};
  }

  static ResultSizes of_plain(Reduction reduction, int64_t k) {
    return {kStateBytes + (reduction == Reduction::topk && k <= kSharedWinners ? 8 * k : 0), kResultBytes};
  }

  // Units of a launch.
  int64_t units(const class_sort::Schedule& schedule) const {
    return schedule.units_at_once(most_bytes, row_bytes);
  }

  // Their rows, with each split.
  int64_t rows(const class_sort::Schedule& schedule) const {
    return units(schedule) * schedule.splits * schedule.rows;
  }

  int64_t bytes(const class_sort::Schedule& schedule) const { return rows(schedule) * row_bytes; }
};

// What a call takes. chip: 75, 80, 90: compute capability; "max", "topk" or "softmax" of byte labels, not
// screened; indexed: the index is given too
struct GpuPlan {
  class_sort::Cut cut;
  int64_t splits, images, packed_bytes, other_bytes;

  static GpuPlan of(int chip, int64_t batch, int64_t channels, int64_t query_pixels, int64_t guide_pixels,
                    int64_t slots, bool own, Form form, Reduction reduction, int64_t k, bool indexed) {
    const RowShape shape = RowShape::of(channels, form);
    const bool packs = chip >= 80 && is_swept(reduction, k, guide_pixels);
    const auto cut_of = [&](Reduction by) {
      return !packs ? class_sort::kPlainCut : chip == 90 ? sm90::cut_of(shape, by) : sm80::cut_of(by);
    };
    const auto schedule_of = [&](Reduction by) {
      return class_sort::Schedule::of(batch, slots, query_pixels, guide_pixels, cut_of(by));
    };
    GpuPlan plan{cut_of(reduction), 0, 0, 0, 0};
    if (batch * slots * query_pixels == 0) return plan;
    auto schedule = schedule_of(reduction);
    if (!packs && reduction == Reduction::topk && k > kSharedWinners) schedule.splits = 1;
    int64_t results = (packs ? ResultSizes::of_sweep(reduction, false) : ResultSizes::of_plain(reduction, k))
                          .bytes(schedule);
    // The best cosine's sweep goes before, by the same memory.
    if (packs && indexed && reduction == Reduction::softmax) {
      const auto best = ResultSizes::of_sweep(Reduction::max, false);
      results = std::max(results, best.bytes(schedule_of(Reduction::max)));
    }
    const PairSizes pair{batch, query_pixels, guide_pixels, own, packs ? shape.width() : 0, 0};
    plan.splits = schedule.splits;
    plan.images = pair.at_once();
    plan.packed_bytes = 2 * pair.numbers(plan.images);
    plan.other_bytes = 4 * pair.words(plan.images) + results;
    return plan;
  }
};

}  // namespace cisc::cross_similarity
