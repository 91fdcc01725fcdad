// rectified_cross_entropy on a GPU: a thread has a cell of low-resolution logits and goes through the classes
// for their largest corner, for the sums of the exponentials, and for the gradient.
//
// Work: for a pixel and class, of 4 x 4 in a cell, the largest corner takes an instruction, the sum 5 and an
// exponential, the gradient 10 and another one, and a pixel some 60 for its label, logarithm and weight: at B
// = 16, K = 19, 721 x 721 that is 3.4 G, with what neighbouring warps go through both 3.8 G, of 132 x 128 a
// clock at 1.75 GHz, 128 us, beside 95 us of exponentials, of which a multiprocessor takes 16 a clock. The
// bytes are 20 us.
//
// The exponentials are taken relative to the largest corner of a cell, which bounds all its pixels. Where a
// pixel lies so far below that its sum gets tiny, the maximum of each pixel is found first.
//
// So it is, too, for the probabilities by which hard pixels are chosen: equal logits must have equal ones,
// and three launches must find the same, to the last bit: they have one function. Loss and gradient of the
// chosen are then those that the same pixels have without the choice.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "adjoint.cuh"
#include "pixel_loss.h"
#include "rectified_cross_entropy_arguments.h"
#include "tensors.h"

namespace cisc::rectified_cross_entropy {

namespace {

using cells::Adjoint;
using cells::Axis;
using cells::Carry;
using cells::CarryPlan;
using cells::Classes;
using cells::Column;
using cells::Corners;
using cells::Divisor;
using cells::kLanes;
using cells::kMost;
using cells::Maps;
using cells::Passage;
using cells::Piece;
using cells::Square;
using cells::State;
using cells::Walk;

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kLeast = 0x1p-64f, kLargest = 0x1p64f;  // between them a sum has lost no term that counts
constexpr float kWidest = 120.0f;                       // of two exponentials, their ratio is a float
constexpr int64_t kWarps = 8;                           // that keep a multiprocessor busy
constexpr int kSmall = 2;        // pixels of a piece along an axis where cells have no more
constexpr int64_t kCopies = 16;  // of a histogram, which fewer threads add to
constexpr int kDigits = static_cast<int>(kHistogram), kGroup = 256, kGroups = kDigits / kGroup;

enum class Mode { loss, gradient, histogram };

// Maps [B,S,h',w'] of any of the element types.
struct Similarity {
  Float kind;
  const void* data;
  int64_t slots;  // 0: no weights
  int64_t stride_b, stride_s, stride_y, stride_x;
  Axis rows, columns;

  __device__ __forceinline__ float at(int64_t offset) const {
    switch (kind) {
      case Float::f32:
        return static_cast<const float*>(data)[offset];
      case Float::bf16:
        return static_cast<const BFloat16*>(data)[offset].widen();
      default:
        return static_cast<const Float16*>(data)[offset].widen();
    }
  }
};

// Where the probability of a rank lies: its leading digit, and the rank among those that have it.
struct Search {
  long long digit, rank;
};

struct Kernel {
  Walk walk;
  float step;    // fraction of a cell from pixel to pixel along a row
  float widest;  // range of log2(e) logits in a cell from which on Powers might lose some
  int64_t planes;
  Labels labels;
  int64_t ignore_index;
  Similarity maps;
  Classes classes;     // of null: the map is each pixel's likeness to its own label
  const float* limit;  // [], largest probability of a pixel that is kept; null: all are
  const float* given;  // [B,H,W] gradient of each pixel, or null
  int64_t given_b, given_y, given_x;
  Divisor by;  // of the gradient
  double divisor;
  const Search* search;  // null while leading digits are counted
  float* carry;          // [blocks, of a warp], or null where it is in shared memory
  uint8_t* left;         // [tasks], 1 where the general kernel has to do it; null: it does all
  State* state;
  double* partial;                // [partials]
  float* grad;                    // [B,K,h,w]
  float* pixel_loss;              // [B,H,W] or null
  unsigned long long* histogram;  // [kCopies,kDigits], added to
};

// The label of each pixel of a piece; -1 where there is none, or it is ignored or wrong.
template <int n>
__device__ __forceinline__ void read_codes(const Kernel& p, int64_t image, const Piece<n>& piece, bool* wrong,
                                           // outputs
                                           int (&code)[n][n]) {
  cells::for_labels(p.labels, image, piece, p.ignore_index, [&](int i, int j, bool counts, auto label) {
    const bool known = label < static_cast<decltype(label)>(p.planes);
    code[i][j] = counts && known ? static_cast<int>(label) : -1;
    *wrong = *wrong || (counts && !known);
  });
}

// weight = 1 - mean over the valid classes of |1[label = class] - similarity|, or the similarity to the own
// label
template <int n>
__device__ __forceinline__ void weigh(const Kernel& p, int64_t image, const Piece<n>& piece,
                                      const int (&code)[n][n],
                                      // outputs
                                      float (&weight)[n][n]) {
  const Similarity& maps = p.maps;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) weight[i][j] = 0.0f;
  }
  int row[n], column[n];
  float fy[n], fx[n];
#pragma unroll
  for (int i = 0; i < n && maps.slots > 0; ++i) {
    const int y = i < piece.rows ? piece.y + i : 0, x = i < piece.columns ? piece.x + i : 0;
    row[i] = static_cast<int>(maps.rows.cell_of(y));
    column[i] = static_cast<int>(maps.columns.cell_of(x));
    fy[i] = maps.rows.fraction(y, row[i]);
    fx[i] = maps.columns.fraction(x, column[i]);
  }
  int valid = 0;
  for (int64_t slot = 0; slot < maps.slots; ++slot) {
    const int64_t target = p.classes.data == nullptr ? 0 : p.classes.at(image, slot);
    if (target < 0) continue;
    ++valid;
    const int64_t plane = image * maps.stride_b + slot * maps.stride_s;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int64_t upper = plane + row[i] * maps.stride_y,
                    lower = plane + maps.rows.next(row[i]) * maps.stride_y;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int64_t left = column[j] * maps.stride_x, right = maps.columns.next(column[j]) * maps.stride_x;
        const float west = cells::blend(maps.at(upper + left), maps.at(lower + left), fy[i]);
        const float east = cells::blend(maps.at(upper + right), maps.at(lower + right), fy[i]);
        const float likeness = clamp_similarity(cells::blend(west, east, fx[j]), 0.0f, 1.0f);
        weight[i][j] +=
            p.classes.data == nullptr ? likeness : consistency_gap(code[i][j] == target, likeness, 1.0f);
      }
    }
  }
  if (valid > 0 && p.classes.data == nullptr) return;
  const float count = static_cast<float>(valid > 0 ? valid : 1);
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) weight[i][j] = valid > 0 ? 1.0f - __fdiv_rn(weight[i][j], count) : 1.0f;
  }
}

