// Kernels of prototype_similarity for the instruction set that includes them; see simd.h.
#pragma once

#include "convert.h"
#include "prototype_similarity.h"
#include "simd.h"

namespace cisc::prototype_similarity {
namespace {

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
    each_run(p.width, q.stride_y, q.stride_x, first, n, [&](int64_t at, int64_t from, int64_t run) {
      read_row(q.kind, q.data, offset + i * q.stride_c + from, q.stride_x, run, row + at);
    });
    for (int64_t at = n; at % kLanes != 0; ++at) row[at] = 0.0f;
  }
  return {buffer, task.tile};
}

// Whether the channels of a pixel lie side by side: then a pixel is read as a vector, else a channel.
inline bool channels_first(const Problem& p) { return p.query.stride_c != 1 || p.channels < kLanes; }

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

struct Tile {
  float* inverse;  // [tile], 1 / norm, 0 where the norm is below eps
  float* cosine;   // [max(S, 1), tile]
  float* along;    // [tile], in place of the cosines
  float* part;     // [max(S + 1, kGroup), tile], what rounding has cost the sums; channels of a gradient
  float* back;     // [S, tile]
  float* rows;     // [kChannels, tile], or [2, C]
  float* packed;   // [kChannels, tile] for many classes
};

inline Tile layout(const Problem& p, const Task& task) {
  Tile t;
  t.inverse = task.workspace;
  t.cosine = t.inverse + task.tile;
  t.along = t.cosine;
  t.part = t.cosine + (p.slots > 0 ? p.slots : 1) * task.tile;
  t.back = t.part + (p.slots + 1 > kGroup ? p.slots + 1 : kGroup) * task.tile;
  t.packed = t.back + p.slots * task.tile;
  t.rows = t.packed + (p.slots < kMany ? 0 : (p.channels < kChannels ? p.channels : kChannels) * task.tile);
  return t;
}

inline F inverse_norm(F square, float eps) {
  const F norm = sqrt(square);
  return select(less(norm, broadcast(eps)), F{}, 1.0f / norm);
}

