// Sampling along one axis, bilinear or nearest, exactly. Shared by host and device code; needs no torch
// header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CISC_HD __host__ __device__ __forceinline__
#else
// Never out of line: one compiled for a large instruction set must not serve the others.
#define CISC_HD inline __attribute__((always_inline))
#endif

namespace cisc {

// a / b, rounded up
CISC_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An output pixel lies between two input pixels: value = (1 - part/whole) * input[low] + part/whole *
// input[high]. Integers, so that a sum of weights is exact and in no order. At the last input, high = low and
// part = 0.
struct Tap {
  int64_t low;
  int64_t high;
  int64_t part;
  int64_t whole;  // the same for every pixel of an axis

  template <typename T>
  CISC_HD T weight_high() const {
    return static_cast<T>(part) / static_cast<T>(whole);
  }
  template <typename T>
  CISC_HD T weight_low() const {
    return static_cast<T>(whole - part) / static_cast<T>(whole);
  }
};

// Source position of output pixel `dst` (0 <= dst < out) on an axis of `in` >= 1 input pixels:
//   align_corners = false: ((2 dst + 1) in - out) / (2 out), not below 0, as in torch's interpolate
//   align_corners = true:  dst (in - 1) / (out - 1), 0 where out = 1
CISC_HD Tap bilinear_tap(int64_t dst, int64_t in, int64_t out, bool align_corners) {
  Tap tap;
  int64_t position;
  if (align_corners) {
    tap.whole = out > 1 ? out - 1 : 1;
    position = out > 1 ? dst * (in - 1) : 0;
  } else {
    tap.whole = 2 * out;
    position = (2 * dst + 1) * in - out;
    position = position > 0 ? position : 0;
  }
  tap.low = position / tap.whole;
  const bool last = tap.low + 1 >= in;
  tap.part = last ? 0 : position - tap.low * tap.whole;
  tap.high = last ? in - 1 : tap.low + 1;
  tap.low = last ? in - 1 : tap.low;
  return tap;
}

// Input pixel that output pixel `dst` takes by "nearest-exact": floor((dst + 1/2) in / out), in integers.
CISC_HD int64_t nearest_source(int64_t dst, int64_t in, int64_t out) {
  return (2 * dst + 1) * in / (2 * out);
}

// First output pixel whose `low` is at least `index`; `out` if there is none. `low` never falls along the
// axis.
CISC_HD int64_t first_output(int64_t index, int64_t in, int64_t out, bool align_corners) {
  int64_t begin = 0, end = out;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (bilinear_tap(middle, in, out, align_corners).low >= index) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

}  // namespace cisc
