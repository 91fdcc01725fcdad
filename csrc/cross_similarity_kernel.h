// Kernels of cross_similarity for the instruction set that includes them; see simd.h.
#pragma once

#include "cross_similarity_pack.h"

namespace cisc::cross_similarity {
namespace {

static_assert(kSlopeRows % kPanel == 0, "slopes are of whole panels");

constexpr float kInfinity = __builtin_inff();

// a + the products of what two words hold
template <bool kPairs>
inline F multiply_add(F held, float streamed, F a) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    return _mm512_dpbf16_ps(a, (__m512bh)held, (__m512bh)broadcast(streamed));
  }
#endif
  static_assert(!kPairs || kLanes == 16, "float32 is packed where there is no such instruction");
  return fma(held, broadcast(streamed), a);
}

// Products of a tile with a panel, in registers.
struct Block {
  F of[kPanel][2];

  F operator()(int r, int v) const { return of[r][v]; }
};

// The same in memory, [panel,tile].
struct Stored {
  const float* data;

  F operator()(int r, int v) const { return load(data + r * kTile + v * kLanes); }
};

inline void store_block(const Block& b, float* to) {
#pragma GCC unroll 12
  for (int r = 0; r < kPanel; ++r) {
    store(to + r * kTile, b.of[r][0]);
    store(to + r * kTile + kLanes, b.of[r][1]);
  }
}

// Sums of `count` words' products.
template <bool kPairs>
inline Block multiply_chunk(const float* held, const float* streamed, int64_t count) {
  Block b = {};
  for (int64_t c = 0; c < count; ++c, held += kTile, streamed += kPanel) {
    const F first = load(held), second = load(held + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kPanel; ++r) {
      b.of[r][0] = multiply_add<kPairs>(first, streamed[r], b.of[r][0]);
      b.of[r][1] = multiply_add<kPairs>(second, streamed[r], b.of[r][1]);
    }
  }
  return b;
}

// In chunks of channels: a sum of many terms of one sign would lose a rounding to each.
template <bool kPairs>
inline Block multiply(const float* held, const float* streamed, int64_t depth) {
  constexpr int64_t kChunk = kPairs ? 32 : 16;
  alignas(64) float sums[kPanel * kTile];
  Block b = multiply_chunk<kPairs>(held, streamed, depth < kChunk ? depth : kChunk);
  for (int64_t done = kChunk; done < depth; done += kChunk) {
    store_block(b, sums);
    const int64_t count = depth - done < kChunk ? depth - done : kChunk;
    b = multiply_chunk<kPairs>(held + done * kTile, streamed + done * kPanel, count);
#pragma GCC unroll 12
    for (int r = 0; r < kPanel; ++r) {
      b.of[r][0] += load(sums + r * kTile);
      b.of[r][1] += load(sums + r * kTile + kLanes);
    }
  }
  return b;
}

// Cosines. The product of the two rests comes first: swapping the roles changes no bit.
template <bool kPairs>
inline Block cosines(const float* held, const float* held_rest, const float* streamed, int64_t depth,
                     const float* rest) {
  Block b = multiply<kPairs>(held, streamed, depth);
  const F first = load(held_rest), second = load(held_rest + kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < kPanel; ++r) {
    b.of[r][0] *= first * rest[r];
    b.of[r][1] *= second * rest[r];
  }
  return b;
}

// A call of its own, so that all registers are the sums'.
template <bool kPairs>
__attribute__((noinline)) void cosines_to(const float* held, const float* held_rest, const float* streamed,
                                          int64_t depth, const float* rest, float* to) {
  store_block(cosines<kPairs>(held, held_rest, streamed, depth, rest), to);
}

// The larger of each lane's first `rows` values.
template <typename Values>
inline F largest(const Values& b, int rows, int v) {
  F even = b(0, v), odd = even;
#pragma GCC unroll 12
  for (int r = 1; r < rows; ++r) {
    if (r % 2 == 0) {
      even = max(even, b(r, v));
    } else {
      odd = max(odd, b(r, v));
    }
  }
  return max(even, odd);
}

// Best value and its position in each lane; of equal ones the first.
struct Best {
  static constexpr bool kInRegisters = true;
  F value[2];
  I index[2];

  explicit Best(const Run& run) {
    for (int v = 0; v < 2; ++v) {
      value[v] = run.begins ? broadcast(-kInfinity) : load(run.state + kBest * kTile + v * kLanes);
      index[v] = run.begins ? broadcast(-1) : (I)load(run.state + kIndex * kTile + v * kLanes);
    }
  }

