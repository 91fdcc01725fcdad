// Kernels of prototype_similarity for the instruction set that includes them; see simd.h.
#pragma once

#include "convert.h"
#include "prototype_similarity.h"
#include "simd.h"

namespace cisc::prototype_similarity {
namespace {

// f(first pixel of a run within the task, its offset in the image, its length): rows of an image, or one run
// where they follow each other.
template <typename Function>
inline void each_run(const Problem& p, int64_t stride_y, int64_t stride_x, int64_t first, int64_t n,
                     Function&& f) {
  if (stride_y == p.width * stride_x) return f(int64_t{0}, first * stride_x, n);
  for (int64_t i = 0; i < n;) {
    const int64_t y = (first + i) / p.width, x = (first + i) % p.width;
    const int64_t run = p.width - x < n - i ? p.width - x : n - i;
    f(i, y * stride_y + x * stride_x, run);
    i += run;
  }
}

// Channels [c, c + count) of the tile's pixels as float32: rows of `stride` floats, 0 behind the last pixel.
// In place where they lie so.
struct Rows {
  const float* data;
  int64_t stride;
};

inline Rows read_channels(const Problem& p, const Task& task, int64_t first, int64_t n, int64_t c,
                          int64_t count, float* buffer) {
  const auto& q = p.query;
  const int64_t offset = task.image * q.stride_b + c * q.stride_c;
  if (q.kind == Float::f32 && q.stride_x == 1 && q.stride_y == p.width && n % kLanes == 0) {
    return {static_cast<const float*>(q.data) + offset + first, q.stride_c};
  }
  for (int64_t i = 0; i < count; ++i) {
    float* row = buffer + i * task.tile;
    each_run(p, q.stride_y, q.stride_x, first, n, [&](int64_t at, int64_t from, int64_t run) {
      read_row(q.kind, q.data, offset + i * q.stride_c + from, q.stride_x, run, row + at);
    });
    for (int64_t at = n; at % kLanes != 0; ++at) row[at] = 0.0f;
  }
  return {buffer, task.tile};
}

// Whether the channels of a pixel lie side by side: then a pixel is read as a vector, else a channel.
inline bool channels_first(const Problem& p) { return p.query.stride_c != 1 || p.channels < kLanes; }

struct Tile {
  float* inverse;  // [tile], 1 / norm, 0 where the norm is below eps
  float* cosine;   // [S, tile]
  float* part;     // [S + 1, tile], what rounding has cost the sums
  float* back;     // [S, tile]
  float* rows;     // what is left
};

inline Tile layout(const Problem& p, const Task& task) {
  Tile t;
  t.inverse = task.workspace;
  t.cosine = t.inverse + task.tile;
  t.part = t.cosine + p.slots * task.tile;
  t.back = t.part + (p.slots + 1) * task.tile;
  t.rows = t.back + p.slots * task.tile;
  return t;
}

inline F inverse_norm(F square, float eps) {
  const F norm = sqrt(square);
  return select(less(norm, broadcast(eps)), F{}, 1.0f / norm);
}

// Add to `total` the sum over four channels, or fewer, of row[j] * scale[j]; `lost` is what rounding has cost
// so far.
template <int kCount, typename Scale>
inline void add_products(const float* const* row, int64_t n, const Scale& scale, float* total, float* lost) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F first = load(row[0] + i);
    F sum = first * scale(0, first);
    for (int j = 1; j < kCount; ++j) {
      const F value = load(row[j] + i);
      sum = fma(value, scale(j, value), sum);
    }
    Total all{load(total + i), load(lost + i)};
    all.add(sum);
    store(total + i, all.value);
    store(lost + i, all.lost);
  }
}

template <typename Scale>
inline void add_products(int64_t count, const float* const* row, int64_t n, const Scale& scale, float* total,
                         float* lost) {
  switch (count) {
    case 1:
      return add_products<1>(row, n, scale, total, lost);
    case 2:
      return add_products<2>(row, n, scale, total, lost);
    case 3:
      return add_products<3>(row, n, scale, total, lost);
    default:
      return add_products<4>(row, n, scale, total, lost);
  }
}