// log2(e) times corners, less `most`.
__device__ __forceinline__ Square scaled(const Square& s, float most) {
  return {fmaf(s.a, kLog2E, -most), fmaf(s.b, kLog2E, -most), fmaf(s.c, kLog2E, -most),
          fmaf(s.d, kLog2E, -most)};
}

// log2(e) times the largest and the smallest corner of a cell.
struct Range {
  float most, least;
};

template <typename Offset, typename T>
__device__ __forceinline__ Range range_of_corners(const T* image, int64_t planes, int64_t stride_k,
                                                  const Corners& at) {
  float most = -3e38f, least = 3e38f;
  auto corners = cells::Planes<T, Offset>::of(image, stride_k, at);
#pragma unroll 4
  for (int k = 0; k < static_cast<int>(planes); ++k) {
    const Square s = corners.read();
    corners.next(true);
    most = fmaxf(most, fmaxf(fmaxf(s.a, s.b), fmaxf(s.c, s.d)));
    least = fminf(least, fminf(fminf(s.a, s.b), fminf(s.c, s.d)));
  }
  return {most * kLog2E, least * kLog2E};
}

// The exponentials of a piece in one class: along a row of pixels the logit is linear, so that they follow
// from the first one and the ratio of neighbours.
struct Powers {
  float upper, lower;            // exponents at the piece's first column, between the corners of a side
  float upper_step, lower_step;  // from pixel to pixel

  // step: fraction of the cell from pixel to pixel; most: log2(e) times the largest corner.
  template <int n>
  __device__ __forceinline__ static Powers of(const Square& s, const Piece<n>& piece, float step,
                                              float most) {
    const float above = s.b - s.a, beneath = s.d - s.c, by = step * kLog2E;
    return {fmaf(fmaf(above, piece.fx[0], s.a), kLog2E, -most),
            fmaf(fmaf(beneath, piece.fx[0], s.c), kLog2E, -most), above * by, beneath * by};
  }

  // f(i, exponential of the first pixel of a row, ratio)
  template <int n, typename Function>
  __device__ __forceinline__ void rows(const Piece<n>& piece, const Function& f) const {
    const float down = lower - upper, down_step = lower_step - upper_step;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      f(i, fast_exp2(fmaf(down, piece.fy[i], upper)), fast_exp2(fmaf(down_step, piece.fy[i], upper_step)));
    }
  }
};

// Sums over the classes of 2^(log2(e) logit - most); those of pixels behind a piece mean nothing.
template <typename Offset, int n, typename T>
__device__ __forceinline__ void bounded_sums(const T* image, int64_t planes, int64_t stride_k,
                                             const Corners& at, const Piece<n>& piece, float step, float most,
                                             // outputs
                                             float (&sums)[n][n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) sums[i][j] = 0.0f;
  }
  auto corners = cells::Planes<T, Offset>::of(image, stride_k, at);
  Square next = corners.read();
  const int count = static_cast<int>(planes);
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const Powers powers = Powers::of(next, piece, step, most);
    corners.next(k + 1 < count);
    next = corners.read();
    powers.rows(piece, [&](int i, float power, float ratio) {
      sums[i][0] += power;
#pragma unroll
      for (int j = 1; j < n; ++j) {
        sums[i][j] = fmaf(power, ratio, sums[i][j]);
        power *= ratio;
      }
    });
  }
}

