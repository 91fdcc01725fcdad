// Upsampling seen from the low-resolution points, as GPU kernels walk over it. Shared by host and device
// code; needs no torch header.
//
// Cell c of an axis spans the output pixels between the inputs c and c + 1; those in front of the first input
// belong to cell 0, those behind the last to the last cell, with fraction 0. A thread that has a cell loads
// its four corners once for all of its pixels, and sums what they send back without any other thread.
#pragma once

#include <cstdint>

#include "bilinear.h"

namespace cisc::cells {

constexpr int kPieceSide = 4;  // pixels of a piece of a cell along an axis: what a thread has in registers

// An axis that brings n inputs to m outputs: output i lies at (i * step + shift) / whole, not below 0.
struct Axis {
  int64_t n, m, step, shift, whole;
  bool narrow;  // positions fit into 32 bits

  CISC_HD static Axis of(int64_t n, int64_t m, bool align_corners) {
    Axis axis{n, m, 2 * n, n - m, 2 * m, false};
    if (align_corners) {
      axis.step = n > 1 ? n - 1 : 1;
      axis.shift = 0;
      axis.whole = m > 1 ? m - 1 : 1;
    }
    const int64_t shift = axis.shift < 0 ? -axis.shift : axis.shift;
    axis.narrow = (m + kPieceSide) * axis.step + shift + (n + 1) * axis.whole < (int64_t{1} << 31);
    return axis;
  }

  // First output pixel of a cell: 0 up to cell 0, m from cell n.
  CISC_HD int64_t first(int64_t cell) const {
    if (cell <= 0) return 0;
    if (cell >= n) return m;
    const int64_t from = cell * whole - shift;
    if (from <= 0) return 0;
    const int64_t up = from + step - 1;
    return narrow ? static_cast<int64_t>(static_cast<uint32_t>(up) / static_cast<uint32_t>(step)) : up / step;
  }

  // The cell of an output pixel.
  CISC_HD int64_t cell_of(int64_t pixel) const {
    const int64_t at = pixel * step + shift;
    if (at <= 0) return 0;
    const int64_t cell =
        narrow ? static_cast<int64_t>(static_cast<uint32_t>(at) / static_cast<uint32_t>(whole)) : at / whole;
    return cell < n ? cell : n - 1;
  }

  // Weight of input cell + 1 at an output pixel of that cell.
  CISC_HD float fraction(int64_t pixel, int64_t cell) const {
    if (cell >= n - 1) return 0.0f;
    const int64_t at = pixel * step + shift;
    return static_cast<float>((at > 0 ? at : 0) - cell * whole) / static_cast<float>(whole);
  }

  // The input on the other side of a cell; at the end, the same.
  CISC_HD int64_t next(int64_t cell) const { return cell + 1 < n ? cell + 1 : n - 1; }
};

}  // namespace cisc::cells
