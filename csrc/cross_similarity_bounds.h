// Unit vectors as rows of int8, and the bounds between which their cosines then lie. Shared by host and
// device code; needs no torch header.
//
// A unit vector u becomes a q + e: q whole numbers up to 127, the step a = max|u| / 127, e what rounding has
// left. With another one, g = b p + f, and S = <q,p>,
//
//   <u,g> = <aq,bp> + <u,f> + <e,bp>,   |<u,g> - a b S| <= |f| + |e| |bp| <= |f| (1 + |e|) + |e|.
//
// Of a pair, V = b S + slope |f| with slope = (1 + |e|) / a, and W = b S - slope |f| - margin with
// margin = 2 (|e| + slack) / a, differ from the bounds of cosine / a by one number that is the row's: the
// cosine is below a V + |e| + slack and above a W + |e| + slack. So whoever has V <= W of another pair of
// the row is no best one.
#pragma once

#include <cmath>
#include <cstdint>

#include "bilinear.h"

namespace cisc::cross_similarity {

// Of a row. A vector that is not finite has q = 0 and an infinite error, so that V is infinite.
struct alignas(8) Step {
  float step, error;  // a > 0, and more than |e|
};

constexpr float kQuantum = 127.0f;
// Channels whose products' sum is an int32.
constexpr int64_t kMostScreened = INT32_MAX / static_cast<int64_t>(kQuantum * kQuantum);
// What a row's numbers and their scale may be off from the unit vector that cosines are computed from, in its
// length: a unit vector's components and the scale are rounded to 2^-24 of them; of two float16 the second
// one is rounded, to 2^-22 of the whole, or to 2^-33 of the unit vector's length, for each of C channels,
// which comes to less than 2^-24 for C up to kMostScreened; the step is rounded to 2^-24.
constexpr double kRowError = 0x1p-20;
// The same, more, of numbers that are rounded to float16: 2^-11.
constexpr double kRoundedError = 0x1p-11;
constexpr double kMore = 1.0 + 0x1p-20;  // more than what few roundings of float32 take away

// How a row of numbers becomes one of int8.
struct Quantiser {
  float step, inverse;

  // most: the largest magnitude; 0 if the row has a NaN
  CISC_HD static Quantiser of(float most) {
    return {most > 0.0f ? most / kQuantum : 1.0f, most > 0.0f ? kQuantum / most : 0.0f};
  }

  CISC_HD int8_t at(float value) const {
    return inverse > 0.0f ? static_cast<int8_t>(static_cast<int>(::rintf(value * inverse))) : int8_t{0};
  }

  // What rounding has left.
  CISC_HD float rest(float value, int8_t number) const {
    return ::fmaf(-step, static_cast<float>(number), value);
  }

  // rests: the sum of squares of what was left; scale: times which the row is a unit vector
  CISC_HD Step of_unit(bool finite, double rests, float scale, bool rounded) const {
    if (!finite) return {1.0f, HUGE_VALF};
    const double error =
        ::sqrt(rests) * static_cast<double>(scale) * kMore + kRowError + (rounded ? kRoundedError : 0.0);
    return {step * scale, static_cast<float>(error * kMore)};
  }
};

// Of a query row, what its bounds are made of, in units of its step.
struct Bounds {
  float slope, margin;

  // What is not in a row's error, twice over: a float32 cosine, whose sum of C products has a rounding for
  // every 8th of them, 3 among the threads that share them and a few of factors; and V and W themselves, four
  // roundings of numbers up to 10 / a.
  CISC_HD static float slack(int64_t channels) {
    return static_cast<float>(static_cast<double>(channels + 512) * 0x1p-26);
  }

  CISC_HD static Bounds of(const Step& query, float slack) {
    const double error = static_cast<double>(query.error), step = static_cast<double>(query.step);
    return {static_cast<float>((1.0 + error) / step * kMore),
            static_cast<float>(2.0 * (error + static_cast<double>(slack)) / step * kMore)};
  }

  // What V is above, of whatever has a float32 cosine above this one. It is off by less than what `slack`
  // holds beside Bounds::slack.
  CISC_HD static float of_cosine(const Step& query, float cosine, float slack) {
    const double own = static_cast<double>(query.error) + static_cast<double>(slack);
    return static_cast<float>((static_cast<double>(cosine) - own) / static_cast<double>(query.step));
  }

  // V of a pair of rows with the product `sum`.
  CISC_HD float most(int32_t sum, const Step& guide) const {
    return ::fmaf(guide.error, slope, static_cast<float>(sum) * guide.step);
  }

  // W, by V. It is infinite where V is: a cosine that is NaN is better than all.
  CISC_HD float least(float most, float guide_error) const {
    return most < HUGE_VALF ? ::fmaf(-2.0f * guide_error, slope, most) - margin : HUGE_VALF;
  }
};

}  // namespace cisc::cross_similarity