// Sums of 2^(log2(e) (logit - most)), where `most` is each pixel's largest logit.
template <int n, typename T>
__device__ __forceinline__ void exact_sums(const T* image, int64_t planes, int64_t stride_k,
                                           const Corners& at, const Piece<n>& piece,
                                           // outputs
                                           float (&most)[n][n], float (&sums)[n][n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      most[i][j] = -INFINITY;
      sums[i][j] = 0.0f;
    }
  }
  for (int64_t k = 0; k < planes; ++k) {
    const Square s = Square::read(image + k * stride_k, at);
    cells::interpolate(s, piece, [&](int i, int j, float logit) { most[i][j] = fmaxf(most[i][j], logit); });
  }
  for (int64_t k = 0; k < planes; ++k) {
    const Square s = Square::read(image + k * stride_k, at);
    cells::interpolate(
        s, piece, [&](int i, int j, float logit) { sums[i][j] += fast_exp2((logit - most[i][j]) * kLog2E); });
  }
}

// f(i, j, logit of the label) where there is a label; neighbours often have the same.
template <bool kExact, int n, typename T, typename Function>
__device__ __forceinline__ void own_logits(const T* image, int64_t stride_k, const Corners& at,
                                           const Piece<n>& piece, float most, const int (&code)[n][n],
                                           const Function& f) {
  int last = -1;
  Square s{};
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (code[i][j] < 0) continue;
      if (code[i][j] != last) {
        last = code[i][j];
        s = Square::read(image + last * stride_k, at);
        if (!kExact) s = scaled(s, most);
      }
      if (kExact) {
        f(i, j,
          cells::blend(cells::blend(s.a, s.c, piece.fy[i]), cells::blend(s.b, s.d, piece.fy[i]),
                       piece.fx[j]));
      } else {
        const float west = fmaf(s.c - s.a, piece.fy[i], s.a), east = fmaf(s.d - s.b, piece.fy[i], s.b);
        f(i, j, fmaf(east - west, piece.fx[j], west));
      }
    }
  }
}

// A pixel's probability of its label; of the same logits the same in every launch.
__device__ __forceinline__ float probability(float own, float most, float sum) {
  return __fdiv_rn(fast_exp2((own - most) * kLog2E), sum);
}

// Leave out the pixels that OHEM drops.
template <int n, typename T>
__device__ __forceinline__ void drop_easy(const T* image, int64_t planes, int64_t stride_k, const Corners& at,
                                          const Piece<n>& piece, float limit, int (&code)[n][n]) {
  float most[n][n], sums[n][n];
  exact_sums(image, planes, stride_k, at, piece, most, sums);
  unsigned dropped = 0;
  own_logits<true>(image, stride_k, at, piece, 0.0f, code, [&](int i, int j, float own) {
    if (probability(own, most[i][j], sums[i][j]) > limit) dropped |= 1u << (i * n + j);
  });
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) code[i][j] = (dropped >> (i * n + j) & 1) != 0 ? -1 : code[i][j];
  }
}

// Loss of each pixel that has a label, 0 elsewhere, from sums as of bounded_sums or exact_sums; `most` of the
// latter, `bound` of the former.
template <bool kExact, int n, typename T>
__device__ __forceinline__ float pixel_losses(const Kernel& p, int64_t image_number, const T* image,
                                              int64_t stride_k, const Corners& at, const Piece<n>& piece,
                                              float bound, const float (&most)[n][n],
                                              const float (&sums)[n][n], const int (&code)[n][n],
                                              const float (&weight)[n][n]) {
  float total = 0.0f;
  float* const to = p.pixel_loss;
  const int64_t corner = (image_number * p.walk.rows.m + piece.y) * p.walk.columns.m + piece.x;
  own_logits<kExact>(image, stride_k, at, piece, bound, code, [&](int i, int j, float own) {
    const float exponent = kExact ? (own - most[i][j]) * kLog2E : own;
    const float loss = (log2f(sums[i][j]) - exponent) * kLn2 * weight[i][j];
    total += loss;
    if (to != nullptr) to[corner + i * p.walk.columns.m + j] = loss;
  });
  if (to != nullptr) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if (piece.has(i, j) && code[i][j] < 0) to[corner + i * p.walk.columns.m + j] = 0.0f;
      }
    }
  }
  return total;
}

// The gradient of a piece, for all classes, from bounded sums. share: weight / sum, 0 where there is no
// label.
template <typename Offset, int n, typename T>
__device__ __forceinline__ void send_slopes(const Kernel& p, const T* image, int64_t stride_k,
                                            const Corners& at, const Piece<n>& piece, float step, float bound,
                                            const float (&share)[n][n], const int (&code)[n][n],
                                            const float (&weight)[n][n], Passage passage, float* gradient) {
  const int64_t points = p.walk.rows.n * p.walk.columns.n;
  const int count = static_cast<int>(p.planes);
  const unsigned labels = cells::labels_of_warp(code);
  auto corners = cells::Planes<T, Offset>::of(image, stride_k, at);
  Square next = corners.read();
  Offset point = 0;
#pragma unroll 1
  for (int k = 0; k < count; ++k) {
    const Powers powers = Powers::of(next, piece, step, bound);
    corners.next(k + 1 < count);
    next = corners.read();
    // Of a row's slopes the sum, and that of slope times column: polynomials of the ratio, by Horner.
    float plain[n], sloped[n];
    powers.rows(piece, [&](int i, float power, float ratio) {
      plain[i] = share[i][n - 1];
      sloped[i] = share[i][n - 1];
#pragma unroll
      for (int j = n - 2; j >= 0; --j) {
        plain[i] = fmaf(plain[i], ratio, share[i][j]);
        if (j > 0) sloped[i] = fmaf(sloped[i], ratio, plain[i]);
      }
      plain[i] *= power;
      sloped[i] *= power * ratio;
    });
    // Of most classes no pixel of a warp has the label.
    if ((labels >> (k & 31) & 1) != 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const float own = code[i][j] == k ? weight[i][j] : 0.0f;
          plain[i] -= own;
          if (j > 0) sloped[i] = fmaf(-own, static_cast<float>(j), sloped[i]);
        }
      }
    }
    float all = plain[0], all_sloped = sloped[0];
    float below = plain[0] * piece.fy[0], below_sloped = sloped[0] * piece.fy[0];