// Fill t.inverse and t.cosine for n pixels, channel by channel.
inline void cosines_of_rows(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  constexpr int64_t kGroup = 4;  // channels that share one reading of the sums
  const float* units = p.units + task.image * p.slots * p.channels;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < task.tile; i += kLanes) store(t.inverse + i, F{});
  for (int64_t i = 0; i < p.slots * task.tile; i += kLanes) store(t.cosine + i, F{});
  for (int64_t i = 0; i < (p.slots + 1) * task.tile; i += kLanes) store(t.part + i, F{});
  for (int64_t c0 = 0; c0 < p.channels; c0 += kChannels) {
    const int64_t count = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
    const Rows rows = read_channels(p, task, first, n, c0, count, t.rows);
    for (int64_t c = 0; c < count; c += kGroup) {
      const int64_t group = count - c < kGroup ? count - c : kGroup;
      const float* row[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) row[j] = rows.data + (c + (j < group ? j : 0)) * rows.stride;
      add_products(
          group, row, padded, [](int, F value) { return value; }, t.inverse, t.part + p.slots * task.tile);
      for (int64_t s = 0; s < p.slots; ++s) {
        F unit[kGroup];
        for (int64_t j = 0; j < group; ++j) unit[j] = broadcast(units[s * p.channels + c0 + c + j]);
        add_products(
            group, row, padded, [&](int j, F) { return unit[j]; }, t.cosine + s * task.tile,
            t.part + s * task.tile);
      }
    }
  }
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F inverse = inverse_norm(load(t.inverse + i), p.eps);
    store(t.inverse + i, inverse);
    for (int64_t s = 0; s < p.slots; ++s) {
      float* cosine = t.cosine + s * task.tile + i;
      store(cosine, load(cosine) * inverse);
    }
  }
}

// The channels of one pixel as float32.
inline const float* read_pixel(const Problem& p, const Task& task, int64_t pixel, float* buffer) {
  const auto& q = p.query;
  const int64_t offset =
      task.image * q.stride_b + pixel / p.width * q.stride_y + pixel % p.width * q.stride_x;
  if (q.kind == Float::f32) return static_cast<const float*>(q.data) + offset;
  read_row(q.kind, q.data, offset, 1, p.channels, buffer);
  return buffer;
}

inline float dot(const float* a, const float* b, int64_t n) {
  Total total;
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    total.add(fma(load(a + c + kLanes), load(b + c + kLanes), load(a + c) * load(b + c)));
  }
  double all = total.sum();
  for (; c < n; ++c) all += static_cast<double>(a[c]) * static_cast<double>(b[c]);
  return static_cast<float>(all);
}

// The same pixel by pixel.
inline void cosines_of_pixels(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  const float* units = p.units + task.image * p.slots * p.channels;
  for (int64_t i = 0; i < n; ++i) {
    const float* q = read_pixel(p, task, first + i, t.rows);
    const float inverse = inverse_norm(broadcast(dot(q, q, p.channels)), p.eps)[0];
    t.inverse[i] = inverse;
    for (int64_t s = 0; s < p.slots; ++s) {
      t.cosine[s * task.tile + i] = dot(q, units + s * p.channels, p.channels) * inverse;
    }
  }
}

inline void cosines(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  channels_first(p) ? cosines_of_rows(p, task, first, n, t) : cosines_of_pixels(p, task, first, n, t);
}

inline void forward(const Problem& p, const Task& task) {
  const Tile t = layout(p, task);
  for (int64_t first = task.begin; first < task.end; first += task.tile) {
    const int64_t n = task.end - first < task.tile ? task.end - first : task.tile;
    cosines(p, task, first, n, t);
    for (int64_t s = 0; s < p.slots; ++s) {
      std::memcpy(p.similarity + (task.image * p.slots + s) * p.pixels + first, t.cosine + s * task.tile,
                  static_cast<size_t>(n) * sizeof(float));
    }
  }
}

