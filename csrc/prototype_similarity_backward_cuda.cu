// Backward of prototype_similarity on a GPU: a tile of the query is kept in registers, so that the query is
// read once and its gradient written once.
//
// Work at B = 16, C = 256, 181 x 181, one prototype, float32: 1074 MB take an H200 250 us. A value takes
// about 8 instructions: 40 us.

#include <tuple>

#include "prototype_similarity_device.cuh"

namespace cisc::prototype_similarity {

namespace {

constexpr int kDeep = 256;        // channels whose values a block has in registers
constexpr int kHalf = kWarp / 2;  // threads that share a channel, in backward
constexpr int kHalves = kThreads / kHalf;
constexpr int kFinishThreads = 1024, kFinishParts = kFinishThreads / kWarp, kFinishDeep = 256;
constexpr int64_t kSharedSums = 24 << 10;
// kBlocks: of a launch that leaves partial sums, where there is as much to do. kInversePixels: whose norms
// are held at once. Few in the simulator: its images and batches are large ones to it.
#ifdef CISC_SIMT
constexpr int64_t kPartialBytes = 24 << 10, kBlocks = 12, kInversePixels = 500;
#else
constexpr int64_t kPartialBytes = 16 << 20, kBlocks = 2048, kInversePixels = 4 << 20;
#endif

// What comes back: [B,S,h,w] float32 of some images, in place.
using Grad = Planes<const float>;

struct Back {
  Problem problem;
  Grad grad;
  int64_t most, most_chunks;  // images of a launch, and chunks of one that there is memory for
  int64_t chunks, steps;      // of an image; tiles of a chunk
  bool shared_sums;
  float* partial;  // [images,chunks,S,C], what a chunk's pixels send to the unit vectors
  float* inverse;  // [images,h*w], 1 / norm of the query's pixels, or null
  bool adds;       // to the partial sums of an image's earlier pixels
};

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
        constexpr int beside = 1;  // channels whose gradient is at hand at once
#pragma unroll
        for (int first = 0; first < own; first += beside) {
          float back[beside][n] = {}, share[n];
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
              back[j][i] = fmaf(-x[first + j].at(i), taken[i], back[j][i]) * scale[i];
            }
            write(to + (first + j) * kHalves * grad_query.stride_c, back[j]);
          }
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
      float& to = partial[s * p.channels + own];
      to = b.adds ? to + sum : sum;
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

// Chunks of an image, of so many tiles each: as many in a launch with fewer images, or there would not be
// memory for them.
void cut(Back& b, int64_t beside = 1) {
  b.steps = over(b.problem.tiles, std::min(b.most_chunks, over(kBlocks, b.most * beside)));
  b.chunks = over(b.problem.tiles, b.steps);
  check(b.chunks <= b.most_chunks, kBackward, "there is no memory for the sums of ", b.chunks, " chunks");
}

template <typename T, int n, bool one>
void launch_backward_planes(const Gpu& gpu, const Planes<const T>& query, Back& b, int64_t images,
                            const Planes<T>& grad_query) {
  Problem& p = b.problem;
  p.tile = n * (n == 1 || starts_aligned<n>(query) ? kHalf : kHalf - 2);
  p.tiles = over(p.pixels, p.tile);
  cut(b);
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
  cut(b);
  if (b.inverse == nullptr) {
    gpu.launch(backward_pixels_kernel<T, true>, images * b.chunks, kThreads, 0, query, b, grad_query);
    return;
  }
  // Whole images, or of a large one as many rows or as much of a row as there is memory for.
  const int64_t width = query.width, height = p.pixels / width,
                beside = over(p.slots, kGathered<T>) * over(p.channels, kWarp * kWide<T>);
  const int64_t columns = std::min(width, kInversePixels);
  const int64_t rows = std::min(height, std::max<int64_t>(kInversePixels / columns, 1));
  for (int64_t y = 0; y < height; y += rows) {
    for (int64_t x = 0; x < width; x += columns) {
      Back part = b;
      part.problem.pixels = std::min(rows, height - y) * std::min(columns, width - x);
      part.problem.tiles = over(part.problem.pixels, p.tile);
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
        part.chunks = over(part.problem.tiles, b.steps);
      } else {
        cut(part, beside);
        b.steps = part.steps;
        b.chunks = part.chunks;
      }
      gpu.launch(gradient_kernel<T>, images * part.chunks * beside, kThreads, 0, from, part);
    }
  }
}

// Whether groups of n elements of both lie at the same distances from multiples of them, and 32 bits count
// pixels and channels.
template <int n, typename T>
bool alike(const Planes<const T>& a, const Planes<T>& b, int64_t pixels, int64_t channels) {
  return a.stride_b == b.stride_b && a.stride_c == b.stride_c && pixels < kNarrow && channels < kNarrow &&
         (reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data)) % (n * sizeof(T)) == 0;
}

// grad: [B,S,h,w] float32, any strides
// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// prototypes: [B,S,C] float32, bfloat16 or float16, any strides
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
  if (batch * slots * channels == 0) {
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
    int64_t most = std::clamp<int64_t>(kUnitBytes / (4 * cells), 1, batch);
    if (!fused) most = std::clamp<int64_t>(kInversePixels / std::max<int64_t>(pixels, 1), 1, most);
    UnitVectors vectors(prototypes, most, false);
    Back b{{channels, slots, pixels, 0, 0, norm_limit(eps), vectors.units},
           planes::planes_of<const float>(grad, grad.const_data_ptr()),
           most,
           std::clamp<int64_t>(kPartialBytes / (4 * most * cells), 1, over(kBlocks, most)),
           0,
           0,
           false,
           nullptr,
           nullptr,
           false};
    Tensor partial = device_empty(query, {most * cells * b.most_chunks}, ScalarType::Float);
    Tensor inverse =
        device_empty(query, {fused ? 0 : std::min(most * pixels, kInversePixels)}, ScalarType::Float);
    b.partial = data_of<float>(partial);
    b.inverse = fused ? nullptr : data_of<float>(inverse);
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t images = std::min(most, batch - first);
      vectors.make(gpu, first, images, b.problem.eps);
      // Without pixels there are no chunks to sum: 0, or NaN for a prototype that is not finite.
      if (pixels == 0) {
        b.chunks = 0;
      } else if (in_pixels) {
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
  m.impl("prototype_similarity_backward", TORCH_BOX(&cisc::prototype_similarity::cuda_backward));
}