#pragma unroll
    for (int i = 1; i < n; ++i) {
      all += plain[i];
      all_sloped += sloped[i];
      below = fmaf(plain[i], piece.fy[i], below);
      below_sloped = fmaf(sloped[i], piece.fy[i], below_sloped);
    }
    Square sums;
    const float above = all - below;
    sums.b = fmaf(above, piece.fx[0], (all_sloped - below_sloped) * step);
    sums.d = fmaf(below, piece.fx[0], below_sloped * step);
    sums.a = above - sums.b;
    sums.c = below - sums.d;
    passage.pass(sums, gradient + point);
    point = static_cast<Offset>(opaque(point + static_cast<Offset>(points)));
  }
}

// The same from exact sums, relative to `most`.
template <int n, typename T>
__device__ __forceinline__ void send_exact_slopes(const Kernel& p, const T* image, int64_t stride_k,
                                                  const Corners& at, const Piece<n>& piece,
                                                  const float (&most)[n][n], const float (&share)[n][n],
                                                  const int (&code)[n][n], const float (&weight)[n][n],
                                                  Passage passage, float* gradient) {
  const int64_t points = p.walk.rows.n * p.walk.columns.n;
#pragma unroll 1
  for (int k = 0; k < static_cast<int>(p.planes); ++k) {
    const Square s = Square::read(image + k * stride_k, at);
    Adjoint<n> adjoint;
    float slope[n];
    cells::interpolate(s, piece, [&](int i, int j, float value) {
      // What is not finite in a pixel that does not count must not become NaN by the factor 0.
      const float term = code[i][j] < 0 ? 0.0f : fast_exp2((value - most[i][j]) * kLog2E);
      slope[j] = fmaf(term, share[i][j], code[i][j] == k ? -weight[i][j] : 0.0f);
      if (j == n - 1) adjoint.add(piece, i, slope);
    });
    passage.pass(adjoint.sums, gradient);
    gradient += points;
  }
}

// Loss and gradient of a piece from its sums. A whole warp.
template <Mode kMode, bool kExact, typename Offset, int n, typename T>
__device__ __forceinline__ float finish_piece(const Kernel& p, int64_t image_number, const T* image,
                                              int64_t stride_k, const Corners& at, const Piece<n>& piece,
                                              float step, float bound, const float (&most)[n][n],
                                              float (&sums)[n][n], const int (&code)[n][n],
                                              const float (&weight)[n][n], const Passage& passage,
                                              float* gradient) {
  const float loss =
      pixel_losses<kExact>(p, image_number, image, stride_k, at, piece, bound, most, sums, code, weight);
  if constexpr (kMode == Mode::gradient) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < n; ++j)
        sums[i][j] = code[i][j] < 0 ? 0.0f : fast_quotient(weight[i][j], sums[i][j]);
    }
    if constexpr (kExact) {
      send_exact_slopes(p, image, stride_k, at, piece, most, sums, code, weight, passage, gradient);
    } else {
      send_slopes<Offset>(p, image, stride_k, at, piece, step, bound, sums, code, weight, passage, gradient);
    }
  }
  return loss;
}

// Counts of equal digits that follow each other.
struct Run {
  int digit = -1;
  unsigned count = 0;

  __device__ __forceinline__ void add(int next, unsigned long long* histogram) {
    if (next != digit) {
      if (digit >= 0) atomicAdd(&histogram[digit], static_cast<unsigned long long>(count));
      digit = next;
      count = 0;
    }
    ++count;
  }
};

// The digits of the probabilities of a piece.
template <int n, typename T>
__device__ __forceinline__ void count_digits(const Kernel& p, const T* image, int64_t stride_k,
                                             const Corners& at, const Piece<n>& piece,
                                             const int (&code)[n][n], unsigned long long* histogram,
                                             Run* run) {
  float most[n][n], sums[n][n];
  exact_sums(image, p.planes, stride_k, at, piece, most, sums);
  const int leading = p.search != nullptr ? static_cast<int>(p.search->digit) : 0;
  own_logits<true>(image, stride_k, at, piece, 0.0f, code, [&](int i, int j, float own) {
    const unsigned bits = __float_as_uint(probability(own, most[i][j], sums[i][j])) & 0x7fffffffu;
    if (p.search == nullptr) {
      run->add(static_cast<int>(bits >> 16), histogram);
    } else if (static_cast<int>(bits >> 16) == leading) {
      run->add(static_cast<int>(bits & 0xffffu), histogram);
    }
  });
}