  template <typename Values>
  void take(const Values& b, int rows, int32_t first) {
    for (int v = 0; v < 2; ++v) {
      if (!any(less(value[v], largest(b, rows, v)))) continue;
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const M better = less(value[v], b(r, v));
        value[v] = select(better, b(r, v), value[v]);
        index[v] = select(better, broadcast(first + r), index[v]);
      }
    }
  }

  void end(const Run& run) const {
    for (int v = 0; v < 2; ++v) {
      store(run.state + kBest * kTile + v * kLanes, value[v]);
      store(run.state + kIndex * kTile + v * kLanes, (F)index[v]);
    }
  }
};

inline Entry read_entry(const void* heap, int64_t i) {
  Entry e;
  std::memcpy(&e, static_cast<const char*>(heap) + i * static_cast<int64_t>(sizeof e), sizeof e);
  return e;
}

inline void write_entry(void* heap, int64_t i, Entry e) {
  std::memcpy(static_cast<char*>(heap) + i * static_cast<int64_t>(sizeof e), &e, sizeof e);
}

inline bool is_worse(Entry a, Entry b) {
  return a.value < b.value || (a.value == b.value && a.index > b.index);
}

// Add to a heap of `count` entries, the worst of which is at the root.
inline void push(void* heap, int64_t count, Entry e) {
  int64_t at = count;
  while (at > 0) {
    const int64_t above = (at - 1) / 2;
    const Entry parent = read_entry(heap, above);
    if (!is_worse(e, parent)) break;
    write_entry(heap, at, parent);
    at = above;
  }
  write_entry(heap, at, e);
}

// Put another entry in place of the worst.
inline void replace(void* heap, int64_t count, Entry e) {
  int64_t at = 0;
  for (;;) {
    int64_t below = 2 * at + 1;
    if (below >= count) break;
    Entry child = read_entry(heap, below);
    if (below + 1 < count) {
      const Entry other = read_entry(heap, below + 1);
      if (is_worse(other, child)) {
        child = other;
        ++below;
      }
    }
    if (!is_worse(child, e)) break;
    write_entry(heap, at, child);
    at = below;
  }
  write_entry(heap, at, e);
}

// The k best of each lane. All lanes have seen as many.
struct TopK {
  static constexpr bool kInRegisters = false;
  const Run& run;
  int64_t seen;
  alignas(64) float least[kTile];  // to be among the best takes more

  explicit TopK(const Run& of) : run(of), seen(of.seen) {
    for (int i = 0; i < kTile; ++i) {
      least[i] = run.heaps[i] == nullptr ? kInfinity : seen < run.k ? -kInfinity : root(i);
    }
  }

  float root(int lane) const { return read_entry(run.heaps[lane], 0).value; }

  void take(const Stored& b, int rows, int32_t first) {
    const bool found[2] = {any(less(load(least), largest(b, rows, 0))),
                           any(less(load(least + kLanes), largest(b, rows, 1)))};
    if (found[0] || found[1]) {
      for (int r = 0; r < rows; ++r, ++seen) {
        for (int v = 0; v < 2; ++v) {
          if (found[v]) insert(b(r, v), v * kLanes, first + r);
        }
      }
    } else {
      seen += rows;
    }
  }

  void insert(F value, int lane, int32_t index) {
    uint32_t hits = bits(less(load(least + lane), value));
    if (hits == 0) return;
    alignas(64) float values[kLanes];
    store(values, value);
    for (; hits != 0; hits &= hits - 1) {
      const int i = __builtin_ctz(hits);
      const Entry e{values[i], index};
      void* heap = run.heaps[lane + i];
      if (seen < run.k) {
        push(heap, seen, e);
        if (seen + 1 < run.k) continue;
      } else {
        replace(heap, run.k, e);
      }
      least[lane + i] = root(lane + i);
    }
  }

  void end(const Run&) const {}
};

// The sums of softmax(cosine / temperature), and of it times the cosine, relative to its value at `top`. That
// is a cosine of 1 if nothing vanishes then; else the best so far.
template <bool kIndexed>
struct Softmax {
  static constexpr bool kInRegisters = false;
  F slope, top[2];
  Total total[2], weighted[2];
  Best best;