// Add to `total` the sum over four channels, or fewer, of row[j] * scale[j]; `lost` is what rounding has cost
// so far.
template <int kCount, typename Scale>
inline void add_rows(const float* const* row, int64_t n, const Scale& scale, float* total, float* lost) {
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
inline void add_rows(int64_t count, const float* const* row, int64_t n, const Scale& scale, float* total,
                     float* lost) {
  switch (count) {
    case 1:
      return add_rows<1>(row, n, scale, total, lost);
    case 2:
      return add_rows<2>(row, n, scale, total, lost);
    case 3:
      return add_rows<3>(row, n, scale, total, lost);
    default:
      return add_rows<4>(row, n, scale, total, lost);
  }
}

// Add to kSums rows of `value` the products of `count` channels of kLanes pixels with a unit vector each, the
// first with the pixels themselves if kNorm. q: [count, kLanes]; units: [kSums, C], or [kSums - 1, C], from
// the first of these channels; value, and lost, which is what rounding has cost them: [kSums, tile]
template <int kSums, bool kNorm>
inline void add_packed(const float* q, int64_t count, const float* units, int64_t channels, float* value,
                       float* lost, int64_t tile) {
  constexpr int64_t kRough = 16;               // channels that are added without regard to rounding
  constexpr int kChains = kSums == 4 ? 2 : 4;  // in so many chains
  Total total[kSums];
  for (int s = 0; s < kSums; ++s) total[s] = {load(value + s * tile), load(lost + s * tile)};
  for (int64_t begin = 0; begin < count; begin += kRough) {
    const int64_t end = count - begin < kRough ? count : begin + kRough;
    F chain[kChains][kSums] = {};
    const auto add = [&](int64_t c, F(&to)[kSums]) {
      const F pixels = load(q + c * kLanes);
      for (int s = 0; s < kSums; ++s) {
        to[s] = fma(pixels, kNorm && s == 0 ? pixels : broadcast(units[(kNorm ? s - 1 : s) * channels + c]),
                    to[s]);
      }
    };
    int64_t c = begin;
    for (; c + kChains <= end; c += kChains) {
      for (int i = 0; i < kChains; ++i) add(c + i, chain[i]);
    }
    for (; c < end; ++c) add(c, chain[0]);
    for (int s = 0; s < kSums; ++s) {
      F all = chain[0][s] + chain[1][s];
      if constexpr (kChains == 4) all += chain[2][s] + chain[3][s];
      total[s].add(all);
    }
  }
  for (int s = 0; s < kSums; ++s) {
    store(value + s * tile, total[s].value);
    store(lost + s * tile, total[s].lost);
  }
}

// Channels [c0, c0 + count) of n pixels for the norms and few unit vectors: four rows at a time, while they
// are in the first cache.
inline void add_few(const Problem& p, const Task& task, int64_t n, int64_t c0, int64_t count,
                    const Rows& rows, const Tile& t) {
  const int64_t tile = task.tile;
  for (int64_t c = 0; c < count; c += kGroup) {
    const int64_t group = count - c < kGroup ? count - c : kGroup;
    const float* row[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) row[j] = rows.data + (c + (j < group ? j : 0)) * rows.stride;
    add_rows(group, row, n, [](int, F value) { return value; }, t.inverse, t.part);
    for (int64_t s = 0; s < p.slots; ++s) {
      F unit[kGroup];
      for (int64_t j = 0; j < group; ++j) unit[j] = broadcast(task.units[s * p.channels + c0 + c + j]);
      add_rows(
          group, row, n, [&](int j, F) { return unit[j]; }, t.cosine + s * tile, t.part + (s + 1) * tile);
    }
  }
}

// The same for many unit vectors: channels of kLanes pixels are brought side by side, read once from rows.
inline void add_many(const Problem& p, const Task& task, int64_t n, int64_t c0, int64_t count,
                     const Rows& rows, const Tile& t) {
  const int64_t tile = task.tile;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(t.packed + i * count + c * kLanes, load(rows.data + c * rows.stride + i));
    }
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const float* q = t.packed + i * count;
    const auto add = [&](auto number, auto norm, int64_t s) {
      constexpr bool kNorm = decltype(norm)::value;  // sum 0; sum s is of unit vector s - 1
      const float* units = task.units + (kNorm ? 0 : s - 1) * p.channels + c0;
      add_packed<decltype(number)::value, kNorm>(q, count, units, p.channels, t.inverse + s * tile + i,
                                                 t.part + s * tile + i, tile);
    };
    add(Constant<4>{}, Constant<true>{}, 0);
    int64_t s = 4;
    for (; s + 3 <= p.slots; s += 4) add(Constant<4>{}, Constant<false>{}, s);
    for (; s <= p.slots; ++s) add(Constant<1>{}, Constant<false>{}, s);
  }
}