// With g the gradient to the cosines, u the unit prototypes and q a query vector of unit v:
//   gradient to u: sum of g v;  to q: (sum of g u - v (g . cosine)) / |q|
// t.back becomes g / |q|, t.inverse (g . cosine) / |q|^2.
inline void prepare_back(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  for (int64_t s = 0; s < p.slots; ++s) {
    const float* grad = p.grad + task.image * p.grad_stride[0] + s * p.grad_stride[1];
    each_run(p, p.grad_stride[2], p.grad_stride[3], first, n, [&](int64_t at, int64_t from, int64_t run) {
      for (int64_t i = 0; i < run; ++i) t.back[s * task.tile + at + i] = grad[from + i * p.grad_stride[3]];
    });
    for (int64_t at = n; at % kLanes != 0; ++at) t.back[s * task.tile + at] = 0.0f;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const F inverse = load(t.inverse + i);
    F along{};
    for (int64_t s = 0; s < p.slots; ++s) {
      float* back = t.back + s * task.tile + i;
      along = fma(load(back), load(t.cosine + s * task.tile + i), along);
      store(back, load(back) * inverse);
    }
    store(t.inverse + i, along * inverse * inverse);
  }
}

inline void backward_rows(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  const float* units = p.units + task.image * p.slots * p.channels;
  const auto& out = p.grad_query;
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < p.channels; ++c) {
    const float* q = read_channels(p, task, first, n, c, 1, t.rows).data;
    float* result = t.part;
    for (int64_t i = 0; i < padded; i += kLanes) store(result + i, -load(q + i) * load(t.inverse + i));
    for (int64_t s = 0; s < p.slots; ++s) {
      const F unit = broadcast(units[s * p.channels + c]);
      const float* back = t.back + s * task.tile;
      F sums{};
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(result + i, fma(load(back + i), unit, load(result + i)));
        sums = fma(load(back + i), load(q + i), sums);
      }
      task.grad_units[s * p.channels + c] += static_cast<double>(sum(sums));
    }
    const int64_t offset = task.image * out.stride_b + c * out.stride_c;
    each_run(p, out.stride_y, out.stride_x, first, n, [&](int64_t at, int64_t to, int64_t run) {
      write_row(out.kind, result + at, out.stride_x, run, out.data, offset + to);
    });
  }
}

inline void backward_pixels(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  const float* units = p.units + task.image * p.slots * p.channels;
  const auto& out = p.grad_query;
  float* result = t.rows + p.channels;
  for (int64_t i = 0; i < n; ++i) {
    const float* q = read_pixel(p, task, first + i, t.rows);
    for (int64_t c = 0; c < p.channels; ++c) result[c] = -q[c] * t.inverse[i];
    for (int64_t s = 0; s < p.slots; ++s) {
      const float back = t.back[s * task.tile + i];
      const float* unit = units + s * p.channels;
      double* sums = task.grad_units + s * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) {
        result[c] += back * unit[c];
        sums[c] += static_cast<double>(back * q[c]);
      }
    }
    const int64_t y = (first + i) / p.width, x = (first + i) % p.width;
    write_row(out.kind, result, out.stride_c, p.channels, out.data,
              task.image * out.stride_b + y * out.stride_y + x * out.stride_x);
  }
}

inline void backward(const Problem& p, const Task& task) {
  const Tile t = layout(p, task);
  for (int64_t i = 0; i < p.slots * p.channels; ++i) task.grad_units[i] = 0.0;
  for (int64_t first = task.begin; first < task.end; first += task.tile) {
    const int64_t n = task.end - first < task.tile ? task.end - first : task.tile;
    cosines(p, task, first, n, t);
    prepare_back(p, task, first, n, t);
    channels_first(p) ? backward_rows(p, task, first, n, t) : backward_pixels(p, task, first, n, t);
  }
}

}  // namespace
}  // namespace cisc::prototype_similarity
