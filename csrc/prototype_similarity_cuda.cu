// prototype_similarity on a GPU: forward reads the query once; backward keeps a tile of it in registers, so
// that it is read once and its gradient written once.
//
// Work at B = 16, C = 256, 181 x 181, one prototype, float32: 537 MB take an H200 125 us forward, twice that
// backward. A value takes 2 multiply-adds forward and about 8 instructions backward: 10 and 40 us.

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "planes.cuh"
#include "prototype_similarity_arguments.h"
#include "tensors.h"

namespace cisc::prototype_similarity {

namespace {

using planes::Group;
using planes::kWide;
using planes::Planes;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kDeep = 256;        // channels whose values a block has in registers
constexpr int kHalf = kWarp / 2;  // threads that share a channel, in backward
constexpr int kHalves = kThreads / kHalf;
constexpr int kTogether = 2;  // sums of a pixel that warps bring together at once
constexpr int kFinishThreads = 1024, kFinishParts = kFinishThreads / kWarp, kFinishDeep = 256;
constexpr int64_t kUnitBytes = 16 << 20, kPartialBytes = 16 << 20, kSharedSums = 24 << 10;
constexpr int64_t kNarrow = 1 << 30;  // pixels and channels that 32 bits count
constexpr int64_t kBlocks = 2048;     // of a launch that leaves partial sums, where there is as much to do

// a / b, rounded up
constexpr int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 1 / norm; 0 where the norm is below eps; NaN stays NaN
__device__ __forceinline__ float inverse_norm(float square, float eps) {
  const float norm = __fsqrt_rn(square);
  return norm < eps ? 0.0f : __fdiv_rn(1.0f, norm);
}

// Prototypes [B,S,C] of some images in place.
template <typename T>
struct Vectors {
  T* data;
  int64_t stride_b, stride_s, stride_c;
};

// The same as unit vectors, 0 where they are shorter than eps.
struct Units {
  float* data;
  int64_t stride_b, stride_s, stride_c;
  float* inverse;  // [images,S], 1 / norm