// What a pixel's loss is multiplied by.
template <int n>
__device__ __forceinline__ void weigh_pixels(const Kernel& p, int64_t image, const Piece<n>& piece,
                                             const int (&code)[n][n],
                                             // outputs
                                             float (&weight)[n][n]) {
  weigh(p, image, piece, code, weight);
  if (p.given == nullptr) return;
  const float* from = p.given + image * p.given_b + piece.y * p.given_y + piece.x * p.given_x;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (code[i][j] >= 0) weight[i][j] *= from[i * p.given_y + j * p.given_x];
    }
  }
}

// A piece in full. Without kGeneral, *fine becomes false where that would be needed.
template <Mode kMode, bool kGeneral, int n, typename T>
__device__ __forceinline__ float piece_loss(const Kernel& p, int64_t image_number, const T* image,
                                            int64_t stride_k, const Corners& at, const Piece<n>& piece,
                                            const int (&code)[n][n], const Passage& passage, float* gradient,
                                            bool* fine) {
  using Offset = std::conditional_t<kGeneral, int64_t, int32_t>;
  const Range range = range_of_corners<Offset>(image, p.planes, stride_k, at);
  const float bound = range.most;
  // Of one pixel in a row there are no neighbours; the next cell's are not to grow beyond all bounds.
  const float step = piece.columns > 1 ? p.step : 0.0f;
  float sums[n][n], weight[n][n];
  bounded_sums<Offset>(image, p.planes, stride_k, at, piece, step, bound, sums);
  // With one class the loss is exactly 0. What is not finite shows in every sum, or in the range.
  bool here = p.planes > 1 && range.most - range.least < p.widest && sums[0][0] < kLargest;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      here = here && (code[i][j] < 0 || (sums[i][j] < kLargest && sums[i][j] > kLeast));
    }
  }
  *fine = *fine && here;
  weigh_pixels(p, image_number, piece, code, weight);
  if (kGeneral && !__all_sync(kAll, here)) {
    float most[n][n];
    exact_sums(image, p.planes, stride_k, at, piece, most, sums);
    return finish_piece<kMode, true, Offset>(p, image_number, image, stride_k, at, piece, step, bound, most,
                                             sums, code, weight, passage, gradient);
  }
  return finish_piece<kMode, false, Offset>(p, image_number, image, stride_k, at, piece, step, bound, sums,
                                            sums, code, weight, passage, gradient);
}

// kGeneral: with OHEM, with the maximum of a pixel where it is needed, and of tasks that another launch left
// at that. The kernel without needs fewer registers and leaves such tasks.
template <typename T, int n, Mode kMode, bool kGeneral>
__global__ void __launch_bounds__(kLanes, kWarps) cross_entropy_kernel(Maps<T> logits, Kernel p) {
  CISC_DYNAMIC_SHARED(memory);
  const Walk& walk = p.walk;
  const int64_t floats = kLanes * p.planes * (walk.whole ? 1 : 2);
  const Carry carry = Carry::of(
      walk, p.planes, p.carry != nullptr ? p.carry + blockIdx.x * floats : reinterpret_cast<float*>(memory));
  float factor = 1.0f;
  if (kMode == Mode::gradient)
    factor = 1.0f / static_cast<float>(cells::divisor_of(p.state, p.by, p.divisor));
  unsigned long long* const histogram =
      kMode == Mode::histogram ? p.histogram + blockIdx.x % kCopies * kDigits : nullptr;
  Run run;
  int64_t kept = 0;
  bool wrong = false;
  for (int64_t number = blockIdx.x; number < walk.tasks(); number += gridDim.x) {
    if (kGeneral && p.left != nullptr && p.left[number] == 0) continue;
    const cells::Task task = cells::Task::of(walk, number);
    const T* const image = logits.data + task.image * logits.stride_b;
    const Column column = Column::of(walk, task);
    const int pieces_x = column.pieces<n>();
    if (p.classes.data != nullptr && task.tile == 0 && task.begin == 0) {
      wrong = p.classes.wrong(task.image, p.planes) || wrong;
    }
    double total = 0.0;
    bool before = false, fine = true;
    for (int64_t at = task.begin > 0 ? task.begin - walk.shared : 0; at < task.end; ++at) {
      const int top = static_cast<int>(walk.rows.first(at)),
                bottom = static_cast<int>(walk.rows.first(at + 1));
      const int pieces_y = bottom - top > n ? (bottom - top + n - 1) / n : 1;
      const Corners corners = Corners::of_points(logits, at, walk.rows.next(at), column.left, column.right);
      const bool counts = column.counts && at >= task.begin;
      Passage passage = Passage::of(walk, carry, column, at, at >= task.begin, factor);
      float* const gradient =
          held(p.grad + ((task.image * p.planes * walk.rows.n + at) * walk.columns.n + column.cell));
      for (int piece_y = 0; piece_y < pieces_y; ++piece_y) {
        for (int piece_x = 0; piece_x < pieces_x; ++piece_x) {
          const Piece<n> piece =
              Piece<n>::of(walk, column, at, top + piece_y * n, bottom, column.first + piece_x * n);
          int code[n][n];
          read_codes(p, task.image, piece, &wrong, code);
          if constexpr (kMode == Mode::histogram) {
            if (counts) count_digits(p, image, logits.stride_k, corners, piece, code, histogram, &run);
          } else {
            if (kGeneral && p.limit != nullptr) {
              drop_easy(image, p.planes, logits.stride_k, corners, piece, *p.limit, code);
#pragma unroll
              for (int i = 0; i < n; ++i) {
#pragma unroll
                for (int j = 0; j < n; ++j) kept += counts && code[i][j] >= 0;
              }
            }
            passage.before = before;
            passage.first = piece_y == 0 && piece_x == 0;
            passage.last = piece_y + 1 == pieces_y && piece_x + 1 == pieces_x;
            const float loss = piece_loss<kMode, kGeneral>(p, task.image, image, logits.stride_k, corners,
                                                           piece, code, passage, gradient, &fine);
            total += counts ? static_cast<double>(loss) : 0.0;
            before = true;
          }
        }
      }
      if (kMode != Mode::histogram && at >= task.begin && task.ends(walk, at)) {
        total = warp_sum(total);
        if (threadIdx.x == 0) p.partial[task.partial(walk, at)] = total;
        total = 0.0;
      }
    }
    if (kMode != Mode::histogram && !kGeneral) {
      const bool all = __all_sync(kAll, fine);
      if (threadIdx.x == 0) p.left[number] = all ? 0 : 1;
    }
  }
  if (kMode == Mode::histogram) run.add(-1, histogram);
  if (wrong) p.state->wrong = 1;  // whoever writes, the same
  if (kMode != Mode::histogram && kGeneral && p.limit != nullptr) {
    kept = warp_sum(kept);
    if (threadIdx.x == 0 && kept > 0) atomicAdd(&p.state->kept, static_cast<unsigned long long>(kept));
  }
}