  explicit Softmax(const Run& run) : slope(broadcast(run.steepness)), best(run) {
    constexpr float kMild = 56.0f;  // 2^(-2 kMild) is far above the least float
    for (int v = 0; v < 2; ++v) {
      const float* state = run.state + v * kLanes;
      if (run.begins) {
        top[v] = broadcast(run.steepness <= kMild ? 1.0f : -2.0f);
        continue;
      }
      top[v] = load(state + kTop * kTile);
      total[v] = {load(state + kTotal * kTile), load(state + kTotalLost * kTile)};
      weighted[v] = {load(state + kWeighted * kTile), load(state + kWeightedLost * kTile)};
    }
  }

  void take(const Stored& b, int rows, int32_t first) {
    if constexpr (kIndexed) best.take(b, rows, first);
    for (int v = 0; v < 2; ++v) {
      const F most = largest(b, rows, v);
      if (any(less(top[v], most))) raise(v, most);
      F sum{}, product{};
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const F weight = exp2((b(r, v) - top[v]) * slope);
        sum += weight;
        product = fma(weight, b(r, v), product);
      }
      total[v].add(sum);
      weighted[v].add(product);
    }
  }

  void raise(int v, F to) {
    to = max(to, top[v]);
    const F factor = exp2((top[v] - to) * slope);
    top[v] = to;
    for (Total* sum : {&total[v], &weighted[v]}) {
      sum->value *= factor;
      sum->lost *= factor;
    }
  }

  void end(const Run& run) const {
    if constexpr (kIndexed) best.end(run);
    for (int v = 0; v < 2; ++v) {
      float* state = run.state + v * kLanes;
      store(state + kTop * kTile, top[v]);
      store(state + kTotal * kTile, total[v].value);
      store(state + kTotalLost * kTile, total[v].lost);
      store(state + kWeighted * kTile, weighted[v].value);
      store(state + kWeightedLost * kTile, weighted[v].lost);
    }
  }
};

template <bool kPairs, typename State>
inline void reduce(const Run& run) {
  alignas(64) float block[kPanel * kTile];
  State state(run);
  const float *streamed = run.streamed, *rest = run.streamed_rest;
  int64_t rows = run.rows;
  int32_t first = run.first;
  for (; rows > 0; rows -= kPanel, first += kPanel, streamed += run.depth * kPanel, rest += kPanel) {
    // A maximum is taken at once; what needs more registers starts from memory.
    if constexpr (State::kInRegisters) {
      if (rows >= kPanel) {
        state.take(cosines<kPairs>(run.held, run.held_rest, streamed, run.depth, rest), kPanel, first);
        continue;
      }
    }
    cosines_to<kPairs>(run.held, run.held_rest, streamed, run.depth, rest, block);
    if (rows >= kPanel) {
      state.take(Stored{block}, kPanel, first);
    } else {
      state.take(Stored{block}, static_cast<int>(rows), first);
    }
  }
  state.end(run);
}

template <bool kPairs>
inline void reduce(Reduction reduction, bool index, const Run& run) {
  if (reduction == Reduction::topk) return reduce<kPairs, TopK>(run);
  if (reduction != Reduction::softmax) return reduce<kPairs, Best>(run);
  index ? reduce<kPairs, Softmax<true>>(run) : reduce<kPairs, Softmax<false>>(run);
}

inline void reduce(Reduction reduction, bool pairs, bool index, const Run& run) {
#if defined(__AVX512BF16__)
  if (pairs) return reduce<true>(reduction, index, run);
#endif
  static_cast<void>(pairs);
  reduce<false>(reduction, index, run);
}

inline void products(const float* held, const float* streamed, int64_t depth, float* to) {
  store_block(multiply<false>(held, streamed, depth), to);
}

// Words of `streamed` in pairs of channels become such in pairs of pixels.
inline void pair_rows(const float* streamed, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int r = 0; r < kPanel / 2; ++r) {
      const uint32_t first = float_to_bits(streamed[c / 2 * kPanel + 2 * r]);
      const uint32_t second = float_to_bits(streamed[c / 2 * kPanel + 2 * r + 1]);
      to[c * (kPanel / 2) + r] =
          bits_to_float(c % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u));
    }
  }
}