  __device__ __forceinline__ const float* of(int64_t image) const { return data + image * stride_b; }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    units_kernel(Vectors<const T> prototypes, int64_t rows, int64_t slots, int64_t channels, float eps,
                 Units units) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp,
                lane = threadIdx.x % kWarp;
  if (row >= rows) return;
  const int64_t image = row / slots, slot = row % slots;
  const T* from = prototypes.data + image * prototypes.stride_b + slot * prototypes.stride_s;
  float square = 0.0f;
#pragma unroll 4
  for (int64_t c = lane; c < channels; c += kWarp) {
    const float value = from[c * prototypes.stride_c].widen();
    square = fmaf(value, value, square);
  }
  const float inverse = inverse_norm(warp_sum(square), eps);
  if (lane == 0) units.inverse[row] = inverse;
  float* to = units.data + image * units.stride_b + slot * units.stride_s;
#pragma unroll 4
  for (int64_t c = lane; c < channels; c += kWarp) {
    to[c * units.stride_c] = from[c * prototypes.stride_c].widen() * inverse;
  }
}

struct Problem {
  int64_t channels, slots, pixels;
  int64_t tiles, tile;  // of an image, and pixels of one
  float eps;
  Units units;
};

// n values of a plane from `pixel` on, 0 outside of it. plane: its first pixel
template <int n, typename T>
__device__ __forceinline__ Group<T, n> read_edge(const T* plane, int64_t pixel, int64_t pixels) {
  float value[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = pixel + i >= 0 && pixel + i < pixels ? plane[pixel + i].widen() : 0.0f;
  }
  return Group<T, n>::of(value);
}

template <int n>
__device__ __forceinline__ void write_floats(float* to, const float (&value)[n]) {
  if constexpr (n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      write_pack<4>(to + i, Pack<float, 4>{{value[i], value[i + 1], value[i + 2], value[i + 3]}});
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = value[i];
  }
}

// Planes whose pixels lie side by side, n at an access: a block has the pixels of a tile, a warp every eighth
// channel of them. The groups of a warp start up to n - 1 pixels in front of the tile, as its planes lie in
// memory.
template <typename T, int n, int most_slots>
__global__ void __launch_bounds__(kThreads, most_slots > 1 ? 2 : 3)
    forward_planes_kernel(Planes<const T> query, Problem p, float* similarity) {
  using I = std::conditional_t<(n > 1), int32_t, int64_t>;
  constexpr int in_flight = most_slots > 4 ? 4 : 8;
  struct Memory {
    alignas(16) float sums[kTogether][kWarps][kWarp * n];
    int shift[kWarps];
  };
  CISC_SHARED(memory, Memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = over(p.slots, most_slots);
  const int64_t first_slot = blockIdx.x % groups * most_slots, tile = blockIdx.x / groups % p.tiles;
  const int64_t image = blockIdx.x / groups / p.tiles;
  const I first_pixel = static_cast<I>(tile * p.tile), pixels = static_cast<I>(p.pixels);
  const I channels = static_cast<I>(p.channels);
  const T* plane = query.data + image * query.stride_b + (warp < p.channels ? warp : 0) * query.stride_c;
  const int shift = n > 1 ? planes::past_aligned<n>(plane + first_pixel) : 0;
  const I pixel = first_pixel - shift + lane * n;
  const bool whole = pixel >= 0 && pixel + n <= pixels, some = pixel < pixels;
  const float* units = p.units.of(image) + first_slot;
  float square[n] = {}, dot[most_slots][n] = {};
  const T* at = plane + (n > 1 ? (whole ? pixel : 0) : query.offset_of(whole ? pixel : 0));
  const int64_t step = kWarps * query.stride_c;
  const auto add = [&](const Group<T, n>& x, I channel) {
    float unit[most_slots];
    if constexpr (most_slots % 4 == 0) {
#pragma unroll
      for (int s = 0; s < most_slots; s += 4) {
        const auto four =
            read_pack<4>(units + channel * p.units.stride_c + (first_slot + s < p.slots ? s : 0));
#pragma unroll
        for (int i = 0; i < 4; ++i) unit[s + i] = four.at[i];
      }
    } else {
#pragma unroll
      for (int s = 0; s < most_slots; ++s) unit[s] = units[channel * p.units.stride_c + s];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float value = x.at(i);
      square[i] = fmaf(value, value, square[i]);
#pragma unroll
      for (int s = 0; s < most_slots; ++s) dot[s][i] = fmaf(value, unit[s], dot[s][i]);
    }
  };
#pragma unroll 1
  for (I channel = warp; channel < channels; channel += in_flight * kWarps) {
    if (whole) {
      Group<T, n> x[in_flight] = {};
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
        if (channel + j * kWarps < channels) x[j] = Group<T, n>::read(at + j * step);
      }
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
        if (channel + j * kWarps < channels) add(x[j], channel + j * kWarps);
      }
    } else if (n > 1 && some) {
#pragma unroll 1
      for (int j = 0; j < in_flight; ++j) {
        if (channel + j * kWarps < channels) {
          add(read_edge<n>(at + j * step, pixel, pixels), channel + j * kWarps);
        }
      }
    }
    at += in_flight * step;
  }
  if (lane == 0) memory.shift[warp] = shift;
  const int own = static_cast<int>(threadIdx.x);
  const bool there = own < p.tile && first_pixel + own < pixels;
  float inverse = 0.0f;
  float* to = similarity + (image * p.slots + first_slot) * p.pixels + first_pixel + own;
#pragma unroll
  for (int first = 0; first <= most_slots; first += kTogether) {
    __syncthreads();
#pragma unroll
    for (int q = first; q < first + kTogether && q <= most_slots; ++q) {
      write_floats<n>(&memory.sums[q - first][warp][lane * n], q == 0 ? square : dot[q > 0 ? q - 1 : 0]);
    }
    __syncthreads();
#pragma unroll
    for (int q = first; q < first + kTogether && q <= most_slots; ++q) {
      float sum = 0.0f;
      if (there) {
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum += memory.sums[q - first][k][own + memory.shift[k]];
      }
      if (q == 0) {
        inverse = inverse_norm(sum, p.eps);
      } else if (there && first_slot + q - 1 < p.slots) {
        to[(q - 1) * p.pixels] = sum * inverse;
      }
    }
  }
}

// Read n floats that lie side by side, aligned to 16 bytes.
template <int n>
__device__ __forceinline__ void read_floats(const float* from, float (&value)[n]) {
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    const auto four = read_pack<4>(from + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) value[i + k] = four.at[k];
  }
}

