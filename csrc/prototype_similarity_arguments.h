// What prototype_similarity and its gradient are called with.
#pragma once

#include <algorithm>
#include <limits>

#include "checks.h"
#include "prototype_similarity.h"

namespace cisc::prototype_similarity {

constexpr const char* kForward = "prototype_similarity";
constexpr const char* kBackward = "prototype_similarity_backward";
constexpr const char* kSchema = "prototype_similarity(Tensor query, Tensor prototypes, float eps) -> Tensor";
constexpr const char* kBackwardSchema =
    "prototype_similarity_backward(Tensor grad, Tensor query, Tensor prototypes, float eps) "
    "-> (Tensor, Tensor)";

inline void check_arguments(const char* op, const Tensor& query, const Tensor& prototypes, Place place) {
  check_rank(op, "query", query, 4, "[B,C,h,w]");
  check_features(op, "query", query.scalar_type());
  check_place(op, "query", query, place);
  check_rank(op, "prototypes", prototypes, 3, "[B,S,C]");
  check_features(op, "prototypes", prototypes.scalar_type());
  check_place(op, "prototypes", prototypes, place);
  check_size(op, "prototypes", prototypes, 0, query.size(0), "[B,S,C]");
  check_size(op, "prototypes", prototypes, 2, query.size(1), "[B,S,C]");
}

// The root of a sum of squares is 0 or far above that: with it, 0 is below any eps.
inline float norm_limit(double eps) {
  return std::max(static_cast<float>(eps), std::numeric_limits<float>::min());
}

}  // namespace cisc::prototype_similarity
