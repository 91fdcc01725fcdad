// prototype_similarity on a GPU: the query is read once for all prototypes, or for some of many.
//
// Work at B = 16, C = 256, 181 x 181, one prototype, float32: 537 MB take an H200 125 us. A value takes 2
// multiply-adds: 10 us.

#include <type_traits>

#include "prototype_similarity_device.cuh"

namespace cisc::prototype_similarity {

namespace {

constexpr int kTogether = 2;  // sums of a pixel that warps bring together at once

// Planes whose pixels lie side by side, n at an access: a block has the pixels of a tile, a warp every eighth
// channel of them. The groups of a warp start up to n - 1 pixels in front of the tile, as its planes lie in
// memory.
template <typename T, int n, int most_slots>
__global__ void __launch_bounds__(kThreads, most_slots > 1 ? 2 : 3)
    forward_planes_kernel(Planes<const T> query, Problem p, float* similarity) {
  using I = std::conditional_t<(n > 1), int32_t, int64_t>;
  constexpr int in_flight = most_slots > 4 ? 4 : n == 8 && most_slots == 1 ? 6 : 8;
  struct Memory {
    alignas(16) float sums[kTogether][kWarps][kWarp * n];
    int shift[kWarps];
  };
  CISC_SHARED(memory, Memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = ceil_div(p.slots, most_slots);
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

// Pixels whose channels lie side by side: a warp has some pixels, a thread n channels of every 32 n.
template <typename T, int most_slots, int together>
__global__ void __launch_bounds__(kThreads, 2)
    forward_pixels_kernel(Planes<const T> query, Problem p, float* similarity) {
  constexpr int n = kWide<T>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t groups = ceil_div(p.slots, most_slots);
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

template <typename T, int n, int most_slots>
void launch_forward_planes(const Gpu& gpu, const Planes<const T>& query, Problem p, int64_t images,
                           float* similarity) {
  p.tile = n * (n == 1 || starts_aligned<n>(query) ? kWarp : kWarp - 1);
  p.tiles = ceil_div(p.pixels, p.tile);
  gpu.launch(forward_planes_kernel<T, n, most_slots>, images * p.tiles * ceil_div(p.slots, most_slots),
             kThreads, 0, query, p, similarity);
}

template <typename T, int most_slots, int together>
void launch_forward_pixels(const Gpu& gpu, const Planes<const T>& query, Problem p, int64_t images,
                           float* similarity) {
  p.tile = kWarps * together;
  p.tiles = ceil_div(p.pixels, p.tile);
  gpu.launch(forward_pixels_kernel<T, most_slots, together>, images * p.tiles * ceil_div(p.slots, most_slots),
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
    return launch_forward_planes<T, 1, 16>(gpu, query, p, images, similarity);
  }
  if (p.slots == 1) return launch_forward_planes<T, n, 1>(gpu, query, p, images, similarity);
  if (p.slots <= 4) return launch_forward_planes<T, n, 4>(gpu, query, p, images, similarity);
  launch_forward_planes<T, 4, 16>(gpu, query, p, images, similarity);
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

}  // namespace
}  // namespace cisc::prototype_similarity

CISC_DEFINE(cisc::prototype_similarity::kSchema)

CISC_REGISTER(m) { m.impl("prototype_similarity", TORCH_BOX(&cisc::prototype_similarity::cuda_forward)); }