// Pixels whose channels lie side by side: a warp has some pixels, a thread n channels of every 32 n.
template <typename T, int most_slots, int together>
__global__ void __launch_bounds__(kThreads, 2)
    forward_pixels_kernel(Planes<const T> query, Problem p, float* similarity) {
  constexpr int n = kWide<T>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = over(p.slots, most_slots);
  const int64_t first_slot = blockIdx.x % groups * most_slots, tile = blockIdx.x / groups % p.tiles;
  const int64_t image = blockIdx.x / groups / p.tiles, pixel = tile * p.tile + warp * together;
  if (pixel >= p.pixels) return;
  const int count = static_cast<int>(p.pixels - pixel < together ? p.pixels - pixel : together);
  const float* units = p.units.of(image) + first_slot * p.units.stride_s;
  float square[together] = {}, dot[most_slots][together] = {};
#pragma unroll 1
  for (int64_t channel = lane * n; channel < p.channels; channel += kWarp * n) {
    Group<T, n> x[together] = {};
    planes::Walk<const T> walk(query, query.data + image * query.stride_b + channel, pixel);
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (j < count) x[j] = Group<T, n>::read(walk.at);
      walk.next(query);
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
#pragma unroll
      for (int i = 0; i < n; ++i) square[j] = fmaf(x[j].at(i), x[j].at(i), square[j]);
    }
#pragma unroll
    for (int s = 0; s < most_slots; ++s) {
      if (most_slots > 1 && first_slot + s >= p.slots) break;
      float unit[n];
      read_floats<n>(units + s * p.units.stride_s + channel, unit);
#pragma unroll
      for (int j = 0; j < together; ++j) {
#pragma unroll
        for (int i = 0; i < n; ++i) dot[s][j] = fmaf(x[j].at(i), unit[i], dot[s][j]);
      }
    }
  }
  __syncwarp();
  constexpr int share = kWarp / together;
  const float inverse = inverse_norm(planes::sums_over<together, kWarp>(square), p.eps);
  float* to = similarity + (image * p.slots + first_slot) * p.pixels + pixel + lane / share;
#pragma unroll
  for (int s = 0; s < most_slots; ++s) {
    const float sum = planes::sums_over<together, kWarp>(dot[s]);
    if (lane % share == 0 && lane / share < count && first_slot + s < p.slots)
      to[s * p.pixels] = sum * inverse;
  }
}

// What comes back: [B,S,h,w] float32 of some images, in place.
using Grad = Planes<const float>;

struct Back {
  Problem problem;
  Grad grad;
  int64_t chunks, steps;  // of an image; tiles of a chunk
  bool shared_sums;
  float* partial;  // [images,chunks,S,C], what a chunk's pixels send to the unit vectors
  float* inverse;  // [images,h*w], 1 / norm of the query's pixels, or null
};

