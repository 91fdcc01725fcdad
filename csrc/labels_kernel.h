// Labels of a row as int32 codes; part of the kernels, see simd.h.
#pragma once

#include <type_traits>

#include "labels.h"
#include "simd.h"

namespace cisc {
namespace {

// codes[i] = the label where it lies in [0, num_classes), kIgnored where it is ignore_index, else kInvalid.
// Whether any is invalid.
template <typename L>
inline bool class_codes(const L* row, int64_t stride, int64_t n, int64_t num_classes, int64_t ignore_index,
                        int32_t* codes) {
  // uint8 labels are compared as int32: vectors of them are twice as wide. What no uint8 can be is -3.
  using Wide = typename ::std::conditional<sizeof(L) == 1, int32_t, int64_t>::type;
  const bool narrow = sizeof(L) == 1;
  const Wide limit = static_cast<Wide>(narrow && num_classes > 256 ? 256 : num_classes);
  const Wide ignored =
      static_cast<Wide>(narrow && (ignore_index < 0 || ignore_index > 255) ? -3 : ignore_index);
  int32_t invalid = 0;
  const auto one = [&](int64_t i, L label) {
    const Wide value = static_cast<Wide>(label);
    const int32_t inside = value >= 0 && value < limit ? static_cast<int32_t>(value) : kInvalid;
    codes[i] = value == ignored ? kIgnored : inside;
    invalid |= codes[i] == kInvalid;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) one(i, row[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) one(i, row[i * stride]);
  }
  return invalid != 0;
}

// Slots of labels: the slot of a label's class, kInvalid for a label of another class, kIgnored for
// ignore_index.
struct SlotCodes {
  Slots::View slots;
  int64_t ignore_index;
  int32_t small[256];  // of labels below 256

  SlotCodes(const Slots::View& view, int64_t ignored) : slots(view), ignore_index(ignored) {
    for (int64_t label = 0; label < 256; ++label) small[label] = search(label);
  }

  int32_t search(int64_t label) const {
    const int32_t slot = slots.find(label);
    return label == ignore_index ? kIgnored : slot < 0 ? kInvalid : slot;
  }

  // codes[i] of row[i * stride], i < n
  template <typename L>
  void fill(const L* row, int64_t stride, int64_t n, int32_t* codes) const {
    for (int64_t i = 0; i < n; ++i) {
      const auto label = static_cast<int64_t>(row[i * stride]);
      codes[i] = sizeof(L) == 1 || static_cast<uint64_t>(label) < 256 ? small[label] : search(label);
    }
  }
};

// f(pointer to label [b,y,x] of its own type)
template <typename Function>
inline auto with_labels(const Labels& labels, int64_t b, int64_t y, int64_t x, Function&& f) {
  const int64_t offset = b * labels.stride_b + y * labels.stride_y + x * labels.stride_x;
  switch (labels.kind) {
    case Integer::u8:
      return f(static_cast<const uint8_t*>(labels.data) + offset);
    case Integer::i32:
      return f(static_cast<const int32_t*>(labels.data) + offset);
    default:
      return f(static_cast<const int64_t*>(labels.data) + offset);
  }
}

}  // namespace
}  // namespace cisc
