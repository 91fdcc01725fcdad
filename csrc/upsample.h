// Bilinear upsampling of images with several planes (classes) strip by strip, the planes of a pixel at hand
// together: what losses and predictions at label resolution walk over. Nothing of that resolution is stored
// but a strip's few rows. Needs no torch header.
//
// The feature rows of an image are cut into tasks. A task takes the label rows whose upper neighbour is one
// of its own rows, in strips of columns. Gradients of its rows it adds in place; those of the row behind its
// last it leaves in a carry, which is added once all tasks are done: no atomics, and the same sums for any
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bilinear.h"
#include "convert.h"
#include "work.h"

namespace cisc::upsample {

constexpr int64_t kChunk = 8;              // label rows between the same two feature rows, done together
constexpr int64_t kStripFloats = 1 << 17;  // what the planes of a strip take, of one thread
constexpr int64_t kCarryFloats = 1 << 20;  // carries of several images whose tasks run side by side
constexpr int64_t kImageCarry = 1 << 22;   // carries of one image

// Upsampling of [B,K,h,w] to H x W; the tables belong to `Tables`.
struct Grid {
  int64_t planes, h, w, height, width;
  bool align_corners;
  const int32_t* low = nullptr;  // [width, up to a multiple of kStep]
  const int32_t* high = nullptr;
  const float* weight_low = nullptr;
  const float* weight_high = nullptr;
};

using Source = Image<const void*>;  // [B,K,h,w]

inline int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

// Columns' taps of a grid.
class Tables {
 public:
  Grid grid;

  explicit Tables(const Grid& shape) : grid(shape) {
    if (grid.planes == 0) return;
    const int64_t n = padded(grid.width);
    low_.resize(n, 0);
    high_.resize(n, 0);
    weight_low_.resize(n, 0.0f);
    weight_high_.resize(n, 0.0f);
    for (int64_t x = 0; x < grid.width; ++x) {
      const Tap tap = bilinear_tap(x, grid.w, grid.width, grid.align_corners);
      low_[x] = static_cast<int32_t>(tap.low);
      high_[x] = static_cast<int32_t>(tap.high);
      weight_low_[x] = static_cast<float>(tap.weight_low<double>());
      weight_high_[x] = static_cast<float>(tap.weight_high<double>());
    }
    for (int64_t x = std::max<int64_t>(grid.width, 1); x < n; ++x) {
      low_[x] = low_[x - 1];
      high_[x] = high_[x - 1];
    }
    grid.low = low_.data();
    grid.high = high_.data();
    grid.weight_low = weight_low_.data();
    grid.weight_high = weight_high_.data();
  }
  Tables(const Tables&) = delete;
  Tables& operator=(const Tables&) = delete;

 private:
  std::vector<int32_t> low_, high_;
  std::vector<float> weight_low_, weight_high_;
};

inline int64_t table_bytes(const Grid& g) { return g.planes > 0 ? 16 * padded(g.width) : 0; }

// What a task is given.
struct Task {
  int64_t image, begin, end;  // feature rows [begin, end)
  float* workspace;           // [Plan::thread_floats] of the thread
  int64_t* counts;            // what the thread has counted so far
  float* grad;                // [K,h,w] of the image, or null
  float* carry;               // [K,w] for row `end`, or null where there is none
};

struct Plan {
  int64_t columns;        // label columns of a strip, a multiple of kStep
  int64_t span;           // most feature columns that a strip touches
  int64_t rows;           // feature rows of a task
  int64_t tasks;          // of an image
  int64_t images;         // whose tasks run side by side
  int64_t thread_floats;  // workspace of a thread
  int64_t carry_floats;   // of all tasks side by side
};

// Most feature columns that `columns` label columns touch.
inline int64_t span_of_columns(const Grid& g, int64_t columns) {
  return std::min(g.w, columns * g.w / std::max<int64_t>(g.width - (g.align_corners ? 1 : 0), 1) + 3);
}

// The caller keeps `row_floats` per label row and column of a strip besides.
inline Plan plan(const Grid& g, int64_t batch, bool gradient, int64_t row_floats) {
  Plan p;
  const int64_t width = padded(std::max<int64_t>(g.width, 1));
  // Floats per label column: accumulators of two rows, and two rows of features.
  const double per_column =
      static_cast<double>(g.planes) * (2.0 * gradient + 2.0 * std::min(1.0, double(g.w) / double(width))) +
      static_cast<double>(kChunk * row_floats);
  const auto fitting = static_cast<int64_t>(static_cast<double>(kStripFloats) / per_column);
  p.columns = std::min(width, std::max(kStep, fitting / kStep * kStep));
  p.span = span_of_columns(g, p.columns);
  const int64_t work = g.planes * g.height * g.width;
  const int64_t carry = std::max<int64_t>(g.planes * g.w, 1);
  p.tasks = std::min(g.h, tasks_of(work));
  if (gradient) p.tasks = std::min(p.tasks, std::max<int64_t>(kImageCarry / carry, 1));
  p.rows = (g.h + p.tasks - 1) / p.tasks;
  p.tasks = (g.h + p.rows - 1) / p.rows;
  const int64_t floats = gradient && p.tasks > 1 ? p.tasks * carry : 0;
  p.images = batch;
  if (floats > 0) p.images = std::min(batch, std::max<int64_t>(kCarryFloats / floats, 1));
  p.carry_floats = p.images * floats;
  p.thread_floats = g.planes * (2 * (p.span + kStep) + 3 * kStep + (gradient ? 2 * p.columns : 0)) +
                    kChunk * row_floats * p.columns;
  return p;
}

// Of a thread that counts in `cells`.
inline int64_t thread_bytes(const Plan& p, int64_t cells) { return 4 * p.thread_floats + 8 * cells; }

// Of all threads, and what they share.
inline int64_t workspace_bytes(const Grid& g, const Plan& p, int64_t threads, int64_t cells) {
  const int64_t each = thread_bytes(p, cells);
  return crew_size(threads, p.images * p.tasks, each) * each + 4 * p.carry_floats + 8 * cells +
         table_bytes(g);
}

// Of the walk itself: blending rows and columns, adding gradients back; reading the source and, with a
// gradient, clearing, adding to and finishing it in float32.
inline Work work(const Grid& g, const Plan& p, int64_t batch, int64_t element_bytes, bool gradient) {
  const int64_t values = g.planes * g.height * g.width;
  const int64_t across = g.planes * std::min(2 * g.h, 2 * g.height) * g.width, source = g.planes * g.h * g.w;
  const int64_t twice = g.planes * g.w * (p.tasks - 1);  // rows that two tasks read
  Work w;
  w.flops = batch * (3 * values + 3 * across + (gradient ? 4 * values + 2 * across : 0));
  w.bytes = batch * ((source + twice) * element_bytes + (gradient ? 4 * 4 * source : 0));
  return w;
}

// Floats that `upsample_row` needs for a strip of `columns`.
inline int64_t row_buffer(const Grid& g, int64_t columns) {
  return 2 * (span_of_columns(g, columns) + 2 * kStep);
}

}  // namespace cisc::upsample
