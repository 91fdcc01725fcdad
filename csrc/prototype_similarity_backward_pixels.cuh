// Backward of prototype_similarity on a GPU where the channels of a pixel lie side by side (channels-last).
#pragma once

#include "prototype_similarity_backward.cuh"

namespace cisc::prototype_similarity {
namespace {

// As in forward_pixels_kernel; values of up to kDeep channels are in registers. With fused (S = 1, C <=
// kDeep) the sums for the prototype too.
template <typename T, bool fused>
__global__ void __launch_bounds__(kThreads, 2)
    backward_pixels_kernel(Planes<const T> query, Back b, Planes<T> grad_query) {
  constexpr int n = kWide<T>, parts = kDeep / (kWarp * n), together = 8 / parts,
                share_lanes = kWarp / together;
  CISC_SHARED(memory, Pack<float, 4>[fused ? kWarps : 1][kDeep / 4]);
  const Problem& p = b.problem;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t chunk = blockIdx.x % b.chunks, image = blockIdx.x / b.chunks;
  const float* grad = b.grad.data + image * b.grad.stride_b;
  const float* units = p.units.of(image);
  float sums[parts][n] = {};
  Group<T, n> x[parts][together] = {};
  for (int64_t tile = chunk * b.steps; tile < (chunk + 1) * b.steps && tile < p.tiles; ++tile) {
    const int64_t pixel = tile * p.tile + warp * together;
    if (pixel >= p.pixels) break;
    const int count = static_cast<int>(p.pixels - pixel < together ? p.pixels - pixel : together);
    const auto read = [&](int64_t first) {
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        const int64_t channel = first + (k * kWarp + lane) * n;
        planes::Walk<const T> walk(query, query.data + image * query.stride_b + channel, pixel);
#pragma unroll
        for (int j = 0; j < together; ++j) {
          x[k][j] = {};
          if (j < count && channel < p.channels) x[k][j] = Group<T, n>::read(walk.at);
          walk.next(query);
        }
      }
    };
    const auto read_unit = [&](int64_t slot, int64_t channel, float (&unit)[n]) {
      if (channel < p.channels) {
        read_floats<n>(units + slot * p.units.stride_s + channel, unit);
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) unit[i] = 0.0f;
      }
    };
    const auto read_shares = [&](int64_t slot, float (&share)[together]) {
#pragma unroll
      for (int j = 0; j < together; ++j) {
        share[j] = j < count ? grad[slot * b.grad.stride_c + b.grad.offset_of(pixel + j)] : 0.0f;
      }
    };

    float square[together] = {}, along[together] = {}, share[together];
#pragma unroll 1
    for (int64_t first = 0; first < p.channels; first += kDeep) {
      read(first);
#pragma unroll
      for (int k = 0; k < parts; ++k) {
#pragma unroll
        for (int j = 0; j < together; ++j) {
#pragma unroll
          for (int i = 0; i < n; ++i) square[j] = fmaf(x[k][j].at(i), x[k][j].at(i), square[j]);
        }
      }
#pragma unroll 1
      for (int64_t slot = 0; slot < (fused ? 1 : p.slots); ++slot) {
        read_shares(slot, share);
#pragma unroll
        for (int k = 0; k < parts; ++k) {
          float unit[n];
          read_unit(slot, first + (k * kWarp + lane) * n, unit);
#pragma unroll
          for (int j = 0; j < together; ++j) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < n; ++i) dot = fmaf(x[k][j].at(i), unit[i], dot);
            along[j] = fmaf(dot, share[j], along[j]);
          }
        }
      }
    }
    float inverse_here = inverse_norm(planes::sums_over<together, kWarp>(square), p.eps);
    float along_here = planes::sums_over<together, kWarp>(along) * inverse_here;
    if (!fused && lane % share_lanes == 0 && lane / share_lanes < count) {
      b.inverse[image * p.pixels + pixel + lane / share_lanes] = inverse_here;
    }
    float inverse[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      inverse[j] = __shfl_sync(kAll, inverse_here, j * share_lanes);
      along[j] = __shfl_sync(kAll, along_here, j * share_lanes);
    }
#pragma unroll 1
    for (int64_t first = 0; first < p.channels; first += kDeep) {
      if (p.channels > kDeep) read(first);
#pragma unroll
      for (int k = 0; k < parts; ++k) {
        const int64_t channel = first + (k * kWarp + lane) * n;
        constexpr int beside = fused ? together : n == 4 ? 2 : 1;  // pixels whose gradient is at hand at once
        planes::Walk<T> walk(grad_query, grad_query.data + image * grad_query.stride_b + channel, pixel);
#pragma unroll
        for (int at = 0; at < together; at += beside) {
          float back[beside][n] = {};
#pragma unroll 1
          for (int64_t slot = 0; slot < (fused ? 1 : p.slots); ++slot) {
            float unit[n];
            read_unit(slot, channel, unit);
            if (!fused) read_shares(slot, share);
#pragma unroll
            for (int j = 0; j < beside; ++j) {
#pragma unroll
              for (int i = 0; i < n; ++i) back[j][i] = fmaf(share[at + j], unit[i], back[j][i]);
            }
          }
#pragma unroll
          for (int j = 0; j < beside; ++j) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
              const float value = x[k][at + j].at(i) * inverse[at + j];
              back[j][i] = fmaf(-value, along[at + j], back[j][i]) * inverse[at + j];
              if (fused) sums[k][i] = fmaf(value, share[at + j], sums[k][i]);
            }
            if (at + j < count && channel < p.channels) Group<T, n>::of(back[j]).write(walk.at);
            walk.next(grad_query);
          }
        }
      }
    }
  }
  if constexpr (fused) {
    auto* flat = reinterpret_cast<float*>(&memory[0][0]);
#pragma unroll
    for (int k = 0; k < parts; ++k) write_floats<n>(flat + warp * kDeep + (k * kWarp + lane) * n, sums[k]);
    __syncthreads();
    if (threadIdx.x >= p.channels) return;
    float sum = 0.0f;
    for (int k = 0; k < kWarps; ++k) sum += flat[k * kDeep + threadIdx.x];
    b.partial[(image * b.chunks + chunk) * p.channels + threadIdx.x] = sum;
  }
}

