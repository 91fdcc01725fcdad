// Backward of prototype_similarity on a GPU where the pixels of a channel lie side by side, or with any
// strides.
#pragma once

#include <type_traits>

#include "prototype_similarity_backward.cuh"

namespace cisc::prototype_similarity {
namespace {

constexpr int kHalf = kWarp / 2;  // threads that share a channel
constexpr int kHalves = kThreads / kHalf;
constexpr int64_t kSharedSums = 24 << 10;

// As in forward_planes_kernel, but half a warp has a channel, of up to kDeep in registers. Of the pixels of a
// tile and those around it, a thread's group is the tile's where it starts in it. With n > 1 both tensors
// have the same strides; with `one`, S = 1 and C <= kDeep.
template <typename T, int n, bool one>
__global__ void __launch_bounds__(kThreads, 2)
    backward_planes_kernel(Planes<const T> query, Back b, Planes<T> grad_query) {
  constexpr int own = kDeep / kHalves, wide = kHalf * n;
  constexpr int together = one ? own / 2 : own / 4;  // channels whose sums a half brings together at once
  using I = std::conditional_t<(n > 1), int32_t, int64_t>;
  struct Memory {
    alignas(16) float sums[2][kHalves][wide];
    float scale[wide], along[wide];
    int shift[kHalves];
  };
  CISC_SHARED(memory, Memory);
  CISC_DYNAMIC_SHARED(dynamic);
  const Problem& p = b.problem;
  const int half = static_cast<int>(threadIdx.x) / kHalf, place = static_cast<int>(threadIdx.x) % kHalf;
  const int64_t chunk = blockIdx.x % b.chunks, image = blockIdx.x / b.chunks;
  float* partial = b.partial + (image * b.chunks + chunk) * p.slots * p.channels;
  float* sums = b.shared_sums ? reinterpret_cast<float*>(dynamic) : partial;
  for (int64_t i = threadIdx.x; i < p.slots * p.channels; i += kThreads) sums[i] = 0.0f;
  __syncthreads();
  const I channels = static_cast<I>(p.channels), pixels = static_cast<I>(p.pixels),
          tiles = static_cast<I>(p.tiles);
  const int64_t first_channel = half < p.channels ? half : 0;
  const int64_t plane = image * query.stride_b + first_channel * query.stride_c;
  const float* grad = b.grad.data + image * b.grad.stride_b;
  const float* units = p.units.of(image);
  Group<T, n> x[own] = {};
  for (I tile = static_cast<I>(chunk * b.steps), end = tile + static_cast<I>(b.steps);
       tile < end && tile < tiles; ++tile) {
    const I first_pixel = tile * static_cast<I>(p.tile);
    const int shift = n > 1 ? planes::past_aligned<n>(query.data + plane + first_pixel) : 0;
    const I pixel = first_pixel - shift + place * n;
    const bool whole = pixel >= 0 && pixel + n <= pixels, some = pixel < pixels;
    const bool mine =
        some && pixel < first_pixel + static_cast<I>(p.tile) && (pixel >= first_pixel || tile == 0);
    const auto read = [&](I base) {
      const T* at =
          query.data + plane + base * query.stride_c + (n > 1 ? pixel : query.offset_of(whole ? pixel : 0));
      const I left = channels - base - half;
      if (whole) {
#pragma unroll
        for (int j = 0; j < own; ++j) {
          if (j * kHalves < left) x[j] = Group<T, n>::read(at);
          at += kHalves * query.stride_c;
        }
      } else {
#pragma unroll
        for (int j = 0; j < own; ++j) {
          x[j] = {};
          if (n > 1 && some && j * kHalves < left) x[j] = read_edge<n>(at - pixel, pixel, pixels);
          at += kHalves * query.stride_c;
        }
      }
    };
    const auto unit_at = [&](int64_t slot, I channel) {
      return channel < channels ? units[slot * p.units.stride_s + channel] : 0.0f;
    };
    const auto read_shares = [&](int64_t slot, float (&share)[n]) {
      const float* from = grad + slot * b.grad.stride_c;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const I at = pixel + i;
        share[i] = at >= 0 && at < pixels ? from[b.grad.offset_of(at)] : 0.0f;
      }
    };

    float square[n] = {}, along[n] = {};
#pragma unroll 1
    for (I base = 0; base < (one ? 1 : channels); base += kDeep) {
      const I channel = base + half;
      read(base);
#pragma unroll
      for (int j = 0; j < own; ++j) {
        if (channel + j * kHalves >= channels) continue;
        const float unit = one ? unit_at(0, channel + j * kHalves) : 0.0f;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          square[i] = fmaf(x[j].at(i), x[j].at(i), square[i]);
          if (one) along[i] = fmaf(x[j].at(i), unit, along[i]);
        }
      }
      if constexpr (!one) {
#pragma unroll 1
        for (int64_t slot = 0; slot < p.slots; ++slot) {
          float dot[n] = {}, share[n];
          read_shares(slot, share);
#pragma unroll
          for (int j = 0; j < own; ++j) {
            if (channel + j * kHalves >= channels) continue;
            const float unit = unit_at(slot, channel + j * kHalves);
#pragma unroll
            for (int i = 0; i < n; ++i) dot[i] = fmaf(x[j].at(i), unit, dot[i]);
          }
#pragma unroll
          for (int i = 0; i < n; ++i) along[i] = fmaf(share[i], dot[i], along[i]);
        }
      }
    }
    if (place == 0) memory.shift[half] = shift;
    write_floats<n>(&memory.sums[0][half][place * n], square);
    write_floats<n>(&memory.sums[1][half][place * n], along);
    __syncthreads();
    const int number = static_cast<int>(threadIdx.x);
    // Planes that start past a multiple of n reach past a tile of theirs, which is smaller.
    if (number < (p.tile == wide ? wide : wide - n + 1)) {
      float total = 0.0f, toward = 0.0f;
#pragma unroll 4
      for (int k = 0; k < kHalves; ++k) {
        total += memory.sums[0][k][number + memory.shift[k]];
        toward += memory.sums[1][k][number + memory.shift[k]];
      }
      const float inverse = inverse_norm(total, p.eps);
      toward *= inverse;
      if (one) {
        const I at = first_pixel + number;
        const float share = at < pixels ? grad[b.grad.offset_of(at)] : 0.0f;
        memory.scale[number] = share * inverse;
      } else {
        memory.scale[number] = inverse;
      }
      memory.along[number] = toward * inverse;
    }
    __syncthreads();

