// Pixels of a feature map sorted by the class of their label, stably. Needs no torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bilinear.h"
#include "labels.h"

namespace cisc {

// Pixels of one class: positions [begin, begin + count) of the order, behind them those that are `spoilt`,
// which are not finite. Each ascending.
struct Group {
  int32_t slot;  // of the class, or -1: all pixels, of whatever class
  int64_t begin, count, spoilt;
};

struct ByClass {
  std::vector<int32_t> order;     // pixels; empty: as they lie
  std::vector<Group> groups;      // ascending by slot, none empty
  std::vector<int32_t> group_of;  // [slots], -1: no pixel

  int64_t pixel(int64_t position) const {
    return order.empty() ? position : order[static_cast<size_t>(position)];
  }

  const int32_t* data() const { return order.empty() ? nullptr : order.data(); }

  // The groups that one of a slot in the other image is compared with, as a range.
  std::pair<int64_t, int64_t> partners(int32_t slot) const {
    if (slot < 0 || group_of.empty()) return {0, static_cast<int64_t>(groups.size())};
    const int64_t own = group_of[static_cast<size_t>(slot)];
    return {own, own < 0 ? own : own + 1};
  }

  // The group of a slot, or null.
  const Group* find(int32_t slot) const {
    const int32_t group = group_of[static_cast<size_t>(slot)];
    return group < 0 ? nullptr : &groups[static_cast<size_t>(group)];
  }
};

// All pixels in one group.
inline ByClass all_pixels(int64_t pixels) {
  ByClass all;
  if (pixels > 0) all.groups.push_back({-1, 0, pixels, 0});
  return all;
}

// codes: [pixels], slots or -1; spoilt(pixel): whether it goes behind the others
template <typename Spoilt>
ByClass sort_by_class(const std::vector<int32_t>& codes, int64_t slots, const Spoilt& spoilt) {
  ByClass sorted;
  // Of each slot the pixels that are finite, then those that are not.
  std::vector<int64_t> next(static_cast<size_t>(2 * slots + 1), 0);
  const auto bin = [&](size_t pixel) {
    return static_cast<size_t>(2 * codes[pixel] + (spoilt(static_cast<int64_t>(pixel)) ? 1 : 0));
  };
  for (size_t pixel = 0; pixel < codes.size(); ++pixel) {
    if (codes[pixel] >= 0) ++next[bin(pixel) + 1];
  }
  sorted.group_of.assign(static_cast<size_t>(slots), -1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const auto at = static_cast<size_t>(2 * slot);
    const int64_t count = next[at + 1], behind = next[at + 2];
    next[at + 1] += next[at];
    next[at + 2] += next[at + 1];
    if (count + behind == 0) continue;
    sorted.group_of[static_cast<size_t>(slot)] = static_cast<int32_t>(sorted.groups.size());
    sorted.groups.push_back({static_cast<int32_t>(slot), next[at], count, behind});
  }
  // One more, so that data() is not taken for "as they lie" where no pixel is of a class.
  sorted.order.resize(static_cast<size_t>(next.back()) + 1);
  for (size_t pixel = 0; pixel < codes.size(); ++pixel) {
    if (codes[pixel] < 0) continue;
    sorted.order[static_cast<size_t>(next[bin(pixel)]++)] = static_cast<int32_t>(pixel);
  }
  return sorted;
}

// slot_of(label) for each pixel of an h x w map, to which labels [H,W] of image b are brought by
// "nearest-exact".
template <typename SlotOf>
std::vector<int32_t> codes_of(const Labels& labels, int64_t b, int64_t height, int64_t width, int64_t h,
                              int64_t w, const SlotOf& slot_of) {
  std::vector<int32_t> codes;
  if (h * w == 0) return codes;
  codes.reserve(static_cast<size_t>(h * w));
  std::vector<int64_t> columns;
  for (int64_t x = 0; x < w; ++x) columns.push_back(nearest_source(x, width, w));
  int64_t last = labels.at(b, nearest_source(0, height, h), columns[0]);
  int32_t slot = slot_of(last);
  for (int64_t y = 0; y < h; ++y) {
    const int64_t row = nearest_source(y, height, h);
    for (const int64_t column : columns) {
      const int64_t label = labels.at(b, row, column);
      if (label != last) {
        last = label;
        slot = slot_of(label);
      }
      codes.push_back(slot);
    }
  }
  return codes;
}

// The finite pixels of the groups in pieces of `unit`, numbered through; a piece is of one group.
class Cut {
 public:
  Cut(const ByClass& sorted, int64_t unit) : unit_(unit), first_{0} {
    for (const Group& group : sorted.groups) {
      first_.push_back(first_.back() + (group.count + unit - 1) / unit);
    }
  }

  int64_t unit() const { return unit_; }
  int64_t count() const { return first_.back(); }
  int64_t first(int64_t group) const { return first_[static_cast<size_t>(group)]; }

  // The group of a piece.
  int64_t group(int64_t piece) const {
    return std::upper_bound(first_.begin(), first_.end(), piece) - first_.begin() - 1;
  }

 private:
  int64_t unit_;
  std::vector<int64_t> first_;  // [groups + 1]
};

}  // namespace cisc
