// How the warps of a GPU share out the cells of upsampled maps: bands of rows, and columns of a warp's width.
// Needs no torch header.
//
// For a gradient the columns of neighbouring warps share a column of cells, and bands a row, which both go
// through: a low-resolution point takes from the cells on its left and above, too, and no two warps add to
// the same point. So a point's sum has the same order in any band.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cells.h"

namespace cisc::cells {

constexpr int kLanes = 32;
constexpr int64_t kPartials =
    1 << 15;                       // sums of the loss that are written, where the batch leaves it at that
constexpr int64_t kMostBand = 64;  // rows of a band at most: more make the shared rows no rarer

struct Walk {
  Axis rows, columns;
  int64_t batch;
  int64_t front;        // columns of pixels in front of the first input
  int64_t shared;       // columns of cells that a warp has in common with the one before it
  int64_t start;        // the first warp's first cell
  int64_t tiles;        // warps side by side
  int64_t unit, units;  // rows of cells of a sum of the loss; such units below each other
  int64_t band, bands;  // rows of cells of a warp, a multiple of `unit`; bands below each other
  bool whole;           // no cell takes more than one piece

  CISC_HD int64_t tasks() const { return batch * tiles * bands; }
  CISC_HD int64_t partials() const { return batch * tiles * units; }
};

// What a warp goes through, and where its loss goes.
struct Task {
  int64_t image, tile, begin, end;  // rows of cells

  CISC_HD static Task of(const Walk& walk, int64_t number) {
    const int64_t line = number / walk.tiles, band = line % walk.bands, end = (band + 1) * walk.band;
    return {line / walk.bands, number % walk.tiles, band * walk.band, end < walk.rows.n ? end : walk.rows.n};
  }

  // Number of the sum that row `at` of cells belongs to.
  CISC_HD int64_t partial(const Walk& walk, int64_t at) const {
    return (image * walk.tiles + tile) * walk.units + at / walk.unit;
  }

  // Whether such a sum ends with this row.
  CISC_HD bool ends(const Walk& walk, int64_t at) const { return at + 1 == end || (at + 1) % walk.unit == 0; }
};

// The column of cells of a thread. Cell -1 has the pixels in front of the first input: else cell 0 would have
// more than the others of its warp, which would wait.
struct Column {
  int cell, first, last;  // of pixels
  int64_t tile;
  int left, right;  // inputs
  bool counts;      // no other warp counts its pixels
  bool writes;      // the left input is this thread's to write

  CISC_HD static Column of(const Walk& walk, const Task& task, int lane) {
    const Axis& axis = walk.columns;
    Column c{};
    c.tile = task.tile;
    const int64_t cell = task.tile * (kLanes - walk.shared) + lane + walk.start;
    c.cell = static_cast<int>(cell);
    c.first = static_cast<int>(cell < 0 ? 0 : cell == 0 ? walk.front : axis.first(cell));
    c.last = static_cast<int>(cell < 0 ? walk.front : axis.first(cell + 1));
    const int64_t known = cell < axis.n ? cell : axis.n - 1;
    c.left = static_cast<int>(cell < 0 ? axis.next(0) : known);
    c.right = static_cast<int>(cell < 0 ? 0 : axis.next(known));
    c.counts = lane >= walk.shared || cell < 0;
    c.writes = lane >= walk.shared && cell >= 0 && cell < axis.n;
    return c;
  }
};

// Most pixels of a cell along an axis, those in front of the first input counted with the first cell.
inline int64_t longest_cell(const Axis& axis, bool align_corners) {
  if (axis.n == 1) return axis.m;
  if (align_corners) return ceil_div(axis.whole, axis.step);
  return (3 * axis.m + 2 * axis.n - 1) / (2 * axis.n) + 1;
}

// Whether cells of either axis have more pixels along it than `most`, up to a few.
inline bool exceeds(const Axis& rows, const Axis& columns, int64_t most) {
  return rows.m > most * rows.n || columns.m > most * columns.n;
}

// Bands so that all multiprocessors have work: they are busy with `enough` warps each. The sums of the loss
// depend on shapes alone, and so does the result.
inline Walk walk_of(const Axis& rows, const Axis& columns, bool align_corners, int64_t batch, bool gradient,
                    int piece, int64_t multiprocessors, int64_t enough) {
  Walk walk{rows, columns, batch, 0, 0, 0, 0, 0, 0, 0, 0, false};
  walk.front = columns.shift < 0 ? ceil_div(-columns.shift, columns.step) : 0;
  walk.shared = gradient ? 1 : 0;
  walk.start = gradient || walk.front > 0 ? -1 : 0;
  const int64_t cells = gradient ? columns.n : columns.n - walk.start, width = kLanes - walk.shared;
  walk.tiles = ceil_div(cells, width);
  const int64_t room = std::max<int64_t>(kPartials / (batch * walk.tiles), 1);
  walk.unit = ceil_div(rows.n, room);
  walk.units = ceil_div(rows.n, walk.unit);
  walk.whole = longest_cell(rows, align_corners) <= piece && longest_cell(columns, align_corners) <= piece;
  double least = 0.0;
  for (int64_t units = 1; units <= walk.units && (units == 1 || units * walk.unit <= kMostBand); ++units) {
    const int64_t bands = ceil_div(walk.units, units), warps = batch * walk.tiles * bands;
    const int64_t each = std::max(ceil_div(warps, multiprocessors), enough);
    const double cost = static_cast<double>(each) * static_cast<double>(units * walk.unit + walk.shared);
    if (units > 1 && cost >= least) continue;
    least = cost;
    walk.band = units * walk.unit;
    walk.bands = bands;
  }
  return walk;
}

}  // namespace cisc::cells