// sums [kCount,tile] += slopes [rows,tile] times kCount channels of panels of `channels`; both in pairs of
// pixels, or in float32.
template <int kCount, bool kPairs>
inline void add_channels(const float* slopes, const float* streamed, int64_t rows, int64_t channels,
                         float* sums) {
  constexpr int kWords = kPairs ? kPanel / 2 : kPanel;  // of a channel
  F sum[kCount][2] = {};
  for (; rows > 0; rows -= kPanel, streamed += channels * kWords) {
    const int64_t here = kPairs || rows >= kPanel ? kWords : rows;
    for (int64_t r = 0; r < here; ++r, slopes += kTile) {
      const F first = load(slopes), second = load(slopes + kLanes);
#pragma GCC unroll 12
      for (int c = 0; c < kCount; ++c) {
        const float value = streamed[c * kWords + r];
        sum[c][0] = multiply_add<kPairs>(first, value, sum[c][0]);
        sum[c][1] = multiply_add<kPairs>(second, value, sum[c][1]);
      }
    }
  }
  for (int c = 0; c < kCount; ++c) {
    float* to = sums + c * kTile;
    store(to, load(to) + sum[c][0]);
    store(to + kLanes, load(to + kLanes) + sum[c][1]);
  }
}

template <bool kPairs>
inline void add_all_channels(const float* slopes, const float* streamed, int64_t rows, int64_t channels,
                             float* sums) {
  constexpr int kWords = kPairs ? kPanel / 2 : kPanel;
  int64_t c = 0;
  for (; c + kPanel <= channels; c += kPanel) {
    add_channels<kPanel, kPairs>(slopes, streamed + c * kWords, rows, channels, sums + c * kTile);
  }
  for (; c + 4 <= channels; c += 4) {
    add_channels<4, kPairs>(slopes, streamed + c * kWords, rows, channels, sums + c * kTile);
  }
  for (; c < channels; ++c) {
    add_channels<1, kPairs>(slopes, streamed + c * kWords, rows, channels, sums + c * kTile);
  }
}

inline void add_products(const float* slopes, const float* streamed, int64_t rows, int64_t channels,
                         float* sums) {
  add_all_channels<false>(slopes, streamed, rows, channels, sums);
}

// Slopes [panel,tile] as bfloat16 in pairs of pixels, in their place.
template <bool kPairs>
inline void narrow_slopes(float* slopes) {
#if defined(__AVX512BF16__)
  const auto narrow = [](const float* from) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(from)));
  };
  for (int r = 0; kPairs && r < kPanel / 2; ++r) {
    for (int v = 0; v < 2; ++v) {
      const float* from = slopes + 2 * r * kTile + v * kLanes;
      const auto low = (U)narrow(from), high = (U)narrow(from + kTile);
      store(slopes + r * kTile + v * kLanes, (F)(low | high << 16));
    }
  }
#else
  static_cast<void>(slopes);
#endif
}

// d value / d cosine = p (1 + (cosine - value) / temperature), p = 2^((cosine - value) steepness - log2
// total)
template <bool kPairs, bool kHeldParameters>
inline void back(const Run& run) {
  constexpr int64_t kSlopes = (kPairs ? kPanel / 2 : kPanel) * kTile;  // words of a panel's
  const float *streamed = run.streamed, *rest = run.streamed_rest, *parameters = run.streamed_parameters;
  const float* values = kPairs ? run.streamed_rows : run.streamed;
  F held[kParameters][2] = {};
  for (int v = 0; v < 2; ++v) {
    for (int i = 0; i < kParameters && kHeldParameters; ++i) {
      held[i][v] = load(run.held_parameters + i * kTile + v * kLanes);
    }
  }
  for (int64_t begin = 0; begin < run.rows; begin += kSlopeRows) {
    const int64_t count = run.rows - begin < kSlopeRows ? run.rows - begin : kSlopeRows;
    float* slopes = run.slopes;
    for (int64_t row = 0; row < count; row += kPanel) {
      cosines_to<kPairs>(run.held, run.held_rest, streamed, run.depth, rest, slopes);
#pragma GCC unroll 12
      for (int r = 0; r < kPanel; ++r) {
        for (int v = 0; v < 2; ++v) {
          const auto parameter = [&](int i) {
            return kHeldParameters ? held[i][v] : broadcast(parameters[i * kPanel + r]);
          };
          float* at = slopes + r * kTile + v * kLanes;
          const F above = load(at) - parameter(kValue);
          const F p = exp2(min(F{}, fma(above, broadcast(run.steepness), -parameter(kLogTotal))));
          const F lift = fma(above, broadcast(run.inverse_temperature), broadcast(1.0f));
          store(at, parameter(kGrad) * p * lift * rest[r]);
        }
      }
      for (int64_t r = count - row; r < kPanel; ++r) {  // behind the last pixel
        store(slopes + r * kTile, F{});
        store(slopes + r * kTile + kLanes, F{});
      }
      narrow_slopes<kPairs>(slopes);
      slopes += kSlopes;
      streamed += run.depth * kPanel;
      rest += kPanel;
      if (!kHeldParameters) parameters += kParameters * kPanel;
    }
    add_all_channels<kPairs>(run.slopes, values, count, run.channels, run.sums);
    values += kSlopeRows * run.channels / (kPairs ? 2 : 1);
  }
}

