// The items of a sweep: a group of query rows and a split of the guide, for a block or a cluster.
#pragma once

#include "cross_similarity_sweep.cuh"

namespace cisc::cross_similarity {

// What a block or cluster does, in turn: the units of the launch, split by split, so that neighbours have the
// same part of the guide.
template <int kColumns>
struct Item {
  int32_t unit, split;  // unit: of those of the launch
  int32_t image, slot;
  int32_t first, behind;  // of the query's positions, in the image

  __device__ __forceinline__ static Item of(const Sweep& p, int32_t number) {
    Item item;
    item.split = number / p.units;
    item.unit = number - item.split * p.units;
    const int32_t of_all = p.first_unit + item.unit, of_slot = of_all / p.tiles;
    item.image = of_slot / p.slots;
    item.slot = of_slot - item.image * p.slots;
    item.first = (of_all - of_slot * p.tiles) * p.rows;
    item.behind = item.first + p.rows < p.query_pixels ? item.first + p.rows : p.query_pixels;
    return item;
  }

  __device__ __forceinline__ Walk walk(const Sweep& p) const {
    const int32_t* guide_starts = p.guide_starts + image * (class_sort::kBins + 1);
    Walk walk = Walk::none();
    if (p.own()) {
      const int32_t* query_starts = p.query_starts + image * (class_sort::kBins + 1);
      walk = Walk::of_own(first, behind, query_starts, guide_starts, p.bins, kColumns);
    } else {
      const int64_t wanted = p.classes.at(p.first_image + image, slot);
      if (wanted < 0 || wanted >= p.bins) return walk;
      walk = Walk::of_class(first, behind, guide_starts, static_cast<int32_t>(wanted), kColumns);
    }
    walk.take(split, p.splits);
    return walk;
  }
};

}  // namespace cisc::cross_similarity
