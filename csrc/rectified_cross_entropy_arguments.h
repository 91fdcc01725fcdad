// What rectified_cross_entropy is called with.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "rectified_cross_entropy.h"
#include "work.h"

namespace cisc::rectified_cross_entropy {

constexpr const char* kForward = "rectified_cross_entropy";
constexpr const char* kBackward = "rectified_cross_entropy_backward";

constexpr const char* kSchema =
    "rectified_cross_entropy(Tensor logits, Tensor labels, Tensor? similarity, Tensor? classes, "
    "int ignore_index, str reduction, float? ohem_threshold, int ohem_min_kept, bool need_grad) "
    "-> (Tensor loss, Tensor grad)";
constexpr const char* kBackwardSchema =
    "rectified_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? similarity, "
    "Tensor? classes, int ignore_index, float? ohem_threshold, int ohem_min_kept) -> Tensor";

using MaybeTensor = std::optional<Tensor>;

// All but the values of labels and classes.
inline void check_arguments(const char* op, const Tensor& logits, const Tensor& labels,
                            const MaybeTensor& similarity, const MaybeTensor& classes, int64_t ohem_min_kept,
                            Place place) {
  check_rank(op, "logits", logits, 4, "[B,K,h,w]");
  check_features(op, "logits", logits.scalar_type());
  check_place(op, "logits", logits, place);
  check_labels(op, labels, "labels", place);
  check_size(op, "labels", labels, 0, logits.size(0), "[B,H,W]");
  check(logits.size(1) > 0, op, "logits must have at least one class");
  check(logits.size(1) < INT32_MAX / kStep, op, "logits have too many classes, ", logits.size(1));
  check(similarity.has_value() || !classes.has_value(), op, "classes needs similarity");
  if (similarity.has_value()) {
    check_rank(op, "similarity", *similarity, 4, "[B,S,h',w']");
    check_features(op, "similarity", similarity->scalar_type());
    check_place(op, "similarity", *similarity, place);
    check_size(op, "similarity", *similarity, 0, logits.size(0), "[B,S,h',w']");
    if (classes.has_value()) {
      check_classes(op, *classes, place);
      check_size(op, "classes", *classes, 0, logits.size(0), "[B,S]");
      check_size(op, "classes", *classes, 1, similarity->size(1), "[B,S]");
    } else {
      check_size(op, "similarity", *similarity, 1, 1, "[B,1,h',w']");
    }
  }
  check(ohem_min_kept >= 0, op, "ohem_min_kept must not be negative, got ", ohem_min_kept);
}

inline void check_reduction(const std::string& reduction) {
  check(reduction == "none" || reduction == "mean" || reduction == "valid_mean" || reduction == "sum",
        kForward, "reduction must be 'mean', 'valid_mean', 'sum' or 'none', got '", reduction, "'");
}

}  // namespace cisc::rectified_cross_entropy