// Add up the copies of a histogram, a group of digits per block.
// outputs
// sums: [kDigits], over the groups: [kGroups]
__global__ void __launch_bounds__(kGroup)
    fold_kernel(const unsigned long long* histogram, unsigned long long* sums, unsigned long long* groups) {
  const int64_t digit = static_cast<int64_t>(blockIdx.x) * kGroup + threadIdx.x;
  unsigned long long sum = 0;
  for (int64_t copy = 0; copy < kCopies; ++copy) sum += histogram[copy * kDigits + digit];
  sums[digit] = sum;
  sum = block_sum<kGroup>(sum);
  if (threadIdx.x == 0) groups[blockIdx.x] = sum;
}

// Find the digit in which the probability of a rank lies; after the last one, the limit.
// outputs
// search: its rank is read after the first digit
// limit: [], holds OHEM's threshold at first
__global__ void __launch_bounds__(kGroup)
    select_kernel(const unsigned long long* sums, const unsigned long long* groups, int64_t min_kept,
                  bool last, Search* search, float* limit) {
  CISC_SHARED(size, unsigned long long[kGroup]);
  CISC_SHARED(found, int);
  CISC_SHARED(left, unsigned long long);
  CISC_SHARED(all, unsigned long long);
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned long long rank = static_cast<unsigned long long>(last ? search->rank : min_kept);
  // The place where the numbers up to it reach a rank, and what of the rank is left.
  const auto find = [&](const unsigned long long* numbers, unsigned long long of) {
    size[thread] = numbers[thread];
    if (thread == 0) {
      found = kGroup - 1;
      left = of;
    }
    __syncthreads();
    unsigned long long up_to = 0;
    for (int i = 0; i < thread; ++i) up_to += size[i];
    if (up_to < of && up_to + size[thread] >= of) {
      found = thread;
      left = of - up_to;
    }
    if (thread == kGroup - 1) all = up_to + size[thread];
    __syncthreads();
  };
  find(groups, rank);
  const int group = found;
  const unsigned long long within = left, counted = all;
  __syncthreads();
  find(sums + group * kGroup, within);
  if (thread > 0) return;
  const int digit = group * kGroup + found;
  if (!last) {
    search->digit = digit;
    search->rank = static_cast<long long>(left);
    // With fewer pixels nothing is dropped.
    if (counted < static_cast<unsigned long long>(min_kept)) *limit = INFINITY;
    return;
  }
  const float smallest =
      __uint_as_float(static_cast<unsigned>(search->digit) << 16 | static_cast<unsigned>(digit));
  if (!(smallest <= *limit)) *limit = smallest;
}

__global__ void __launch_bounds__(kLanes) set_kernel(float* to, float value) {
  if (threadIdx.x == 0) *to = value;
}

// A problem with all that its kernels need.
class Solver {
 public:
  Kernel kernel{};

  Solver(const Gpu& gpu, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
         const MaybeTensor& classes, int64_t ignore_index, Tensor& state)
      : gpu_(gpu), logits_(logits) {
    const int64_t height = labels.size(1), width = labels.size(2);
    rows_ = Axis::of(logits.size(2), height, true);
    columns_ = Axis::of(logits.size(3), width, true);
    if (columns_.n > 1) kernel.step = static_cast<float>(columns_.step) / static_cast<float>(columns_.whole);
    kernel.widest = kernel.step > 0.5f ? kWidest / 2.0f : kWidest;
    kernel.planes = logits.size(1);
    kernel.labels = read_labels(labels);
    kernel.ignore_index = ignore_index;
    if (similarity.has_value()) {
      kernel.maps = {float_kind(similarity->scalar_type()),
                     similarity->const_data_ptr(),
                     similarity->size(1),
                     similarity->stride(0),
                     similarity->stride(1),
                     similarity->stride(2),
                     similarity->stride(3),
                     Axis::of(similarity->size(2), height, false),
                     Axis::of(similarity->size(3), width, false)};
    }
    if (classes.has_value()) kernel.classes = cells::classes_of(*classes);
    kernel.state = static_cast<State*>(state.mutable_data_ptr());
    kernel.divisor = 1.0;
  }

