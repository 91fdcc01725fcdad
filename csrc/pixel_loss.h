// Losses of one pixel, forward and backward. Shared by host and device code; needs no torch header.
//
// Written for any arithmetic type T that has +, -, *, / and, declared before this file is included,
// select(mask, a, b), less(a, b), at_most(a, b), min, max, log and quotient(a, b): a float of the device
// (device.cuh), or a vector of the host (simd.h).
#pragma once

#include "bilinear.h"

namespace cisc {

// Upsampled similarity, brought to [0, 1]; NaN stays. `zero` and `one` are T's.
template <typename T>
CISC_HD T clamp_similarity(T value, T zero, T one) {
  return min(one, max(zero, value));  // min and max give their second operand where either is NaN
}

// |1[labels = class] - similarity|
template <typename T, typename Mask>
CISC_HD T consistency_gap(Mask is_class, T similarity, T one) {
  return select(is_class, one - similarity, similarity);
}

// Binary cross-entropy of p = clamp(similarity) against 1[labels = class], with logs floored at -100, and its
// derivative to the similarity before clamping: 0 outside the open interval (0, 1) and below the floor.
template <typename T, typename Mask>
CISC_HD T binary_cross_entropy(Mask is_class, T similarity, T zero, T one, T* derivative) {
  const T p = clamp_similarity(similarity, zero, one);
  const T floor = zero - (one * 100.0f);
  const T probability = select(is_class, p, one - p);
  const T log_probability = log(probability);
  const auto flat = at_most(p, zero) | at_most(one, p) | less(log_probability, floor);
  *derivative = select(flat, zero, quotient(select(is_class, zero - one, one), probability));
  return zero - max(floor, log_probability);
}

// Derivative of a pixel's weighted cross-entropy to one of its logits u: weight * (softmax(u) - 1[label =
// class]). scale = weight / sum of the exponentials.
template <typename T, typename Mask>
CISC_HD T cross_entropy_slope(Mask is_class, T exponential, T scale, T weight, T zero) {
  return exponential * scale - select(is_class, weight, zero);
}

}  // namespace cisc