// As in forward_planes_kernel, but half a warp has a channel, of up to kDeep in registers. Of the pixels of a
// tile and those around it, a thread's group is the tile's where it starts in it. With n > 1 both tensors
// have the same strides; with `one`, S = 1 and C <= kDeep.
template <typename T, int n, bool one>
__global__ void __launch_bounds__(kThreads, 2)
    backward_planes_kernel(Planes<const T> query, Back b, Planes<T> grad_query) {
  constexpr int own = kDeep / kHalves, wide = kHalf * n;
  using I = std::conditional_t<(n > 1), int32_t, int64_t>;
  struct Memory {
    alignas(16) float sums[2][kHalves][wide];
    float inverse[wide], along[wide], share[wide];
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
    if (number < wide - n + 1) {
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
        memory.share[number] = share;
        toward *= share;
      }
      memory.inverse[number] = inverse;
      memory.along[number] = toward;
    }
    __syncthreads();

    // 1 / norm; that times what comes back; that times what comes back along the pixel's vector
    float inverse[n], share[n], taken[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int at = static_cast<int>(pixel + i - first_pixel);
      const bool there = mine && at >= 0;
      inverse[i] = there ? memory.inverse[at] : 0.0f;
      taken[i] = there ? memory.along[at] * inverse[i] : 0.0f;
      share[i] = there && one ? memory.share[at] * inverse[i] : 0.0f;
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
    const auto add_sums = [&](int64_t slot, I first, const float (&sum)[own / 2]) {
      constexpr int each = kHalf / (own / 2);
      const float of_channel = planes::sums_over<own / 2, kHalf>(sum);
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
        for (int first = 0; first < own; first += own / 2) {
          float sum[own / 2];
#pragma unroll
          for (int j = 0; j < own / 2; ++j) {
            sum[j] = 0.0f;
            const I here = channel + (first + j) * kHalves;
            if (mine && here < channels) {
              const float unit = unit_at(0, here);
              float back[n];
#pragma unroll
              for (int i = 0; i < n; ++i) {
                const float value = x[first + j].at(i);
                sum[j] = fmaf(value, share[i], sum[j]);
                back[i] = fmaf(-(value * inverse[i]), taken[i], share[i] * unit);
              }
              write(to, back);
            }
            to += kHalves * grad_query.stride_c;
          }
          add_sums(0, channel + first * kHalves, sum);
        }
      } else {
        constexpr int beside = 1;  // channels whose gradient is at hand at once
#pragma unroll
        for (int first = 0; first < own; first += beside) {
          float back[beside][n] = {};
#pragma unroll 1
          for (int64_t slot = 0; slot < p.slots; ++slot) {
            read_shares(slot, share);
#pragma unroll
            for (int j = 0; j < beside; ++j) {
              const float unit = unit_at(slot, channel + (first + j) * kHalves);
#pragma unroll
              for (int i = 0; i < n; ++i) back[j][i] = fmaf(share[i], unit, back[j][i]);
            }
          }
#pragma unroll
          for (int j = 0; j < beside; ++j) {
            if (!mine || channel + (first + j) * kHalves >= channels) continue;
#pragma unroll
            for (int i = 0; i < n; ++i) {
              const float value = x[first + j].at(i) * inverse[i];
              back[j][i] = fmaf(-value, taken[i], back[j][i] * inverse[i]);
            }
            write(to + (first + j) * kHalves * grad_query.stride_c, back[j]);
          }
        }
#pragma unroll 1
        for (int64_t slot = 0; slot < p.slots; ++slot) {
          read_shares(slot, share);
#pragma unroll
          for (int i = 0; i < n; ++i) share[i] *= inverse[i];
#pragma unroll
          for (int first = 0; first < own; first += own / 2) {
            float sum[own / 2];
#pragma unroll
            for (int j = 0; j < own / 2; ++j) {
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

// As in forward_pixels_kernel; values of up to kDeep channels are in registers. With fused (S = 1, C <=
// kDeep) the sums for the prototype too.
template <typename T, bool fused>
__global__ void __launch_bounds__(kThreads, 2)
    backward_pixels_kernel(Planes<const T> query, Back b, Planes<T> grad_query) {
  constexpr int n = kWide<T>, parts = kDeep / (kWarp * n), together = 8 / parts,
                share_lanes = kWarp / together;
  CISC_SHARED(memory, float[fused ? kWarps : 1][kDeep]);
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
        constexpr int beside = fused ? together : 2;  // pixels whose gradient is at hand at once
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
#pragma unroll
    for (int k = 0; k < parts; ++k) write_floats<n>(&memory[warp][(k * kWarp + lane) * n], sums[k]);
    __syncthreads();
    if (threadIdx.x >= p.channels) return;
    float sum = 0.0f;
    for (int k = 0; k < kWarps; ++k) sum += memory[k][threadIdx.x];
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
  const int64_t groups = over(p.slots, kGathered<T>), deep_blocks = over(p.channels, kWarp * n);
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
      partial[s * p.channels + own] = sum;
    }
  }
}

// Of one prototype: the sum of the chunks, in order, and from there the gradient through the norm.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(Back b, Vectors<T> grad_prototypes) {
  CISC_SHARED(memory, float[kFinishParts][kFinishDeep]);
  CISC_SHARED(total, double);
  constexpr int beside = kFinishDeep / kWarp;
  const Problem& p = b.problem;
  const int part = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t slot = blockIdx.x % p.slots, image = blockIdx.x / p.slots;
  float* partial = b.partial + (image * b.chunks * p.slots + slot) * p.channels;
  const float* units = p.units.of(image) + slot * p.units.stride_s;
  double along = 0.0;
  for (int64_t first = 0; first < p.channels; first += kFinishDeep) {
    float sum[beside] = {};
    for (int64_t chunk = part; chunk < b.chunks; chunk += kFinishParts) {
      const float* from = partial + chunk * p.slots * p.channels;
#pragma unroll
      for (int i = 0; i < beside; ++i) {
        const int64_t channel = first + i * kWarp + lane;
        if (channel < p.channels) sum[i] += from[channel];
      }
    }
#pragma unroll
    for (int i = 0; i < beside; ++i) memory[part][i * kWarp + lane] = sum[i];
    __syncthreads();
    const int64_t channel = first + threadIdx.x;
    if (threadIdx.x < kFinishDeep && channel < p.channels) {
      double all = 0.0;
      for (int k = 0; k < kFinishParts; ++k) all += static_cast<double>(memory[k][threadIdx.x]);
      partial[channel] = static_cast<float>(all);  // the first chunk's are added by now
      along += all * static_cast<double>(units[channel * p.units.stride_c]);
    }
    __syncthreads();
  }
  along = block_sum<kFinishThreads>(along);
  if (threadIdx.x == 0) total = along;
  __syncthreads();
  if (threadIdx.x >= kFinishDeep) return;
  const float toward = static_cast<float>(total), inverse = p.units.inverse[image * p.slots + slot];
  T* to = grad_prototypes.data + image * grad_prototypes.stride_b + slot * grad_prototypes.stride_s;
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += kFinishDeep) {
    const float unit = units[channel * p.units.stride_c];
    to[channel * grad_prototypes.stride_c] = T::narrow(fmaf(-toward, unit, partial[channel]) * inverse);
  }
}

// Unit vectors of the prototypes of some images.
class UnitVectors {
 public:
  // transposed: [images,C,S or more], else [images,S,C]
  UnitVectors(const Tensor& prototypes, int64_t images, bool transposed) : prototypes_(prototypes) {
    const int64_t slots = prototypes.size(1), channels = prototypes.size(2);
    const int64_t row = transposed && slots > 1 ? over(slots, 4) * 4 : slots;
    memory_ = device_empty(prototypes, {images * row * channels}, ScalarType::Float);
    inverse_ = device_empty(prototypes, {images * slots}, ScalarType::Float);
    units = {data_of<float>(memory_), row * channels, transposed ? 1 : channels, transposed ? row : 1,
             data_of<float>(inverse_)};
  }

  void make(const Gpu& gpu, int64_t first, int64_t images, float eps) {
    const int64_t slots = prototypes_.size(1), channels = prototypes_.size(2);
    with_float(float_kind(prototypes_.scalar_type()), [&](auto type) {
      using T = decltype(type);
      const Vectors<const T> vectors{
          static_cast<const T*>(prototypes_.const_data_ptr()) + first * prototypes_.stride(0),
          prototypes_.stride(0), prototypes_.stride(1), prototypes_.stride(2)};
      gpu.launch(units_kernel<T>, over(images * slots, kWarps), kThreads, 0, vectors, images * slots, slots,
                 channels, eps, units);
    });
  }

  Units units;

 private:
  const Tensor& prototypes_;
  Tensor memory_, inverse_;
};

// Whether planes of n elements at a time all start at a multiple of them.
template <int n, typename T>
bool starts_aligned(const Planes<T>& p) {
  return p.stride_b % n == 0 && p.stride_c % n == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % (n * sizeof(T)) == 0;
}

template <typename T, int n, int most_slots>
void launch_forward_planes(const Gpu& gpu, const Planes<const T>& query, Problem p, int64_t images,
                           float* similarity) {
  p.tile = n * (n == 1 || starts_aligned<n>(query) ? kWarp : kWarp - 1);
  p.tiles = over(p.pixels, p.tile);
  gpu.launch(forward_planes_kernel<T, n, most_slots>, images * p.tiles * over(p.slots, most_slots), kThreads,
             0, query, p, similarity);
}

template <typename T, int most_slots, int together>
void launch_forward_pixels(const Gpu& gpu, const Planes<const T>& query, Problem p, int64_t images,
                           float* similarity) {
  p.tile = kWarps * together;
  p.tiles = over(p.pixels, p.tile);
  gpu.launch(forward_pixels_kernel<T, most_slots, together>, images * p.tiles * over(p.slots, most_slots),
             kThreads, 0, query, p, similarity);
}

template <typename T>
void forward_of(const Gpu& gpu, const Planes<const T>& query, const Problem& p, bool in_pixels,
                int64_t images, float* similarity) {
  constexpr int n = kWide<T>;
  if (in_pixels) {
    if (p.slots == 1) return launch_forward_pixels<T, 1, 8>(gpu, query, p, images, similarity);
    return launch_forward_pixels<T, 8, 4>(gpu, query, p, images, similarity);
  }
  if (!planes::in_planes(query) || p.pixels >= kNarrow || p.channels >= kNarrow) {
    if (p.slots == 1) return launch_forward_planes<T, 1, 1>(gpu, query, p, images, similarity);
    return launch_forward_planes<T, 1, 20>(gpu, query, p, images, similarity);
  }
  if (p.slots == 1) return launch_forward_planes<T, n, 1>(gpu, query, p, images, similarity);
  if (p.slots <= 4) return launch_forward_planes<T, n, 4>(gpu, query, p, images, similarity);
  launch_forward_planes<T, 4, 20>(gpu, query, p, images, similarity);
}

// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// prototypes: [B,S,C] float32, bfloat16 or float16, any strides
// outputs
// similarity: [B,S,h,w] float32, contiguous
Tensor cuda_forward(const Tensor& query, const Tensor& prototypes, double eps) {
  check_arguments(kForward, query, prototypes, kHere);
  const Gpu gpu(kForward, "query", query);
  check_same_device(kForward, "prototypes", prototypes, query);
  const int64_t batch = query.size(0), slots = prototypes.size(1), channels = query.size(1);
  const std::vector<int64_t> size{batch, slots, query.size(2), query.size(3)};
  if (query.numel() == 0) return device_zeros(query, size, ScalarType::Float);
  Tensor similarity = device_empty(query, size, ScalarType::Float);
  if (similarity.numel() == 0) return similarity;
  const int64_t most = std::clamp<int64_t>(kUnitBytes / (slots * channels * 4), 1, batch);
  with_float(float_kind(query.scalar_type()), [&](auto type) {
    using T = decltype(type);
    auto view = planes::planes_of<const T>(query, query.const_data_ptr());
    const bool in_pixels = planes::in_pixels(view, channels);
    UnitVectors vectors(prototypes, most, !in_pixels);
    const Problem p{channels, slots, query.size(2) * query.size(3), 0, 0, norm_limit(eps), vectors.units};
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t images = std::min(most, batch - first);
      vectors.make(gpu, first, images, p.eps);
      forward_of<T>(gpu, view, p, in_pixels, images, data_of<float>(similarity) + first * slots * p.pixels);
      view.data += images * view.stride_b;
    }
  });
  return similarity;
}

// Chunks of the images of a launch, of so many tiles each.
void cut(Back& b, int64_t images, int64_t beside, int64_t cells) {
  const int64_t most = std::clamp<int64_t>(
      std::min(kPartialBytes / (4 * images * cells), over(kBlocks, images * beside)), 1, b.problem.tiles);
  b.steps = over(b.problem.tiles, most);
  b.chunks = over(b.problem.tiles, b.steps);
}

template <typename T, int n, bool one>
void launch_backward_planes(const Gpu& gpu, const Planes<const T>& query, Back& b, int64_t images,
                            const Planes<T>& grad_query) {
  Problem& p = b.problem;
  p.tile = n * (n == 1 || starts_aligned<n>(query) ? kHalf : kHalf - 2);
  p.tiles = over(p.pixels, p.tile);
  cut(b, images, 1, p.slots * p.channels);
  const int64_t bytes = 4 * p.slots * p.channels;
  b.shared_sums = bytes <= kSharedSums;
  gpu.launch(backward_planes_kernel<T, n, one>, images * b.chunks, kThreads, b.shared_sums ? bytes : 0, query,
             b, grad_query);
}

template <typename T>
void launch_backward_pixels(const Gpu& gpu, const Planes<const T>& query, Back& b, int64_t images,
                            const Planes<T>& grad_query) {
  Problem& p = b.problem;
  constexpr int together = 8 / (kDeep / (kWarp * kWide<T>));
  p.tile = kWarps * together;
  p.tiles = over(p.pixels, p.tile);
  cut(b, images, 1, p.slots * p.channels);
  if (b.inverse == nullptr) {
    gpu.launch(backward_pixels_kernel<T, true>, images * b.chunks, kThreads, 0, query, b, grad_query);
    return;
  }
  gpu.launch(backward_pixels_kernel<T, false>, images * b.chunks, kThreads, 0, query, b, grad_query);
  const int64_t beside = over(p.slots, kGathered<T>) * over(p.channels, kWarp * kWide<T>);
  cut(b, images, beside, p.slots * p.channels);
  gpu.launch(gradient_kernel<T>, images * b.chunks * beside, kThreads, 0, query, b);
}

// Whether groups of n elements of both lie at the same distances from multiples of them, and 32 bits count
// pixels and channels.
template <int n, typename T>
bool alike(const Planes<const T>& a, const Planes<T>& b, int64_t pixels, int64_t channels) {
  return a.stride_b == b.stride_b && a.stride_c == b.stride_c && pixels < kNarrow && channels < kNarrow &&
         (reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data)) % (n * sizeof(T)) == 0;
}