  // Leave out pixels that are too easy: those whose probability of their label lies above the larger of the
  // threshold and the min_kept-th smallest.
  void mine(double threshold, int64_t min_kept) {
    limit_ = device_empty(logits_, {1}, ScalarType::Float);
    auto* limit = data_of<float>(limit_);
    gpu_.launch(set_kernel, 1, kLanes, 0, limit, static_cast<float>(threshold));
    if (min_kept > 0) {
      Tensor found = device_empty(logits_, {2}, ScalarType::Long);
      Tensor sums = device_empty(logits_, {kDigits + kGroups}, ScalarType::Long);
      auto* search = data_of<Search>(found);
      auto* digits = data_of<unsigned long long>(sums);
      for (const bool last : {false, true}) {
        Tensor histogram = device_zeros(logits_, {kCopies, kDigits}, ScalarType::Long);
        kernel.histogram = data_of<unsigned long long>(histogram);
        kernel.search = last ? search : nullptr;
        run<Mode::histogram>();
        gpu_.launch(fold_kernel, kGroups, kGroup, 0, kernel.histogram, digits, digits + kDigits);
        gpu_.launch(select_kernel, 1, kGroup, 0, digits, digits + kDigits, min_kept, last, search, limit);
      }
    }
    kernel.limit = limit;
  }

  // The sums of the loss, [partials] float64.
  template <Mode kMode>
  Tensor run() {
    const bool small = !cells::exceeds(rows_, columns_, kSmall);
    const int piece = small ? kSmall : kMost;
    kernel.walk = cells::walk_of(rows_, columns_, true, logits_.size(0), kMode == Mode::gradient, piece,
                                 gpu_.multiprocessors(), kWarps);
    const int64_t planes = kMode == Mode::gradient ? kernel.planes : 0;
    const CarryPlan plan = CarryPlan::of(gpu_, kernel.walk, planes);
    Tensor carry = device_empty(logits_, {plan.workspace}, ScalarType::Float);
    Tensor partial =
        device_empty(logits_, {kMode == Mode::histogram ? 0 : kernel.walk.partials()}, ScalarType::Double);
    kernel.carry = plan.workspace > 0 ? data_of<float>(carry) : nullptr;
    kernel.partial = data_of<double>(partial);
    // Of what the general kernel is for, there is mostly nothing.
    const int64_t farthest = kernel.planes * std::max(logits_.stride(1), logits_.size(2) * logits_.size(3));
    const bool general =
        kernel.limit != nullptr || kernel.planes == 1 || kMode == Mode::histogram || farthest > INT32_MAX;
    Tensor left = device_empty(logits_, {general ? 0 : kernel.walk.tasks()}, ScalarType::Byte);
    kernel.left = general ? nullptr : data_of<uint8_t>(left);
    const int64_t blocks = general ? plan.blocks : std::min(plan.blocks, gpu_.multiprocessors() * kWarps);
    with_float(float_kind(logits_.scalar_type()), [&](auto type) {
      using T = decltype(type);
      const auto launch = [&](auto first, auto second) {
        if (!general)
          gpu_.launch(first, plan.blocks, kLanes, plan.shared, cells::maps_of<T>(logits_), kernel);
        gpu_.launch(second, blocks, kLanes, plan.shared, cells::maps_of<T>(logits_), kernel);
      };
      if (small) {
        launch(cross_entropy_kernel<T, kSmall, kMode, kMode == Mode::histogram>,
               cross_entropy_kernel<T, kSmall, kMode, true>);
      } else {
        launch(cross_entropy_kernel<T, kMost, kMode, kMode == Mode::histogram>,
               cross_entropy_kernel<T, kMost, kMode, true>);
      }
    });
    return partial;
  }

 private:
  const Gpu& gpu_;
  const Tensor& logits_;
  Tensor limit_;
  Axis rows_{}, columns_{};
};

void check_values(const char* op, const Tensor& logits, const Tensor& labels, const MaybeTensor& similarity,
                  const MaybeTensor& classes, int64_t ignore_index) {
  check_same_device(op, "labels", labels, logits);
  if (similarity.has_value()) check_same_device(op, "similarity", *similarity, logits);
  if (classes.has_value()) {
    check_same_device(op, "classes", *classes, logits);
    check_class_values(op, *classes, logits.size(1));
  }
  if (labels.numel() == 0) return;
  check_sides(op, logits, labels.size(1), labels.size(2));
  if (similarity.has_value()) check_sides(op, *similarity, labels.size(1), labels.size(2));
  check_label_values(op, labels, logits.size(1), ignore_index);
}

