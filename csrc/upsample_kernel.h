// The walk over an upsampled image; part of the kernels, see simd.h and upsample.h.
#pragma once

#include "convert.h"
#include "simd.h"
#include "upsample.h"

namespace cisc::upsample {
namespace {

// Feature columns [first, last] that label columns [x0, x0 + n) take from.
struct Span {
  int64_t first, last;
};

inline Span span_of(const Grid& g, int64_t x0, int64_t n) { return {g.low[x0], g.high[x0 + n - 1]}; }

// out[k][lane] = row[k][·] at label columns x .. x + kLanes. row: [planes, stride], from feature column
// `first`
inline void across(const Grid& g, const float* row, int64_t stride, int64_t first, int64_t x, int64_t planes,
                   float* out) {
  const int32_t base = g.low[x];
  const I low = load(g.low + x) - base, high = load(g.high + x) - base;
  const F weight_low = load(g.weight_low + x), weight_high = load(g.weight_high + x);
  row += base - first;
  if (g.high[x + kLanes - 1] - base < kLanes) {
    for (int64_t k = 0; k < planes; ++k) {
      const F near = load(row + k * stride);
      store(out + k * kLanes, fma(permute(near, high), weight_high, permute(near, low) * weight_low));
    }
  } else {
    for (int64_t k = 0; k < planes; ++k) {
      const float* from = row + k * stride;
      store(out + k * kLanes, fma(gather(from, high), weight_high, gather(from, low) * weight_low));
    }
  }
}

// One label row of one plane in columns [x0, x0 + n), n up to a multiple of kStep; buffer: [row_buffer]
inline void upsample_row(const Grid& g, const Source& from, int64_t image, int64_t plane, int64_t y,
                         int64_t x0, int64_t n, float* buffer, float* out) {
  const Tap tap = bilinear_tap(y, g.h, g.height, g.align_corners);
  const Span span = span_of(g, x0, n);
  const int64_t count = span.last - span.first + 1;
  const int64_t offset = image * from.stride_b + plane * from.stride_c + span.first * from.stride_x;
  read_row(from.kind, from.data, offset + tap.low * from.stride_y, from.stride_x, count, buffer);
  const F low = broadcast(static_cast<float>(tap.weight_low<double>()));
  const F high = broadcast(static_cast<float>(tap.weight_high<double>()));
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  float* second = buffer + padded + kLanes;
  read_row(from.kind, from.data, offset + tap.high * from.stride_y, from.stride_x, count, second);
  for (int64_t i = count; i < padded; ++i) buffer[i] = second[i] = 0.0f;
  for (int64_t i = 0; i < padded; i += kLanes) {
    store(buffer + i, fma(load(second + i), high, load(buffer + i) * low));
  }
  for (int64_t x = 0; x < n; x += kLanes) across(g, buffer, 0, span.first, x0 + x, 1, out + x);
}

// What kLanes label columns send back, turned round: feature column base + lane takes, one after the other,
// from the label columns at index[t] with weight[t].
struct Adjoint {
  static constexpr int64_t kMost = 2 * kLanes;  // both weights of every label column

  int64_t base, count = 0, targets = 0;
  I index[kMost];
  F weight[kMost];
  M used[kMost];

