// Kernels of masked_average_pool for the instruction set that includes them; see simd.h.
#pragma once

#include "convert.h"
#include "masked_average_pool.h"
#include "simd.h"

namespace cisc::masked_average_pool {
namespace {

// Pixels [first, first + n) of one channel as kBlock float32, 0 behind the last; in place where they lie so.
inline const float* read_block(const Image<const void*>& features, int64_t plane, const Piece& piece,
                               int64_t first, int64_t n, float* buffer) {
  const bool dense = features.stride_x == 1 && (features.stride_y == piece.columns() || piece.rows() == 1);
  if (dense && features.kind == Float::f32 && n == kBlock) {
    return static_cast<const float*>(features.data) + plane + first;
  }
  if (dense) {
    read_row(features.kind, features.data, plane + first, 1, n, buffer);
  } else {
    each_run(piece.columns(), features.stride_y, features.stride_x, first, n,
             [&](int64_t at, int64_t from, int64_t run) {
               read_row(features.kind, features.data, plane + from, features.stride_x, run, buffer + at);
             });
  }
  for (int64_t i = n; i < kBlock; ++i) buffer[i] = 0.0f;
  return buffer;
}

inline void pool_planes(const Image<const void*>& features, int64_t image, int64_t first, int64_t channels,
                        int64_t begin, int64_t end, const Packed& weights, double* own, double* sums) {
  const Piece piece = weights.piece;
  const int64_t corner =
      image * features.stride_b + piece.top * features.stride_y + piece.left * features.stride_x;
  alignas(64) float buffers[kPlanes][kBlock];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t c = group * kPlanes;
    const int64_t planes = channels - c < kPlanes ? channels - c : kPlanes;
    for (int64_t i = 0; i < weights.slots * kPlanes; ++i) own[i] = 0.0;
    for (int64_t block = 0; block < piece.blocks(); ++block) {
      const int32_t filled = weights.filled[block];
      if (filled == 0) continue;
      const int64_t rest = piece.pixels() - block * kBlock, n = rest < kBlock ? rest : kBlock;
      const float* values[kPlanes];
      for (int64_t j = 0; j < kPlanes; ++j) {
        const int64_t plane = corner + (first + c + (j < planes ? j : 0)) * features.stride_c;
        values[j] =
            j < planes ? read_block(features, plane, piece, block * kBlock, n, buffers[j]) : values[0];
      }
      for (int32_t k = 0; k < filled; ++k) {
        const int64_t entry = block * weights.slots + k;
        const float* weight = weights.weight + entry * kBlock;
        F found[kPlanes] = {};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
          const F w = load(weight + i);
          const M none = same(w, F{});  // a pixel of weight 0 is left out even where its value is NaN or inf
          for (int64_t j = 0; j < kPlanes; ++j) {
            found[j] = fma(select(none, F{}, load(values[j] + i)), w, found[j]);
          }
        }
        double* to = own + weights.slot[entry] * kPlanes;
        for (int64_t j = 0; j < kPlanes; ++j) to[j] += static_cast<double>(sum(found[j]));
      }
    }
    for (int64_t slot = 0; slot < weights.slots; ++slot) {
      for (int64_t j = 0; j < planes; ++j) sums[slot * channels + c + j] += own[slot * kPlanes + j];
    }
  }
}

inline void pool_pixels(const Image<const void*>& features, int64_t image, int64_t first, int64_t channels,
                        int64_t begin, int64_t end, const Packed& weights, double* sums) {
  const Piece piece = weights.piece;
  alignas(64) float own[kBlock], values[kBlock];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t n = channels - group * kBlock < kBlock ? channels - group * kBlock : kBlock;
    const int64_t corner = image * features.stride_b + piece.top * features.stride_y +
                           piece.left * features.stride_x + first + group * kBlock;
    for (int64_t block = 0; block < piece.blocks(); ++block) {
      const int64_t rest = piece.pixels() - block * kBlock, pixels = rest < kBlock ? rest : kBlock;
      for (int32_t k = 0; k < weights.filled[block]; ++k) {
        const int64_t entry = block * weights.slots + k;
        const float* weight = weights.weight + entry * kBlock;
        for (int64_t c = 0; c < kBlock; ++c) own[c] = 0.0f;
        each_run(piece.columns(), features.stride_y, features.stride_x, block * kBlock, pixels,
                 [&](int64_t at, int64_t from, int64_t run) {
                   for (int64_t i = 0; i < run; ++i) {
                     if (weight[at + i] == 0.0f) continue;
                     read_row(features.kind, features.data, corner + from + i * features.stride_x, 1, n,
                              values);
                     for (int64_t c = 0; c < n; ++c) own[c] += weight[at + i] * values[c];
                   }
                 });
        double* to = sums + weights.slot[entry] * channels + group * kBlock;
        for (int64_t c = 0; c < n; ++c) to[c] += static_cast<double>(own[c]);
      }
    }
  }
}

inline void scatter(const float* factor, const Packed& weights, int64_t width, Float kind, void* plane,
                    int64_t offset) {
  const Piece piece = weights.piece;
  offset += piece.top * width + piece.left;
  const bool dense = width == piece.columns() || piece.rows() == 1;
  alignas(64) float values[kBlock];
  for (int64_t block = 0; block < piece.blocks(); ++block) {
    for (int64_t i = 0; i < kBlock; i += kLanes) store(values + i, F{});
    for (int32_t k = 0; k < weights.filled[block]; ++k) {
      const int64_t entry = block * weights.slots + k;
      const float* weight = weights.weight + entry * kBlock;
      const F f = broadcast(factor[weights.slot[entry]]);
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const F w = load(weight + i);
        store(values + i, select(same(w, F{}), load(values + i), fma(f, w, load(values + i))));
      }
    }
    const int64_t rest = piece.pixels() - block * kBlock, n = rest < kBlock ? rest : kBlock;
    if (dense) {
      write_row(kind, values, 1, n, plane, offset + block * kBlock);
    } else {
      each_run(piece.columns(), width, 1, block * kBlock, n, [&](int64_t at, int64_t to, int64_t run) {
        write_row(kind, values + at, 1, run, plane, offset + to);
      });
    }
  }
}

}  // namespace
}  // namespace cisc::masked_average_pool
