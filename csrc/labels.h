// Labels of a row as codes, and the classes of an image. Needs no torch header.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "bilinear.h"

namespace cisc {

enum class Integer : int32_t { u8, i32, i64 };  // what a tensor of labels holds

// Labels [B,H,W] read in place.
struct Labels {
  Integer kind;
  const void* data;
  int64_t stride_b, stride_y, stride_x;

  CISC_HD int64_t at(int64_t b, int64_t y, int64_t x) const {
    const int64_t offset = b * stride_b + y * stride_y + x * stride_x;
    switch (kind) {
      case Integer::u8:
        return static_cast<const uint8_t*>(data)[offset];
      case Integer::i32:
        return static_cast<const int32_t*>(data)[offset];
      default:
        return static_cast<const int64_t*>(data)[offset];
    }
  }
};

// Classes [B,S] read in place.
struct Classes {
  bool wide;  // int64, else int32
  const void* data;
  int64_t batch, slots, stride_b, stride_s;

  CISC_HD int64_t at(int64_t b, int64_t slot) const {
    const int64_t offset = b * stride_b + slot * stride_s;
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

constexpr int32_t kIgnored = -1, kInvalid = -2;  // codes that are no class

// Classes of one image without repetition; a slot is a position among them. Every label has the slot of its
// class, or -1.
struct Slots {
  std::vector<int64_t> large;  // classes of 256 and more, ascending
  std::vector<int32_t> large_slot;
  std::array<int32_t, 256> small;  // slot of a label below 256
  std::vector<int32_t> of_column;  // [S], -1 where the class is -1
  int64_t count = 0;

  // row: classes [S], each at least -1
  explicit Slots(const std::vector<int64_t>& row) {
    std::vector<int64_t> sorted;
    for (const int64_t value : row) {
      if (value >= 0) sorted.push_back(value);
    }
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    small.fill(-1);
    count = static_cast<int64_t>(sorted.size());
    for (int32_t slot = 0; slot < count; ++slot) {
      if (sorted[slot] < 256) {
        small[sorted[slot]] = slot;
      } else {
        large.push_back(sorted[slot]);
        large_slot.push_back(slot);
      }
    }
    for (const int64_t value : row) of_column.push_back(value < 0 ? -1 : view().find(value));
  }

  // What kernels see of it.
  struct View {
    const int32_t* small;
    const int64_t* large;
    const int32_t* large_slot;
    int64_t n_large;

    CISC_HD int32_t find(int64_t label) const {
      if (static_cast<uint64_t>(label) < 256) return small[label];
      int64_t begin = 0, end = n_large;
      while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (large[middle] < label) {
          begin = middle + 1;
        } else {
          end = middle;
        }
      }
      return begin < n_large && large[begin] == label ? large_slot[begin] : -1;
    }
  };

  View view() const {
    return {small.data(), large.data(), large_slot.data(), static_cast<int64_t>(large.size())};
  }
};

}  // namespace cisc