// grad: [B,S,h,w] float32, any strides
// query, prototypes: as in `cuda_forward`
// outputs
// gradients of query and prototypes, in their dtypes and, where those are dense, their strides
std::tuple<Tensor, Tensor> cuda_backward(const Tensor& grad, const Tensor& query, const Tensor& prototypes,
                                         double eps) {
  check_arguments(kBackward, query, prototypes, kHere);
  check_grad(grad, query, prototypes, kHere);
  const Gpu gpu(kBackward, "query", query);
  check_same_device(kBackward, "prototypes", prototypes, query);
  check_same_device(kBackward, "grad", grad, query);
  const int64_t batch = query.size(0), slots = prototypes.size(1), channels = query.size(1);
  Tensor grad_query = torch::stable::empty_like(query),
         grad_prototypes = torch::stable::empty_like(prototypes);
  if (grad.numel() == 0 || channels == 0) {
    return {torch::stable::zero_(grad_query), torch::stable::zero_(grad_prototypes)};
  }
  const int64_t pixels = query.size(2) * query.size(3), cells = slots * channels;
  with_float(float_kind(query.scalar_type()), [&](auto type) {
    using T = decltype(type);
    constexpr int n = kWide<T>;
    auto view = planes::planes_of<const T>(query, query.const_data_ptr());
    auto result = planes::planes_of<T>(grad_query, grad_query.mutable_data_ptr());
    const bool in_pixels = planes::in_pixels(view, channels) && planes::in_pixels(result, channels);
    const bool wide =
        planes::in_planes(view) && planes::in_planes(result) && alike<n>(view, result, pixels, channels);
    const bool fused = !in_pixels || (slots == 1 && channels <= kDeep);
    const int64_t bytes = 4 * std::max(cells, fused ? 0 : pixels);  // of an image
    const int64_t most = std::clamp<int64_t>(kUnitBytes / bytes, 1, batch);
    UnitVectors vectors(prototypes, most, false);
    Back b{{channels, slots, pixels, 0, 0, norm_limit(eps), vectors.units},
           planes::planes_of<const float>(grad, grad.const_data_ptr()),
           0,
           0,
           false,
           nullptr,
           nullptr};
    const int64_t most_chunks =
        std::clamp<int64_t>(kPartialBytes / (4 * most * cells), 1, over(kBlocks, most));
    Tensor partial = device_empty(query, {most * cells * most_chunks}, ScalarType::Float);
    Tensor inverse = device_empty(query, {fused ? 0 : most * pixels}, ScalarType::Float);
    b.partial = data_of<float>(partial);
    b.inverse = fused ? nullptr : data_of<float>(inverse);
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t images = std::min(most, batch - first);
      vectors.make(gpu, first, images, b.problem.eps);
      if (in_pixels) {
        launch_backward_pixels<T>(gpu, view, b, images, result);
      } else if (wide) {
        if (slots == 1 && channels <= kDeep) {
          launch_backward_planes<T, n, true>(gpu, view, b, images, result);
        } else {
          launch_backward_planes<T, 4, false>(gpu, view, b, images, result);
        }
      } else {
        launch_backward_planes<T, 1, false>(gpu, view, b, images, result);
      }
      with_float(float_kind(prototypes.scalar_type()), [&](auto other) {
        using P = decltype(other);
        const Vectors<P> to{
            static_cast<P*>(grad_prototypes.mutable_data_ptr()) + first * grad_prototypes.stride(0),
            grad_prototypes.stride(0), grad_prototypes.stride(1), grad_prototypes.stride(2)};
        gpu.launch(finish_kernel<P>, images * slots, kFinishThreads, 0, b, to);
      });
      view.data += images * view.stride_b;
      result.data += images * result.stride_b;
      b.grad.data += images * b.grad.stride_b;
    }
  });
  return {grad_query, grad_prototypes};
}

}  // namespace
}  // namespace cisc::prototype_similarity

CISC_REGISTER(m) {
  m.impl("prototype_similarity", TORCH_BOX(&cisc::prototype_similarity::cuda_forward));
  m.impl("prototype_similarity_backward", TORCH_BOX(&cisc::prototype_similarity::cuda_backward));
}