    // The gradient is `scale` times what comes to the unit vector (with `one`: times the prototype's unit
    // vector) less `taken` times the pixel's vector.
    float scale[n], taken[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int at = static_cast<int>(pixel + i - first_pixel);
      const bool there = mine && at >= 0;
      scale[i] = there ? memory.scale[at] : 0.0f;
      taken[i] = there ? memory.along[at] : 0.0f;
    }
    const auto write = [&](T* to, const float (&back)[n]) {
      if (whole) {
        Group<T, n>::of(back).write(to);
      } else {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          if (pixel + i >= 0 && pixel + i < pixels) to[i] = T::narrow(back[i]);
        }
      }
    };
    // sum: of the channels first, first + kHalves, ...
    const auto add_sums = [&](int64_t slot, I first, const float (&sum)[together]) {
      constexpr int each = kHalf / together;
      const float of_channel = planes::sums_over<together, kHalf>(sum);
      const I channel = first + place / each * kHalves;
      if (place % each == 0 && channel < channels) sums[slot * channels + channel] += of_channel;
    };
#pragma unroll 1
    for (I base = 0; base < (one ? 1 : channels); base += kDeep) {
      const I channel = base + half;
      if (!one && channels > kDeep) read(base);
      T* to = n > 1 ? grad_query.data + plane + base * query.stride_c + pixel
                    : grad_query.data + image * grad_query.stride_b +
                          (base + first_channel) * grad_query.stride_c +
                          grad_query.offset_of(whole ? pixel : 0);
      if constexpr (one) {
#pragma unroll
        for (int first = 0; first < own; first += together) {
          float sum[together];
#pragma unroll
          for (int j = 0; j < together; ++j) {
            sum[j] = 0.0f;
            const I here = channel + (first + j) * kHalves;
            if (mine && here < channels) {
              const float unit = unit_at(0, here);
              float back[n];
#pragma unroll
              for (int i = 0; i < n; ++i) {
                const float value = x[first + j].at(i);
                sum[j] = fmaf(value, scale[i], sum[j]);
                back[i] = fmaf(-value, taken[i], unit) * scale[i];
              }
              write(to, back);
            }
            to += kHalves * grad_query.stride_c;
          }
          add_sums(0, channel + first * kHalves, sum);
        }
      } else {
#pragma unroll
        for (int j = 0; j < own; ++j) {
          const I here = channel + j * kHalves;
          float back[n] = {}, share[n];
#pragma unroll 1
          for (int64_t slot = 0; slot < p.slots; ++slot) {
            read_shares(slot, share);
            const float unit = unit_at(slot, here);
#pragma unroll
            for (int i = 0; i < n; ++i) back[i] = fmaf(share[i], unit, back[i]);
          }
          if (!mine || here >= channels) continue;
#pragma unroll
          for (int i = 0; i < n; ++i) back[i] = fmaf(-x[j].at(i), taken[i], back[i]) * scale[i];
          write(to + j * kHalves * grad_query.stride_c, back);
        }
#pragma unroll 1
        for (int64_t slot = 0; slot < p.slots; ++slot) {
          float share[n];
          read_shares(slot, share);
#pragma unroll
          for (int i = 0; i < n; ++i) share[i] *= scale[i];
#pragma unroll
          for (int first = 0; first < own; first += together) {
            float sum[together];
#pragma unroll
            for (int j = 0; j < together; ++j) {
              sum[j] = 0.0f;
#pragma unroll
              for (int i = 0; i < n; ++i) sum[j] = fmaf(x[first + j].at(i), share[i], sum[j]);
              if (!mine) sum[j] = 0.0f;
            }
            add_sums(slot, channel + first * kHalves, sum);
          }
        }
      }
    }
    __syncthreads();
  }
  if (!b.shared_sums) return;
  for (int64_t i = threadIdx.x; i < p.slots * p.channels; i += kThreads) partial[i] = sums[i];
}

template <typename T, int n, bool one>
void launch_backward_planes(const Gpu& gpu, const Planes<const T>& query, Back& b, int64_t images,
                            const Planes<T>& grad_query) {
  Problem& p = b.problem;
  p.tile = n * (n == 1 || starts_aligned<n>(query) ? kHalf : kHalf - 2);
  p.tiles = ceil_div(p.pixels, p.tile);
  cut(b);
  const int64_t bytes = 4 * p.slots * p.channels;
  b.shared_sums = bytes <= kSharedSums;
  gpu.launch(backward_planes_kernel<T, n, one>, images * b.chunks, kThreads, b.shared_sums ? bytes : 0, query,
             b, grad_query);
}

}  // namespace
}  // namespace cisc::prototype_similarity