// Fill t.inverse and t.cosine for n pixels, channel by channel.
inline void cosines_of_rows(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  const int64_t tile = task.tile, padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < (1 + p.slots) * tile; i += kLanes) {
    store(t.inverse + i, F{});  // and t.cosine behind it
    store(t.part + i, F{});
  }
  for (int64_t c0 = 0; c0 < p.channels; c0 += kChannels) {
    const int64_t count = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
    const Rows rows = read_channels(p, task, first, n, c0, count, t.rows);
    (p.slots < kMany ? add_few : add_many)(p, task, padded, c0, count, rows, t);
  }
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F inverse = inverse_norm(load(t.inverse + i), p.eps);
    store(t.inverse + i, inverse);
    for (int64_t s = 0; s < p.slots; ++s) {
      float* cosine = t.cosine + s * tile + i;
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
  const float* units = task.units;
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
// t.back becomes g / |q|, t.along, which is where the cosines were, (g . cosine) / |q|.
inline void prepare_back(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  for (int64_t s = 0; s < p.slots; ++s) {
    const float* grad = p.grad + task.image * p.grad_stride[0] + s * p.grad_stride[1];
    each_run(p.width, p.grad_stride[2], p.grad_stride[3], first, n,
             [&](int64_t at, int64_t from, int64_t run) {
               for (int64_t i = 0; i < run; ++i)
                 t.back[s * task.tile + at + i] = grad[from + i * p.grad_stride[3]];
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
    store(t.along + i, along * inverse);
  }
}

// Add to to[j * channels + i] the sum over n pixels of back[j] * row[i]: kSlots unit prototypes, kGroup
// channels.
template <int kSlots>
inline void add_units(const float* back, int64_t tile, const float* const* row, int64_t n, int64_t group,
                      double* to, int64_t channels) {
  F sums[kSlots][kGroup] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    F q[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) q[j] = load(row[j] + i);
    for (int s = 0; s < kSlots; ++s) {
      const F g = load(back + s * tile + i);
      for (int64_t j = 0; j < kGroup; ++j) sums[s][j] = fma(g, q[j], sums[s][j]);
    }
  }
  for (int s = 0; s < kSlots; ++s) {
    for (int64_t j = 0; j < group; ++j) to[s * channels + j] += static_cast<double>(sum(sums[s][j]));
  }
}

inline void backward_rows(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  constexpr int kSlots = kLanes == 16 ? 4 : 2;  // what registers hold
  const auto& out = p.grad_query;
  const int64_t tile = task.tile, padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < p.channels; c += kGroup) {
    const int64_t group = p.channels - c < kGroup ? p.channels - c : kGroup;
    const Rows rows = read_channels(p, task, first, n, c, group, t.rows);
    const float *row[kGroup], *units[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) {
      row[j] = rows.data + (j < group ? j : 0) * rows.stride;
      units[j] = task.units + c + (j < group ? j : 0);
    }
    float* result = t.part;  // [kGroup, tile]
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F inverse = load(t.inverse + i), along = load(t.along + i);
      F g[kGroup];
      for (int64_t j = 0; j < kGroup; ++j) g[j] = -(load(row[j] + i) * inverse) * along;
      for (int64_t s = 0; s < p.slots; ++s) {
        const F back = load(t.back + s * tile + i);
        for (int64_t j = 0; j < kGroup; ++j) g[j] = fma(back, broadcast(units[j][s * p.channels]), g[j]);
      }
      for (int64_t j = 0; j < kGroup; ++j) store(result + j * tile + i, g[j]);
    }
    double* to = task.grad_units + c;
    int64_t s = 0;
    for (; s + kSlots <= p.slots; s += kSlots) {
      add_units<kSlots>(t.back + s * tile, tile, row, padded, group, to + s * p.channels, p.channels);
    }
    for (; s < p.slots; ++s) {
      add_units<1>(t.back + s * tile, tile, row, padded, group, to + s * p.channels, p.channels);
    }
    for (int64_t j = 0; j < group; ++j) {
      const int64_t offset = task.image * out.stride_b + (c + j) * out.stride_c;
      each_run(p.width, out.stride_y, out.stride_x, first, n, [&](int64_t at, int64_t to_pixel, int64_t run) {
        write_row(out.kind, result + j * tile + at, out.stride_x, run, out.data, offset + to_pixel);
      });
    }
  }
}

inline void backward_pixels(const Problem& p, const Task& task, int64_t first, int64_t n, const Tile& t) {
  const float* units = task.units;
  const auto& out = p.grad_query;
  float* result = t.rows + p.channels;
  for (int64_t i = 0; i < n; ++i) {
    const float* q = read_pixel(p, task, first + i, t.rows);
    for (int64_t c = 0; c < p.channels; ++c) result[c] = -(q[c] * t.inverse[i]) * t.along[i];
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
