// A thread's piece of rectified_cross_entropy on a GPU: its weights, sums, loss and gradient.
#pragma once

#include <cstdint>
#include <type_traits>

#include "adjoint.cuh"
#include "pixel_loss.h"

namespace cisc::rectified_cross_entropy {

using cells::Adjoint;
using cells::Axis;
using cells::Carry;
using cells::Corners;
using cells::Divisor;
using cells::kLanes;
using cells::kWarps;
using cells::Maps;
using cells::Mode;
using cells::Passage;
using cells::Piece;
using cells::Square;
using cells::State;
using cells::WalkPlan;

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kLeast = 0x1p-64f, kLargest = 0x1p64f;  // between them a sum has lost no term that counts
constexpr float kWidest = 120.0f;                       // of two exponentials, their ratio is a float
constexpr int64_t kCopies = 16;                         // of a histogram, which fewer threads add to
constexpr int kDigits = static_cast<int>(kHistogram), kGroup = 256, kGroups = kDigits / kGroup;

// Maps [B,S,h',w'] of any of the element types.
struct Similarity {
  Float kind;
  const void* data;
  int64_t slots;  // 0: no weights
  int64_t stride_b, stride_s, stride_y, stride_x;
  Axis rows, columns;

  // f(pointer to a plane, of its type)
  template <typename Function>
  __device__ __forceinline__ void in_plane(int64_t offset, const Function& f) const {
    with_elements(kind, data, [&](const auto* elements) { f(elements + offset); });
  }
};

// Where the probability of a rank lies: its leading digit, and the rank among those that have it.
struct Search {
  long long digit, rank;
};

// Where classes are null, the map is each pixel's likeness to its own label.
struct Kernel : cells::LossKernel {
  float step;    // fraction of a cell from pixel to pixel along a row
  float widest;  // range of log2(e) logits in a cell from which on Powers might lose some
  Similarity maps;
  const float* limit;  // [], largest probability of a pixel that is kept; null: all are
  const float* given;  // [B,H,W] gradient of each pixel, or null
  int64_t given_b, given_y, given_x;
  Divisor by;  // of the gradient
  double divisor;
  const Search* search;           // null while leading digits are counted
  uint8_t* left;                  // [tasks], 1 where the general kernel has to do it; null: it does all
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
      // The row at once: more at a time would take registers that there are not.
      const int64_t down = (maps.rows.next(row[i]) - row[i]) * maps.stride_y;
      maps.in_plane(plane + row[i] * maps.stride_y, [&](const auto* above) {
        const auto* const beneath = above + down;
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int64_t left = column[j] * maps.stride_x,
                        right = maps.columns.next(column[j]) * maps.stride_x;
          const float west = cells::blend(above[left].widen(), beneath[left].widen(), fy[i]);
          const float east = cells::blend(above[right].widen(), beneath[right].widen(), fy[i]);
          const float likeness = clamp_similarity(cells::blend(west, east, fx[j]), 0.0f, 1.0f);
          weight[i][j] +=
              p.classes.data == nullptr ? likeness : consistency_gap(code[i][j] == target, likeness, 1.0f);
        }
      });
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
        sums[i][j] = code[i][j] < 0 ? 0.0f : close_quotient(weight[i][j], sums[i][j]);
    }
    if constexpr (kExact) {
      send_exact_slopes(p, image, stride_k, at, piece, most, sums, code, weight, passage, gradient);
    } else {
      send_slopes<Offset>(p, image, stride_k, at, piece, step, bound, sums, code, weight, passage, gradient);
    }
  }
  return loss;
}

// The digits of the probabilities of a piece; flush: as of Run.
template <int n, typename T, typename Flush>
__device__ __forceinline__ void count_digits(const Kernel& p, const T* image, int64_t stride_k,
                                             const Corners& at, const Piece<n>& piece,
                                             const int (&code)[n][n], const Flush& flush, cells::Run* run) {
  float most[n][n], sums[n][n];
  exact_sums(image, p.planes, stride_k, at, piece, most, sums);
  const int leading = p.search != nullptr ? static_cast<int>(p.search->digit) : 0;
  own_logits<true>(image, stride_k, at, piece, 0.0f, code, [&](int i, int j, float own) {
    const unsigned bits = __float_as_uint(probability(own, most[i][j], sums[i][j])) & 0x7fffffffu;
    if (p.search == nullptr) {
      run->add(static_cast<int>(bits >> 16), flush);
    } else if (static_cast<int>(bits >> 16) == leading) {
      run->add(static_cast<int>(bits & 0xffffu), flush);
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

}  // namespace cisc::rectified_cross_entropy
