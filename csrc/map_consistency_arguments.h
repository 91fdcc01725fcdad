// What map_consistency is called with.
#pragma once

#include "checks.h"

namespace cisc::map_consistency {

constexpr const char* kName = "map_consistency";
constexpr const char* kSchema =
    "map_consistency(Tensor similarity, Tensor labels, Tensor classes, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor grad)";

// All but the values of classes.
inline void check_arguments(const Tensor& similarity, const Tensor& labels, const Tensor& classes,
                            Place place) {
  check_rank(kName, "similarity", similarity, 4, "[B,S,h,w]");
  check_features(kName, "similarity", similarity.scalar_type());
  check_place(kName, "similarity", similarity, place);
  check_labels(kName, labels, "labels", place);
  check_classes(kName, classes, place);
  check_size(kName, "labels", labels, 0, similarity.size(0), "[B,H,W]");
  check_size(kName, "classes", classes, 0, similarity.size(0), "[B,S]");
  check_size(kName, "classes", classes, 1, similarity.size(1), "[B,S]");
}

}  // namespace cisc::map_consistency
