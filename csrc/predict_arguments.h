// What predict is called with.
#pragma once

#include <optional>

#include "checks.h"
#include "predict.h"

namespace cisc::predict {

constexpr const char* kSchema =
    "predict(Tensor logits, SymInt height, SymInt width, Tensor? labels, int ignore_index) "
    "-> (Tensor classes, Tensor confusion)";

inline void check_arguments(const char* op, const Tensor& logits, int64_t height, int64_t width,
                            const std::optional<Tensor>& labels, Place place) {
  check_rank(op, "logits", logits, 4, "[B,K,h,w]");
  check_features(op, "logits", logits.scalar_type());
  check_place(op, "logits", logits, place);
  check(logits.size(1) >= 1 && logits.size(1) <= kMaxClasses, op, "logits must have 1 to ", kMaxClasses,
        " classes, got ", logits.size(1));
  check(height >= 0 && width >= 0, op, "size must not be negative, got ", height, " x ", width);
  if (labels.has_value()) {
    check_labels(op, *labels, "labels", place);
    check_size(op, "labels", *labels, 0, logits.size(0), "[B,H,W]");
    check_size(op, "labels", *labels, 1, height, "[B,H,W]");
    check_size(op, "labels", *labels, 2, width, "[B,H,W]");
  }
  if (logits.size(0) > 0 && height > 0 && width > 0) check_sides(op, logits, height, width);
}

}  // namespace cisc::predict