// logits: [B,K,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// similarity: [B,S,h',w'] float32, bfloat16 or float16, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// loss: scalar or, for "none", [B,H,W] float32
// grad: [B,K,h,w] float32 of the scalar, or [0]
std::tuple<Tensor, Tensor> cuda_forward(const Tensor& logits, const Tensor& labels,
                                        const MaybeTensor& similarity, const MaybeTensor& classes,
                                        int64_t ignore_index, std::string reduction,
                                        std::optional<double> ohem_threshold, int64_t ohem_min_kept,
                                        bool need_grad) {
  check_arguments(kForward, logits, labels, similarity, classes, ohem_min_kept, kHere);
  check_reduction(reduction);
  const Gpu gpu(kForward, "logits", logits);
  check_values(kForward, logits, labels, similarity, classes, ignore_index);
  const bool each = reduction == "none", empty = labels.numel() == 0;
  const int64_t batch = logits.size(0), points = need_grad ? logits.numel() : 0;
  Tensor state = device_zeros(logits, {cells::kStateWords}, ScalarType::Long);
  Tensor loss = each ? device_empty(logits, {batch, labels.size(1), labels.size(2)}, ScalarType::Float)
                     : device_empty(logits, {}, ScalarType::Float);
  Tensor grad = !need_grad ? device_empty(logits, {0}, ScalarType::Float)
                : empty    ? gradient_like(logits, true)
                           : device_empty(logits, {batch, logits.size(1), logits.size(2), logits.size(3)},
                                          ScalarType::Float);
  Solver solver(gpu, logits, labels, similarity, classes, ignore_index, state);
  State* const shared = solver.kernel.state;
  if (empty) {
    if (each) return {loss, grad};
    if (classes.has_value()) {
      gpu.launch(cells::classes_kernel, std::min<int64_t>(batch, 1024), kLanes, 0, solver.kernel.classes,
                 batch, logits.size(1), shared);
    }
    cells::launch_finish(gpu, nullptr, 0, shared, Divisor::given, 1.0, false, data_of<float>(loss),
                         data_of<float>(grad), points);
    return {loss, grad};
  }
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  Divisor by = Divisor::given;
  const double divisor = reduction == "mean" ? static_cast<double>(labels.numel()) : 1.0;
  if (reduction == "valid_mean") by = ohem_threshold.has_value() ? Divisor::kept : Divisor::counted;
  if (by == Divisor::counted) cells::launch_count(gpu, labels, solver.kernel.labels, ignore_index, shared);
  // How many pixels are kept is known only afterwards.
  const bool divides = by == Divisor::kept;
  solver.kernel.by = divides ? Divisor::given : by;
  solver.kernel.divisor = divisor;
  if (each) solver.kernel.pixel_loss = data_of<float>(loss);
  if (need_grad) solver.kernel.grad = data_of<float>(grad);
  const Tensor partial = need_grad ? solver.run<Mode::gradient>() : solver.run<Mode::loss>();
  const auto* sums = static_cast<const double*>(partial.const_data_ptr());
  if (each) {
    cells::launch_finish(gpu, sums, 0, shared, by, divisor, false, nullptr, data_of<float>(loss),
                         loss.numel());
  } else {
    cells::launch_finish(gpu, sums, partial.numel(), shared, by, divisor, divides && need_grad,
                         data_of<float>(loss), data_of<float>(grad), points);
  }
  return {loss, grad};
}

// grad: [B,H,W] float32, any strides
// the rest as in `cuda_forward`, with reduction "none"
// outputs
// gradient: [B,K,h,w] float32, contiguous
Tensor cuda_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                     const MaybeTensor& similarity, const MaybeTensor& classes, int64_t ignore_index,
                     std::optional<double> ohem_threshold, int64_t ohem_min_kept) {
  check_arguments(kBackward, logits, labels, similarity, classes, ohem_min_kept, kHere);
  check_pixel_gradient(grad, labels, kHere);
  const Gpu gpu(kBackward, "logits", logits);
  check_values(kBackward, logits, labels, similarity, classes, ignore_index);
  check_same_device(kBackward, "grad", grad, logits);
  if (labels.numel() == 0) return gradient_like(logits, true);
  Tensor gradient = device_empty(logits, {logits.size(0), logits.size(1), logits.size(2), logits.size(3)},
                                 ScalarType::Float);
  Tensor state = device_zeros(logits, {cells::kStateWords}, ScalarType::Long);
  Solver solver(gpu, logits, labels, similarity, classes, ignore_index, state);
  if (ohem_threshold.has_value()) solver.mine(*ohem_threshold, ohem_min_kept);
  solver.kernel.given = static_cast<const float*>(grad.const_data_ptr());
  solver.kernel.given_b = grad.stride(0);
  solver.kernel.given_y = grad.stride(1);
  solver.kernel.given_x = grad.stride(2);
  solver.kernel.grad = data_of<float>(gradient);
  const Tensor partial = solver.run<Mode::gradient>();
  cells::launch_finish(gpu, nullptr, 0, solver.kernel.state, Divisor::given, 1.0, false, nullptr,
                       data_of<float>(gradient), gradient.numel());
  return gradient;
}

}  // namespace
}  // namespace cisc::rectified_cross_entropy

CISC_REGISTER(m) {
  m.impl("rectified_cross_entropy", TORCH_BOX(&cisc::rectified_cross_entropy::cuda_forward));
  m.impl("rectified_cross_entropy_backward", TORCH_BOX(&cisc::rectified_cross_entropy::cuda_backward));
}