template <typename T>
constexpr int kGathered = 32 / kWide<T>;  // slots of a block of gradient_kernel

// What the pixels send to the unit vectors of some slots; the query's channels lie side by side.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(Planes<const T> query, Back b) {
  constexpr int n = kWide<T>, in_flight = 4;
  CISC_SHARED(memory, Pack<float, 4>[kWarps][kWarp * n / 4]);
  const Problem& p = b.problem;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = ceil_div(p.slots, kGathered<T>), deep_blocks = ceil_div(p.channels, kWarp * n);
  int64_t block = blockIdx.x;
  const int64_t first_slot = block % groups * kGathered<T>;
  block /= groups;
  const int64_t first_channel = block % deep_blocks * kWarp * n, channel = first_channel + lane * n;
  block /= deep_blocks;
  const int64_t chunk = block % b.chunks, image = block / b.chunks;
  const float* grad = b.grad.data + image * b.grad.stride_b + first_slot * b.grad.stride_c;
  const bool there = channel < p.channels;
  float sums[kGathered<T>][n] = {};
  const int64_t begin = chunk * b.steps * p.tile;
  const int64_t end = begin + b.steps * p.tile < p.pixels ? begin + b.steps * p.tile : p.pixels;
  for (int64_t pixel = begin + warp * in_flight; pixel < end; pixel += kWarps * in_flight) {
    Group<T, n> x[in_flight] = {};
    planes::Walk<const T> walk(query, query.data + image * query.stride_b + (there ? channel : 0), pixel);
#pragma unroll
    for (int j = 0; j < in_flight; ++j) {
      if (pixel + j < end && there) x[j] = Group<T, n>::read(walk.at);
      walk.next(query);
    }
#pragma unroll
    for (int j = 0; j < in_flight; ++j) {
      if (pixel + j >= end) continue;
      const float inverse = b.inverse[image * p.pixels + pixel + j];
      const int64_t at = b.grad.offset_of(pixel + j);
#pragma unroll
      for (int s = 0; s < kGathered<T>; ++s) {
        if (first_slot + s >= p.slots) break;
        const float share = grad[s * b.grad.stride_c + at];
#pragma unroll
        for (int i = 0; i < n; ++i) sums[s][i] = fmaf(x[j].at(i) * inverse, share, sums[s][i]);
      }
    }
  }
  float* partial =
      b.partial + ((image * b.chunks + chunk) * p.slots + first_slot) * p.channels + first_channel;
  auto* flat = reinterpret_cast<float*>(&memory[0][0]);
#pragma unroll
  for (int s = 0; s < kGathered<T>; ++s) {
    __syncthreads();
    write_floats<n>(flat + (warp * kWarp + lane) * n, sums[s]);
    __syncthreads();
    const int own = static_cast<int>(threadIdx.x);
    if (own < kWarp * n && first_channel + own < p.channels && first_slot + s < p.slots) {
      float sum = 0.0f;
      for (int k = 0; k < kWarps; ++k) sum += flat[k * kWarp * n + own];
      float& to = partial[s * p.channels + own];
      to = b.adds ? to + sum : sum;
    }
  }
}

template <typename T>
void launch_backward_pixels(const Gpu& gpu, const Planes<const T>& query, Back& b, int64_t images,
                            const Planes<T>& grad_query) {
  Problem& p = b.problem;
  constexpr int together = 8 / (kDeep / (kWarp * kWide<T>));
  p.tile = kWarps * together;
  p.tiles = ceil_div(p.pixels, p.tile);
  cut(b);
  if (b.inverse == nullptr) {
    gpu.launch(backward_pixels_kernel<T, true>, images * b.chunks, kThreads, 0, query, b, grad_query);
    return;
  }
  // Whole images, or of a large one as many rows or as much of a row as there is memory for.
  const int64_t width = query.width, height = p.pixels / width,
                beside = ceil_div(p.slots, kGathered<T>) * ceil_div(p.channels, kWarp * kWide<T>);
  const int64_t columns = std::min(width, kInversePixels);
  const int64_t rows = std::min(height, std::max<int64_t>(kInversePixels / columns, 1));
  for (int64_t y = 0; y < height; y += rows) {
    for (int64_t x = 0; x < width; x += columns) {
      Back part = b;
      part.problem.pixels = std::min(rows, height - y) * std::min(columns, width - x);
      part.problem.tiles = ceil_div(part.problem.pixels, p.tile);
      part.grad.data += y * b.grad.stride_y + x * b.grad.stride_x;
      Planes<const T> from = query;
      from.data += y * query.stride_y + x * query.stride_x;
      Planes<T> to = grad_query;
      to.data += y * grad_query.stride_y + x * grad_query.stride_x;
      cut(part);
      gpu.launch(backward_pixels_kernel<T, false>, images * part.chunks, kThreads, 0, from, part, to);
      part.adds = y + x > 0;
      if (part.adds) {
        part.steps = b.steps;
        part.chunks = ceil_div(part.problem.tiles, b.steps);
      } else {
        cut(part, beside);
        b.steps = part.steps;
        b.chunks = part.chunks;
      }
      gpu.launch(gradient_kernel<T>, images * part.chunks * beside, kThreads, 0, from, part);
    }
  }
}

}  // namespace
}  // namespace cisc::prototype_similarity
