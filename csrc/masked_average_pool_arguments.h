// What masked_average_pool and its gradient are called with.
#pragma once

#include "checks.h"
#include "masked_average_pool.h"

namespace cisc::masked_average_pool {

constexpr const char* kForward = "masked_average_pool";
constexpr const char* kBackward = "masked_average_pool_backward";
constexpr const char* kSchema =
    "masked_average_pool(Tensor features, Tensor labels, Tensor classes, float eps) -> Tensor";
constexpr const char* kBackwardSchema =
    "masked_average_pool_backward(Tensor grad, Tensor labels, Tensor classes, SymInt h, SymInt w, "
    "float eps, ScalarType dtype) -> Tensor";

inline void check_common(const char* op, const Tensor& labels, const Tensor& classes, int64_t images,
                         int64_t height, int64_t width, Place place) {
  check_labels(op, labels, "labels", place);
  check_classes(op, classes, place);
  check_size(op, "labels", labels, 0, images, "[B,H,W]");
  check_size(op, "classes", classes, 0, images, "[B,S]");
  check(classes.size(1) <= kMaxClasses, op, "classes must have at most ", kMaxClasses, " columns, got ",
        classes.size(1));
  check(labels.size(1) * labels.size(2) <= kMaxLabels, op, "labels must have at most ", kMaxLabels,
        " pixels per image, got ", labels.size(1), " x ", labels.size(2));
  check((height > 0 && width > 0) || labels.numel() == 0, op, "features must have at least one pixel, got ",
        height, " x ", width);
}

inline void check_forward(const Tensor& features, const Tensor& labels, const Tensor& classes, Place place) {
  check_rank(kForward, "features", features, 4, "[B,C,h,w]");
  check_features(kForward, "features", features.scalar_type());
  check_place(kForward, "features", features, place);
  check_common(kForward, labels, classes, features.size(0), features.size(2), features.size(3), place);
}

inline void check_backward(const Tensor& grad, const Tensor& labels, const Tensor& classes, int64_t h,
                           int64_t w, ScalarType dtype, Place place) {
  check_rank(kBackward, "grad", grad, 3, "[B,S,C]");
  check_dtype(kBackward, "grad", grad.scalar_type(), {ScalarType::Float}, "float32");
  check_place(kBackward, "grad", grad, place);
  check_features(kBackward, "dtype", dtype);
  check(h >= 0 && w >= 0, kBackward, "h and w must not be negative, got ", h, " x ", w);
  check_common(kBackward, labels, classes, grad.size(0), h, w, place);
  check_size(kBackward, "grad", grad, 1, classes.size(1), "[B,S,C]");
}

}  // namespace cisc::masked_average_pool