template <bool kPairs>
inline void back(const Run& run) {
  run.held_parameters != nullptr ? back<kPairs, true>(run) : back<kPairs, false>(run);
}

inline void back(bool pairs, const Run& run) {
#if defined(__AVX512BF16__)
  if (pairs) return back<true>(run);
#endif
  static_cast<void>(pairs);
  back<false>(run);
}

// A sum of many entries, in float64.
inline float long_sum(const float* row, const int32_t* pixel, const float* weight, int64_t n) {
  constexpr int kHalf = kLanes / 2;
  alignas(64) float values[kLanes];
  D low{}, high{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(values, gather(row, load(pixel + i)));
    low += widen(values) * widen(weight + i);
    high += widen(values + kHalf) * widen(weight + i + kHalf);
  }
  low += high;
  double sum = 0.0;
  for (int lane = 0; lane < kHalf; ++lane) sum += low[lane];
  for (; i < n; ++i) sum += static_cast<double>(weight[i]) * static_cast<double>(row[pixel[i]]);
  return static_cast<float>(sum);
}

inline void segment_sums(const Pixels& p, int64_t channel, const Segments& segments, float* buffer,
                         float* to) {
  constexpr int64_t kLong = 8;
  const auto& image = p.image;
  const float* row = buffer;
  if (image.kind == Float::f32 && image.stride_x == 1 && image.stride_y == p.width) {
    row = static_cast<const float*>(image.data) + channel * image.stride_c;
  } else {
    with_kind(image.kind, image.data, [&](auto data) {
      each_run(p.width, image.stride_y, image.stride_x, 0, p.pixels,
               [&](int64_t at, int64_t from, int64_t run) {
                 read_row(data + channel * image.stride_c + from, image.stride_x, run, buffer + at);
               });
    });
  }
  for (int64_t i = 0; i < segments.count; ++i) {
    const int64_t begin = segments.start[i], n = segments.start[i + 1] - begin;
    const int32_t* pixel = segments.pixel + begin;
    const float* weight = segments.weight + begin;
    if (n >= kLong) {
      to[i] = long_sum(row, pixel, weight, n);
      continue;
    }
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) sum += weight[j] * row[pixel[j]];
    to[i] = sum;
  }
}

inline void finish(const Pixels& p, const Positions& positions, const float* sums, int64_t stride,
                   const Image<void*>& to, float* tile) {
  // 0 * NaN is NaN: of a pixel that is not finite, nothing else is needed to spoil its gradient.
  float* rest = tile + p.channels * kTile;
  pack<kTile>(p, positions, false, tile, rest);
  const Taken<kTile> scale(p.lengths.scale, positions), inverse(p.lengths.rest, positions);
  alignas(64) float sum[kTile] = {};
  const auto size = static_cast<size_t>(positions.n) * sizeof(float);
  Total along[2];
  for (int64_t c = 0; c < p.channels; ++c) {
    std::memcpy(sum, sums + c * stride, size);
    for (int v = 0; v < 2; ++v) along[v].add(load(sum + v * kLanes) * load(tile + c * kTile + v * kLanes));
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    std::memcpy(sum, sums + c * stride, size);
    for (int v = 0; v < 2; ++v) {
      float* at = tile + c * kTile + v * kLanes;
      const F grad = load(sum + v * kLanes) - load(at) * (along[v].value - along[v].lost);
      store(at, grad * inverse(v) * scale(v));
    }
  }
  Stretch parts[kTile];
  const int64_t count = stretches(positions, p.width, to.stride_y, to.stride_x, parts);
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      write_row(to.kind, tile + c * kTile + parts[i].at, to.stride_x, parts[i].n, to.data,
                c * to.stride_c + parts[i].offset);
    }
  }
}

constexpr Kernels kKernels{&measure, &pack_tile, &pack_panel,   &reduce,       &pair_rows,
                           &back,    &products,  &add_products, &segment_sums, &finish};

}  // namespace
}  // namespace cisc::cross_similarity