  // Whether all goes to feature columns base ... base + kLanes - 1. For `lanes` label columns from x on.
  bool turn(const Grid& g, int64_t x, int64_t lanes) {
    base = g.low[x];
    if (g.high[x + lanes - 1] - base >= kLanes) return false;
    alignas(64) int32_t from[kMost][kLanes];
    alignas(64) float by[kMost][kLanes];
    int64_t taken[kLanes] = {};
    const auto add = [&](int64_t column, int64_t lane, float w) {
      const int64_t target = column - base, t = taken[target]++;
      if (t == count) {
        for (int64_t i = 0; i < kLanes; ++i) from[t][i] = -1, by[t][i] = 0.0f;
        ++count;
      }
      from[t][target] = static_cast<int32_t>(lane);
      by[t][target] = w;
      if (target >= targets) targets = target + 1;
    };
    for (int64_t i = 0; i < lanes; ++i) {
      add(g.low[x + i], i, g.weight_low[x + i]);
      if (g.high[x + i] != g.low[x + i]) add(g.high[x + i], i, g.weight_high[x + i]);
    }
    for (int64_t t = 0; t < count; ++t) {
      const I lane = load(from[t]);
      used[t] = less(broadcast(int32_t{-1}), lane);
      index[t] = select(used[t], lane, I{});
      weight[t] = load(by[t]);
    }
    return true;
  }
};

// Add to grad row `row` what the label columns [x0, x0 + n) have sent to it. at: [n / kLanes, planes, kLanes]
inline void send_back(const Grid& g, const Task& task, int64_t row, int64_t x0, int64_t n, const float* at) {
  constexpr int64_t kWorthTurning = 4;  // planes
  const bool own = row < task.end;
  const int64_t stride = own ? g.h * g.w : g.w;
  float* to = own ? task.grad + row * g.w : task.carry;
  for (int64_t x = 0; x < n; x += kLanes, at += g.planes * kLanes) {
    const int64_t lanes = n - x < kLanes ? n - x : kLanes;
    const int32_t* low = g.low + x0 + x;
    alignas(64) float first[kLanes], second[kLanes];
    Adjoint adjoint;
    if (g.planes >= kWorthTurning && adjoint.turn(g, x0 + x, lanes)) {
      for (int64_t k = 0; k < g.planes; ++k) {
        const F value = load(at + k * kLanes);
        F sums{};
        for (int64_t t = 0; t < adjoint.count; ++t) {
          const F term = fma(permute(value, adjoint.index[t]), adjoint.weight[t], sums);
          sums = select(adjoint.used[t], term, sums);
        }
        float* plane = to + k * stride + adjoint.base;
        store(first, sums);
        for (int64_t i = 0; i < adjoint.targets; ++i) plane[i] += first[i];
      }
      continue;
    }
    const F weight_low = load(g.weight_low + x0 + x), weight_high = load(g.weight_high + x0 + x);
    for (int64_t k = 0; k < g.planes; ++k) {
      const F value = load(at + k * kLanes);
      store(first, value * weight_low);
      store(second, value * weight_high);
      float* plane = to + k * stride;
      for (int64_t i = 0; i < lanes;) {
        const int32_t column = low[i];
        float here = 0.0f, next = 0.0f;
        for (; i < lanes && low[i] == column; ++i) {
          here += first[i];
          next += second[i];
        }
        plane[column] += here;
        if (column + 1 < g.w) plane[column + 1] += next;
      }
    }
  }
}

// Walk over the task's label pixels. Body has
//   void start(float* planes, float* buffer, int64_t columns)    [planes, kLanes]; row_floats * kChunk *
//                                                                columns floats, and other_floats
//   void row(int64_t slot, int64_t y, int64_t x0, int64_t n)    before the pixels of row `slot` of a chunk
//   void pixels(int64_t slot, int64_t x, const float* low, const float* high, F weight_low, F weight_high,
//               bool has_high, float* at_low, float* at_high)
// where x counts from x0, low and high are the two feature rows at these columns, [planes, kLanes], and
// at_low and at_high take their gradients (null without); has_high is false where there is one row, the last;
//   void finish(int64_t rows, int64_t y0, int64_t x0, int64_t n)    behind the pixels of a chunk
template <bool kGradient, typename Body>
inline void walk(const Grid& g, const Source& source, const Plan& p, const Task& task, Body& body) {
  const int64_t stride = p.span + kStep, strip = g.planes * p.columns;
  float* upper = task.workspace;
  float* lower = upper + g.planes * stride;
  float* low = lower + g.planes * stride;
  float* high = low + g.planes * kStep;
  float* at_low = high + 2 * g.planes * kStep;  // one more [planes, kStep] behind `high` is the body's
  float* at_high = at_low + (kGradient ? strip : 0);
  body.start(high + g.planes * kStep, at_high + (kGradient ? strip : 0), p.columns);

  const auto read = [&](int64_t row, const Span& span, float* to) {
    const int64_t offset =
        task.image * source.stride_b + row * source.stride_y + span.first * source.stride_x;
    const int64_t count = span.last - span.first + 1;
    for (int64_t k = 0; k < g.planes; ++k) {
      float* plane = to + k * stride;
      read_row(source.kind, source.data, offset + k * source.stride_c, source.stride_x, count, plane);
      for (int64_t i = count; i < count + kLanes; ++i) plane[i] = 0.0f;
    }
  };
  const auto clear = [&](float* at, int64_t n) {
    const int64_t floats = (n + kLanes - 1) / kLanes * kLanes * g.planes;
    for (int64_t i = 0; i < floats; i += kLanes) store(at + i, F{});
  };

  for (int64_t x0 = 0; x0 < g.width; x0 += p.columns) {
    const int64_t n = g.width - x0 < p.columns ? g.width - x0 : p.columns;
    const Span span = span_of(g, x0, n);
    int64_t in_lower = -1, pending = -1;  // rows that `lower` holds, and that at_high has gradients for
    for (int64_t r = task.begin; r < task.end; ++r) {
      const int64_t y_begin = first_output(r, g.h, g.height, g.align_corners);
      const int64_t y_end = first_output(r + 1, g.h, g.height, g.align_corners);
      if (y_begin == y_end) continue;
      const bool last = r + 1 == g.h;
      if (in_lower == r) {
        float* other = upper;
        upper = lower;
        lower = other;
      } else {
        read(r, span, upper);
      }
      if (!last) read(r + 1, span, lower);
      in_lower = last ? -1 : r + 1;
      if constexpr (kGradient) {
        if (pending == r) {
          float* other = at_low;
          at_low = at_high;
          at_high = other;
        } else {
          if (pending >= 0) send_back(g, task, pending, x0, n, at_high);
          clear(at_low, n);
        }
        clear(at_high, n);
      }
      for (int64_t y0 = y_begin; y0 < y_end; y0 += kChunk) {
        const int64_t rows = y_end - y0 < kChunk ? y_end - y0 : kChunk;
        F weight_low[kChunk], weight_high[kChunk];
        for (int64_t i = 0; i < rows; ++i) {
          const Tap tap = bilinear_tap(y0 + i, g.h, g.height, g.align_corners);
          weight_low[i] = broadcast(static_cast<float>(tap.weight_low<double>()));
          weight_high[i] = broadcast(static_cast<float>(tap.weight_high<double>()));
          body.row(i, y0 + i, x0, n);
        }
        for (int64_t x = 0; x < n; x += kLanes) {
          across(g, upper, stride, span.first, x0 + x, g.planes, low);
          if (!last) across(g, lower, stride, span.first, x0 + x, g.planes, high);
          for (int64_t i = 0; i < rows; ++i) {
            body.pixels(i, x, low, last ? low : high, weight_low[i], weight_high[i], !last,
                        kGradient ? at_low + x * g.planes : nullptr,
                        kGradient ? at_high + x * g.planes : nullptr);
          }
        }
        body.finish(rows, y0, x0, n);
        if constexpr (kGradient) {  // a sum of many rows, one by one, would lose a rounding to each
          if (y0 + rows == y_end) continue;
          send_back(g, task, r, x0, n, at_low);
          clear(at_low, n);
          if (last) continue;
          send_back(g, task, r + 1, x0, n, at_high);
          clear(at_high, n);
        }
      }
      if constexpr (kGradient) {
        send_back(g, task, r, x0, n, at_low);
        pending = last ? -1 : r + 1;
      }
    }
    if constexpr (kGradient) {
      if (pending >= 0) send_back(g, task, pending, x0, n, at_high);
    }
  }
}

}  // namespace
}  // namespace cisc::upsample
