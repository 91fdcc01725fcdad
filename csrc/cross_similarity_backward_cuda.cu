// Backward of cross_similarity on a GPU. "max" and "topk": a query pixel gathers its winners; for the guide,
// the winners are sorted by ranges of guide pixels, and a block adds up those of a few. "softmax", and
// "mean" of wide labels: the tiles of cosines once more, as factors of the other side's unit vectors. "mean"
// else: means of unit vectors (cross_similarity_means.cuh).
//
// The pairs' gradients take C multiply-adds for a pair's cosine, made anew for each 64 channels of the
// result, and C for the result: 5 times as many as forward for 256 channels, for each side. Winners'
// gradients are reads: of a vector for each winner, both ways, channel by channel.

#include <algorithm>
#include <tuple>

#include "cross_similarity_means.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kGathered = 16;              // channels that a thread sums
constexpr int kMeanChannels = 8;           // the same, of "mean"
constexpr int64_t kEntries = 4 << 20;      // winners that are sorted together
constexpr int64_t kGroupBytes = 32 << 10;  // sums of a group of guide pixels
constexpr int64_t kTotalBytes = 8 << 20;   // the same, kept while more winners are sorted

// grad: [B,S,h,w] float32, any strides
struct Gradient {
  static constexpr bool of_query = true;
  const float* data;
  int64_t stride_b, stride_s, stride_y, stride_x, width;

  __device__ float at(int64_t b, int64_t slot, int64_t pixel) const {
    return data[b * stride_b + slot * stride_s + pixel / width * stride_y + pixel % width * stride_x];
  }
};

// Gradient to one image of each pair, [B,C,h,w], any strides.
struct Target {
  Image<void*> image;
  int64_t width;

  __device__ int64_t offset(int64_t b, int64_t pixel) const {
    return b * image.stride_b + pixel / width * image.stride_y + pixel % width * image.stride_x;
  }

  // offset: of the pixel
  __device__ void write(int64_t offset, int64_t channel, float value) const {
    write_element(image.kind, image.data, offset + channel * image.stride_c, value);
  }
};

// Gradient of a vector's component from that of its unit vector, of which `along` lies along it.
__device__ __forceinline__ float through_norm(float sum, float unit, double along, float scale, float rest) {
  return (sum - unit * static_cast<float>(along)) * rest * scale;
}

struct Kernel {
  Side held, streamed;  // `held` is what the gradient goes to
  Classes classes;
  Gradient grad;
  Target target;
  int64_t images, slots, query_pixels;
  const int64_t* winners;  // [B,S,h,w,k] of "max" and "topk", -1 behind the last
  int64_t k;
  const float* similarity;  // [B,S,h,w] of "softmax"
  const float* log_totals;  // [B,S,h,w] of "softmax"
  float steepness, inverse_temperature;

  // Place of a query pixel in a tensor [B,S,h,w].
  __device__ int64_t place(int64_t b, int64_t slot, int64_t pixel) const {
    return (b * slots + slot) * query_pixels + pixel;
  }
};

// Winners of a query pixel, all in front.
__device__ int64_t count_winners(const int64_t* winners, int64_t k) {
  int64_t count = 0;
  while (count < k && winners[count] >= 0) ++count;
  return count;
}

// A block has 64 query pixels; it makes the sums of their winners' vectors twice, as they are not kept.
__global__ void __launch_bounds__(kThreads, 2) gather_winners_kernel(Kernel p) {
  CISC_SHARED(held, Pixels);
  CISC_SHARED(parts, double[kThreads]);
  const int64_t tiles = ceil_div(p.held.pixels, kTile);
  const int64_t b = p.held.first + blockIdx.x / tiles;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  if (part == 0) {
    const int64_t pixel = blockIdx.x % tiles * kTile + row;
    held.set(p.held, b, row, pixel < p.held.pixels ? pixel : -1, true, 0);
  }
  __syncthreads();
  const int64_t pixel = held.pixel[row];
  const Side& guide = p.streamed;
  double along = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t first = part * kGathered; pixel >= 0 && first < guide.channels;
         first += kParts * kGathered) {
      Sum sums[kGathered];
      for (int64_t slot = 0; slot < p.slots; ++slot) {
        const int64_t* winners = p.winners + p.place(b, slot, pixel) * p.k;
        const int64_t found = count_winners(winners, p.k);
        const float share = p.grad.at(b, slot, pixel) / static_cast<float>(found);
        for (int64_t i = 0; i < found; ++i) {
          const int64_t winner = winners[i], place = (b - guide.first) * guide.pixels + winner;
          if (winner >= guide.pixels) continue;
          const float scale = guide.scale[place], rest = guide.rest[place], low = guide.low[place];
          const int64_t offset = guide.offset(b, winner) + first * guide.image.stride_c;
#pragma unroll
          for (int c = 0; c < kGathered; ++c) {
            if (first + c >= guide.channels) continue;
            const float value =
                read_element(guide.image.kind, guide.image.data, offset + c * guide.image.stride_c);
            sums[c].add(share * unit_of(value, scale, rest, low));
          }
        }
      }
      const int64_t to = p.target.offset(b, pixel);
#pragma unroll
      for (int c = 0; c < kGathered; ++c) {
        if (first + c >= guide.channels) continue;
        const float unit = held.unit(p.held, row, first + c);
        if (pass == 0) {
          along += static_cast<double>(sums[c].value) * static_cast<double>(unit);
        } else {
          p.target.write(to, first + c,
                         through_norm(sums[c].value, unit, along, held.scale[row], held.rest[row]));
        }
      }
    }
    if (pass == 1) break;
    parts[threadIdx.x] = along;
    __syncthreads();
    along = 0.0;
    for (int i = 0; i < kParts; ++i) along += parts[i * kTile + row];
  }
}

// Winners of some rows (slots and query pixels) of some images, and the range of guide pixels that is looked
// for.
struct Entries {
  const int64_t* winners;  // [B,all_rows,k]
  int64_t image;           // the first
  int64_t all_rows, first_row, rows, k;
  int64_t first_pixel, pixels;  // of the guide
  int64_t group, bin_pixels;    // pixels of a block, and of a bin: whole groups

  __device__ int64_t winner(int64_t image_number, int64_t item) const {
    return winners[((image + image_number) * all_rows + first_row) * k + item];
  }

  // Bins of winners, by ranges of guide pixels.
  __device__ int32_t operator()(int64_t image_number, int64_t item) const {
    const int64_t at = winner(image_number, item) - first_pixel;
    return at < 0 || at >= pixels ? -1 : static_cast<int32_t>(at / bin_pixels);
  }
};

// A row's gradient, shared by its winners.
__global__ void __launch_bounds__(kThreads)
    share_kernel(Entries entries, Gradient grad, int64_t images, int64_t query_pixels,
                 // outputs
                 float* shares /* [images,rows] */) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= images * entries.rows) return;
  const int64_t b = entries.image + number / entries.rows, row = entries.first_row + number % entries.rows;
  const int64_t found = count_winners(entries.winners + (b * entries.all_rows + row) * entries.k, entries.k);
  shares[number] = grad.at(b, row / query_pixels, row % query_pixels) / static_cast<float>(found);
}

// Entries of a group that a block has found, in order.
struct Found {
  int count, of_warp[kThreads / kWarp];
  int32_t target[kThreads];  // the group's pixel
  int64_t offset[kThreads];  // of the query's vector
  float share[kThreads], scale[kThreads], rest[kThreads], low[kThreads];
};

// A block has a group of guide pixels, and sums of a number of channels of each, in float64: there may be as
// many terms as query pixels. A thread has every 256th channel.
__global__ void __launch_bounds__(kThreads, 2) add_winners_kernel(
    Kernel p, Entries entries, int64_t channels, const float* shares, const int32_t* order,
    const int32_t* starts, bool begins, bool ends,
    // outputs
    double* totals /* [images,pixels,C], kept from one call to the next unless it ends */) {
  CISC_SHARED(found, Found);
  CISC_SHARED(along, double[kThreads]);
  CISC_DYNAMIC_SHARED(memory);
  auto* sums = reinterpret_cast<double*>(memory);  // [group,channels]
  const Side &guide = p.held, &query = p.streamed;
  const int64_t groups = ceil_div(entries.pixels, entries.group);
  const int64_t image = blockIdx.x / groups, b = entries.image + image;
  const int64_t first = blockIdx.x % groups * entries.group;  // in the range
  const int64_t pixels = entries.pixels - first < entries.group ? entries.pixels - first : entries.group;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int32_t* start = starts + image * (kBins + 1) + first / entries.bin_pixels;
  const int64_t items = entries.rows * entries.k;
  if (thread < pixels) along[thread] = 0.0;
  // What lies along a vector takes all of its channels: with more than are at hand, they are gone through
  // twice.
  const int passes = ends && channels < guide.channels ? 2 : 1;
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t c0 = 0; c0 < guide.channels; c0 += channels) {
      const int64_t here = guide.channels - c0 < channels ? guide.channels - c0 : channels;
      double* total = totals + (image * entries.pixels + first) * guide.channels + c0;
      for (int64_t c = thread; c < here; c += kThreads) {
        for (int64_t i = 0; i < pixels; ++i)
          sums[i * channels + c] = begins ? 0.0 : total[i * guide.channels + c];
      }
      for (int64_t base = start[0]; base < start[1]; base += kThreads) {
        int64_t item = 0, at = -1;
        if (base + thread < start[1]) {
          item = order[image * items + base + thread];
          at = entries.winner(image, item) - entries.first_pixel - first;
        }
        const bool mine = at >= 0 && at < pixels;
        const unsigned those = __ballot_sync(kAll, mine);
        if (lane == 0) found.of_warp[warp] = __popc(those);
        __syncthreads();
        if (mine) {
          int to = __popc(those & ((1u << lane) - 1u));
          for (int i = 0; i < warp; ++i) to += found.of_warp[i];
          const int64_t row = item / entries.k, pixel = (entries.first_row + row) % query.pixels;
          const int64_t place = (b - query.first) * query.pixels + pixel;
          found.target[to] = static_cast<int32_t>(at);
          found.offset[to] = query.offset(b, pixel);
          found.share[to] = shares[image * entries.rows + row];
          found.scale[to] = query.scale[place];
          found.rest[to] = query.rest[place];
          found.low[to] = query.low[place];
        }
        int count = 0;
        for (int i = 0; i < kThreads / kWarp; ++i) count += found.of_warp[i];
        __syncthreads();
        for (int64_t c = thread; c < here; c += kThreads) {
          const int64_t channel = (c0 + c) * query.image.stride_c;
#pragma unroll 4
          for (int i = 0; i < count; ++i) {
            const float value = read_element(query.image.kind, query.image.data, found.offset[i] + channel);
            const float unit = unit_of(value, found.scale[i], found.rest[i], found.low[i]);
            sums[found.target[i] * channels + c] += static_cast<double>(found.share[i] * unit);
          }
        }
        __syncthreads();
      }
      __syncthreads();
      if (!ends) {
        for (int64_t c = thread; c < here; c += kThreads) {
          for (int64_t i = 0; i < pixels; ++i) total[i * guide.channels + c] = sums[i * channels + c];
        }
        __syncthreads();
        continue;
      }
      // A warp has a pixel.
      for (int64_t i = warp; i < pixels; i += kThreads / kWarp) {
        const int64_t pixel = entries.first_pixel + first + i,
                      place = (b - guide.first) * guide.pixels + pixel;
        const float scale = guide.scale[place], rest = guide.rest[place], low = guide.low[place];
        const int64_t offset = guide.offset(b, pixel) + c0 * guide.image.stride_c;
        const int64_t to = p.target.offset(b, pixel);
        const auto unit = [&](int64_t c) {
          return unit_of(read_element(guide.image.kind, guide.image.data, offset + c * guide.image.stride_c),
                         scale, rest, low);
        };
        double sum = 0.0;
        for (int64_t c = lane; pass == 0 && c < here; c += kWarp) {
          sum += sums[i * channels + c] * static_cast<double>(unit(c));
        }
        sum = along[i] + warp_sum(sum);
        __syncwarp();
        if (pass == 0 && lane == 0) along[i] = sum;
        for (int64_t c = lane; pass == passes - 1 && c < here; c += kWarp) {
          p.target.write(to, c0 + c,
                         through_norm(static_cast<float>(sums[i * channels + c]), unit(c), sum, scale, rest));
        }
      }
      __syncthreads();
    }
  }
}

// A tile, and what is known of its pixels.
struct PairTile {
  Tile tile;
  float grad[kTile], value[kTile], log_total[kTile];  // of the query's pixels, held or streamed
  int counts[kThreads];
  float members[kTile];  // of the guide, that a held pixel's class has
  double along[kThreads];
  int any;
};

// Guide pixels of each held pixel's label, of the list in the tile, to shared.members. With barriers.
__device__ void count_members(const Side& guide, int64_t b, PairTile& shared) {
  Tile& tile = shared.tile;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  int count = 0;
  const int64_t tiles = ceil_div(tile.list.length(), kTile);
  for (int64_t number = 0; number < tiles; ++number) {
    set_streamed(guide, b, number, false, 0, tile);
    __syncthreads();
    for (int i = 0; i < kColumns; ++i) count += compared(tile, row, part * kColumns + i) ? 1 : 0;
    __syncthreads();
  }
  shared.counts[threadIdx.x] = count;
  __syncthreads();
  if (part == 0) {
    for (int i = 1; i < kParts; ++i) count += shared.counts[i * kTile + row];
    shared.members[row] = static_cast<float>(count);
  }
  __syncthreads();
}

// A thread's 4 x 4 sums of many terms. What they have lost is known to 8 bits, as registers are short.
struct MicroSums {
  static constexpr uint32_t kHigh = 0xffff0000u;
  float value[kMicro][kMicro] = {};
  uint32_t lost[kMicro][kMicro / 2] = {};  // upper halves of two float32

  __device__ __forceinline__ static float add(float term, float lost,
                                              // outputs
                                              float& value) {
    const float rest = term - lost, sum = value + rest, now = (sum - value) - rest;
    value = sum;
    return now;
  }

  __device__ __forceinline__ void add(const float (&terms)[kMicro][kMicro]) {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; j += 2) {
        uint32_t& both = lost[i][j / 2];
        const float low = add(terms[i][j], __uint_as_float(both << 16), value[i][j]);
        const float high = add(terms[i][j + 1], __uint_as_float(both & kHigh), value[i][j + 1]);
        both = (__float_as_uint(high) & kHigh) | __float_as_uint(low) >> 16;
      }
    }
  }
};

// sums += the tile's factors times 64 channels of the streamed pixels' unit vectors. With barriers.
__device__ __forceinline__ void add_vectors(const Side& streamed, int64_t first_channel, Tile& tile,
                                            // outputs
                                            MicroSums& sums) {
  float piece[kMicro][kMicro] = {};
  const int at = static_cast<int>(threadIdx.x) % kDepth, channel = static_cast<int>(threadIdx.x) / kDepth;
#pragma unroll 1
  for (int first = 0; first < kTile; first += kDepth) {
    for (int i = 0; i < kMicro; ++i) {
      const int c = channel + i * (kThreads / kDepth);
      const float unit = tile.streamed.unit(streamed, first + at, first_channel + c);
      // What is not finite is in the factors already; 0 times it must stay 0.
      tile.streamed_units[at * kPitch + c] = isnan(unit) ? 0.0f : unit;
    }
    __syncthreads();
    add_products(tile.cosines + first * kPitch, tile.streamed_units, piece);
    __syncthreads();
  }
  sums.add(piece);
}

// A block has 64 pixels of the side that the gradient goes to, and 64 of their channels.
template <bool softmax, bool to_query>
__global__ void __launch_bounds__(kThreads, 2) pair_gradient_kernel(Kernel p) {
  CISC_SHARED(shared, PairTile);
  Tile& tile = shared.tile;
  const int64_t slices = ceil_div(p.held.channels, kTile), tiles = ceil_div(p.held.pixels, kTile);
  const int64_t first_channel = blockIdx.x % slices * kTile, number = blockIdx.x / slices;
  const int64_t b = p.held.first + number / tiles;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  const bool own = !softmax || p.classes.own;  // "mean" of classes has its own kernels
  if (part == 0) {
    const int64_t position = number % tiles * kTile + row;
    const bool inside = position < p.held.count(b);
    tile.held.set(p.held, b, row, inside ? position : -1, to_query && !own, 0);
  }
  MicroSums sums;
  shared.along[threadIdx.x] = 0.0;
  for (int64_t slot = 0; slot < (softmax ? p.slots : 1); ++slot) {
    const int64_t wanted = own ? 0 : p.classes.at(b, slot);
    if (!own && wanted < 0) continue;
    __syncthreads();
    if (!own && to_query && part == 0) tile.held.label[row] = wanted;
    // The pixels of the other side; those of the guide first, to be counted.
    if (!softmax && !to_query) {
      list_bins_of_held(p.held, b, tile);
      count_members(p.held, b, shared);
    }
    if (own) {
      list_bins_of_held(p.streamed, b, tile);
    } else if (to_query) {
      const int32_t* starts = p.streamed.starts_of(b) + class_sort::bin_of(wanted);
      list_range(starts[0], starts[1], tile);
    } else {
      if (threadIdx.x == 0) shared.any = 0;
      __syncthreads();
      if (tile.held.pixel[row] >= 0 && tile.held.label[row] == wanted)
        shared.any = 1;  // whoever writes, the same
      __syncthreads();
      list_range(0, shared.any != 0 ? p.streamed.pixels : 0, tile);
    }
    if (!softmax && to_query) count_members(p.streamed, b, shared);
    const auto set_parameters = [&](int64_t pixel) {
      const bool none = pixel < 0;
      shared.grad[row] = none ? 0.0f : p.grad.at(b, slot, pixel);
      if (!softmax) return;
      shared.value[row] = none ? 0.0f : p.similarity[p.place(b, slot, pixel)];
      shared.log_total[row] = none ? 0.0f : p.log_totals[p.place(b, slot, pixel)];
    };
    if (to_query && part == 0) set_parameters(tile.held.pixel[row]);
    const auto end = static_cast<int32_t>(ceil_div(tile.list.length(), kTile));
    for (int32_t at = 0; at < end; ++at) {
      set_streamed(p.streamed, b, at, !own && !to_query, wanted, tile);
      // The same threads have set these pixels.
      if (!to_query && part == 0) set_parameters(tile.streamed.pixel[row]);
      __syncthreads();
      compute_cosines<false>(p.held, p.streamed, tile);
      float product = 0.0f;
#pragma unroll 4
      for (int i = 0; i < kColumns; ++i) {
        const int column = part * kColumns + i;
        float* factor = tile.cosines + column * kPitch + row;
        const float cosine = *factor;
        const int of_query = to_query ? row : column;
        const float grad = shared.grad[of_query];
        float slope;
        if (softmax) {
          // d value / d cosine = p (1 + (cosine - value) / temperature)
          const float above = cosine - shared.value[of_query];
          const float probability =
              fast_exp2(min(0.0f, fmaf(above, p.steepness, -shared.log_total[of_query])));
          slope = grad * probability * fmaf(above, p.inverse_temperature, 1.0f);
        } else {
          slope = isnan(cosine) ? cosine : grad / shared.members[row];
        }
        const bool counts = cosine != -kInfinity;
        slope = counts ? slope : 0.0f;
        product += counts ? slope * cosine : 0.0f;
        *factor = slope;
      }
      shared.along[threadIdx.x] += static_cast<double>(product);
      __syncthreads();
      add_vectors(p.streamed, first_channel, tile, sums);
    }
  }
  const int first_row = static_cast<int>(threadIdx.x) / kMicros * kMicro;
  const int column = static_cast<int>(threadIdx.x) % kMicros * kMicro;
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
#pragma unroll
    for (int j = 0; j < kMicro; ++j) tile.cosines[(column + j) * kPitch + first_row + i] = sums.value[i][j];
  }
  __syncthreads();
  const int64_t pixel = tile.held.pixel[row];
  if (pixel < 0) return;
  double along = 0.0;
  for (int i = 0; i < kParts; ++i) along += shared.along[i * kTile + row];
  const int64_t to = p.target.offset(b, pixel);
  for (int c = part; c < kTile && first_channel + c < p.held.channels; c += kParts) {
    const float unit = tile.held.unit(p.held, row, first_channel + c);
    p.target.write(
        to, first_channel + c,
        through_norm(tile.cosines[c * kPitch + row], unit, along, tile.held.scale[row], tile.held.rest[row]));
  }
}

// A block has 64 pixels of the side that the gradient of "mean" goes to. It makes the sums of the table's
// rows twice, as they are not kept; where channels come in parts, in one launch for what lies along the
// vectors, and in another one.
__global__ void __launch_bounds__(kThreads)
    mean_gradient_kernel(Means p, Side side, Gradient grad, Target target, bool to_query, bool begins,
                         bool writes,
                         // outputs
                         double* alongs /* [images,pixels], or null: all in one launch */) {
  CISC_SHARED(held, Pixels);
  CISC_SHARED(parts, double[kThreads]);
  const int64_t tiles = ceil_div(side.pixels, kTile), image = blockIdx.x / tiles, b = p.image + image;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  const bool own = p.classes.own;
  if (part == 0) {
    const int64_t pixel = blockIdx.x % tiles * kTile + row;
    held.set(side, b, row, pixel < side.pixels ? pixel : -1, to_query && !own, 0);
  }
  __syncthreads();
  const int64_t pixel = held.pixel[row], label = held.label[row];
  const int64_t own_row = own ? p.row_of(label, to_query) : 0;
  const int64_t begin = own_row < 0 ? 0 : own_row, end = own ? own_row + 1 : p.rows;
  const bool kept = alongs != nullptr;
  double along = 0.0;
  if (kept && writes && pixel >= 0) along = alongs[image * side.pixels + pixel];
  for (int pass = kept && writes ? 1 : 0; pass < (writes ? 2 : 1); ++pass) {
    for (int64_t first = part * kMeanChannels; pixel >= 0 && first < p.channels;
         first += kParts * kMeanChannels) {
      float sums[kMeanChannels] = {};
      for (int64_t r = begin; r < end; ++r) {
        if (p.counts[image * p.rows + r] == 0) continue;
        if (!to_query && !own && p.classes.at(b, r) != label) continue;
        const float weight = to_query ? grad.at(b, own ? 0 : r, pixel) : 1.0f;
        const float* from = p.table + (image * p.rows + r) * p.channels + first;
#pragma unroll
        for (int c = 0; c < kMeanChannels; ++c) {
          if (first + c < p.channels) sums[c] = fmaf(weight, from[c], sums[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kMeanChannels; ++c) {
        if (first + c >= p.channels) continue;
        const int64_t channel = p.first_channel + first + c;
        const float unit = held.unit(side, row, channel);
        if (pass == 0) {
          along += static_cast<double>(sums[c]) * static_cast<double>(unit);
        } else {
          target.write(target.offset(b, pixel), channel,
                       through_norm(sums[c], unit, along, held.scale[row], held.rest[row]));
        }
      }
    }
    if (pass == 1) break;
    parts[threadIdx.x] = along;
    __syncthreads();
    along = 0.0;
    for (int i = 0; i < kParts; ++i) along += parts[i * kTile + row];
  }
  if (!kept || writes || part != 0 || pixel < 0) return;
  double& to = alongs[image * side.pixels + pixel];
  to = begins ? along : to + along;
}

// A thread has a pixel: 0, or NaN for what is not finite; NaN for all where a class is below -1.
__global__ void __launch_bounds__(kThreads)
    clear_kernel(Side side, Classes classes, int64_t images, bool spoil, Target target) {
  if (spoil && !any_invalid(classes)) return;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= images * side.pixels) return;
  const int64_t to = target.offset(side.first + number / side.pixels, number % side.pixels);
  const float value = spoil ? kNan : 0.0f * side.rest[number];
  for (int64_t c = 0; c < side.channels; ++c) target.write(to, c, value);
}

void clear(const Gpu& gpu, const Kernel& p, bool spoil) {
  const int64_t blocks = ceil_div(p.images * p.held.pixels, kThreads);
  gpu.launch(clear_kernel, blocks, kThreads, 0, p.held, p.classes, p.images, spoil, p.target);
}

// Of the images whose sides are ready.
class ToGuide {
 public:
  ToGuide(const Inputs& in, const Gpu& gpu, const int64_t* winners, int64_t k) : in_(in), gpu_(gpu) {
    const int64_t channels = in.channels(), rows = in.slots() * in.query_pixels(), pixels = in.guide_pixels();
    channels_ = std::min(channels, kGroupBytes / 8);
    rows_at_once_ = std::clamp<int64_t>(kEntries / k, 1, rows);
    images_at_once_ = std::clamp<int64_t>(kEntries / (rows_at_once_ * k), 1, in.batch());
    if (rows_at_once_ < rows) images_at_once_ = 1;
    // While more winners are to come, sums have to be kept.
    pixels_at_once_ =
        rows_at_once_ == rows ? pixels : std::clamp<int64_t>(kTotalBytes / (8 * channels), 1, pixels);
    entries_.winners = winners;
    entries_.all_rows = rows;
    entries_.k = k;
    entries_.group = std::clamp<int64_t>(kGroupBytes / (8 * channels_), 1, kTile);
    const int64_t items = images_at_once_ * rows_at_once_ * k;
    const int64_t chunks = images_at_once_ * class_sort::chunks_of(rows_at_once_ * k);
    const auto make = [&](int64_t count, ScalarType dtype) { return device_empty(in.query, {count}, dtype); };
    order_ = make(items, ScalarType::Int);
    shares_ = make(images_at_once_ * rows_at_once_, ScalarType::Float);
    counts_ = make(chunks * kBins, ScalarType::Int);
    starts_ = make(images_at_once_ * (kBins + 1), ScalarType::Int);
    totals_ = make(rows_at_once_ < rows ? pixels_at_once_ * channels : 0, ScalarType::Double);
  }

  // p: the guide's side held
  void run(const Kernel& p) {
    for (int64_t image = 0; image < p.images; image += images_at_once_) {
      const int64_t images = std::min(images_at_once_, p.images - image);
      entries_.image = p.held.first + image;
      for (int64_t first = 0; first < p.held.pixels; first += pixels_at_once_) {
        entries_.first_pixel = first;
        entries_.pixels = std::min(pixels_at_once_, p.held.pixels - first);
        const int64_t groups = ceil_div(entries_.pixels, entries_.group);
        entries_.bin_pixels = ceil_div(groups, kBins) * entries_.group;
        for (int64_t row = 0; row < entries_.all_rows; row += rows_at_once_) {
          entries_.first_row = row;
          entries_.rows = std::min(rows_at_once_, entries_.all_rows - row);
          const bool ends = row + entries_.rows == entries_.all_rows;
          add(p, images, groups, row == 0, ends);
        }
      }
    }
  }

 private:
  void add(const Kernel& p, int64_t images, int64_t groups, bool begins, bool ends) {
    float* shares = data_of<float>(shares_);
    int32_t *order = data_of<int32_t>(order_), *starts = data_of<int32_t>(starts_);
    gpu_.launch(share_kernel, ceil_div(images * entries_.rows, kThreads), kThreads, 0, entries_, p.grad,
                images, p.query_pixels, shares);
    sort_items(gpu_, entries_, images, entries_.rows * entries_.k, data_of<int32_t>(counts_), order, starts);
    gpu_.launch(add_winners_kernel, images * groups, kThreads, 8 * entries_.group * channels_, p, entries_,
                channels_, shares, order, starts, begins, ends, data_of<double>(totals_));
  }

  const Inputs& in_;
  const Gpu& gpu_;
  Entries entries_{};
  int64_t channels_ = 0, rows_at_once_ = 0, images_at_once_ = 0, pixels_at_once_ = 0;
  Tensor order_, shares_, counts_, starts_, totals_;
};

// Gradient of "mean", of the images whose sides are ready.
class ToMeans {
 public:
  ToMeans(const Gpu& gpu, const Inputs& in) : gpu_(gpu), tables_(gpu, in) {
    if (!tables_.in_parts()) return;
    alongs_ = device_empty(in.query, {std::max(in.query_pixels(), in.guide_pixels())}, ScalarType::Double);
  }

  void run(const Kernel& p, bool to_query) {
    const auto finish = [&](const Means& means, bool begins, bool writes) {
      Side side = p.held;
      side.order = nullptr;  // ignored pixels too
      double* alongs = tables_.in_parts() ? data_of<double>(*alongs_) : nullptr;
      gpu_.launch(mean_gradient_kernel, means.images * ceil_div(side.pixels, kTile), kThreads, 0, means, side,
                  p.grad, p.target, to_query, begins, writes, alongs);
    };
    if (to_query) {
      tables_.each(p.held, p.streamed, p.classes, p.images, 2, Alike{}, finish);
    } else {
      tables_.each(p.streamed, p.held, p.classes, p.images, 2, p.grad, finish);
    }
  }

 private:
  const Gpu& gpu_;
  MeanTables tables_;
  std::optional<Tensor> alongs_;
};

// Where values are looked at, on the GPU too.
void check_winner_values(const Inputs& in, const Tensor& winners) {
  if (!Gpu::checks_values()) return;
#ifdef CISC_SIMT
  const Tensor copy = winners;
#else
  const Tensor copy = torch::stable::to(winners, torch::stable::Device(torch::headeronly::DeviceType::CPU));
#endif
  check_winners(in, static_cast<const int64_t*>(copy.const_data_ptr()), copy.numel());
}

// grad: [B,S,h,w] float32, any strides
// similarity, index, saved: what forward has given
// the others: as in `cuda_forward`
// outputs
// gradients of query and guide, in their dtypes and, where those are dense, their strides; [0] if not needed
std::tuple<Tensor, Tensor> cuda_backward(const Tensor& grad, const Tensor& similarity, const Tensor& index,
                                         const Tensor& saved, const Tensor& query, const Tensor& guide,
                                         const Tensor& guide_labels, const MaybeTensor& classes,
                                         const MaybeTensor& query_labels, const std::string& reduction,
                                         int64_t k, double temperature, int64_t ignore_index, double eps,
                                         bool need_query, bool need_guide) {
  const Settings settings{reduction_of(kBackward, reduction), k, temperature, ignore_index, eps};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kBackward};
  check_backward(in, grad, similarity, index, saved, kHere);
  const Gpu gpu(kBackward, "query", query);
  check_devices(in);
  check_same_device(kBackward, "grad", grad, query);
  check_same_device(kBackward, "similarity", similarity, query);
  check_same_device(kBackward, "index", index, query);
  check_same_device(kBackward, "saved", saved, query);
  if (classes) check_class_values(kBackward, *classes);
  const bool max = settings.reduction == Reduction::max, topk = settings.reduction == Reduction::topk;
  const bool softmax = settings.reduction == Reduction::softmax;
  if (max || topk) check_winner_values(in, max ? index : saved);
  const auto result = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::empty_like(like) : device_empty(like, {0}, like.scalar_type());
  };
  Tensor grad_query = result(query, need_query), grad_guide = result(guide, need_guide);
  need_query = need_query && query.numel() > 0;
  need_guide = need_guide && guide.numel() > 0;
  if (!need_query && !need_guide) return {grad_query, grad_guide};
  Kernel p{};
  p.grad = {static_cast<const float*>(grad.const_data_ptr()),
            grad.stride(0),
            grad.stride(1),
            grad.stride(2),
            grad.stride(3),
            std::max<int64_t>(query.size(3), 1)};
  p.slots = in.slots();
  p.query_pixels = in.query_pixels();
  if (max || topk) p.winners = static_cast<const int64_t*>((max ? index : saved).const_data_ptr());
  p.k = topk ? in.winners() : 1;
  if (softmax) {
    p.similarity = static_cast<const float*>(similarity.const_data_ptr());
    p.log_totals = static_cast<const float*>(saved.const_data_ptr());
  }
  p.steepness = settings.steepness();
  p.inverse_temperature = static_cast<float>(1.0 / settings.temperature);
  Pairs pairs(gpu, in);
  p.classes = pairs.classes();
  const bool listed = (max || topk) && grad.numel() > 0;
  std::optional<ToGuide> to_guide;
  if (listed && need_guide) to_guide.emplace(in, gpu, p.winners, p.k);
  std::optional<ToMeans> to_means;
  if (settings.reduction == Reduction::mean && MeanTables::serve(in)) to_means.emplace(gpu, in);
  const auto pair_gradient = [&](bool to_query) {
    if (to_means) return to_means->run(p, to_query);
    const int64_t blocks = p.images * ceil_div(p.held.pixels, kTile) * ceil_div(p.held.channels, kTile);
    const auto kernel = softmax
                            ? to_query ? pair_gradient_kernel<true, true> : pair_gradient_kernel<true, false>
                        : to_query ? pair_gradient_kernel<false, true>
                                   : pair_gradient_kernel<false, false>;
    gpu.launch(kernel, blocks, kThreads, 0, p);
  };
  pairs.each([&](int64_t, int64_t images) {
    p.images = images;
    if (need_query) {
      p.held = pairs.query();
      p.streamed = pairs.guide();
      p.target = {write_image(grad_query), query.size(3)};
      if (listed) {
        p.held.order = nullptr;  // ignored pixels too
        const int64_t blocks = images * ceil_div(p.held.pixels, kTile);
        gpu.launch(gather_winners_kernel, blocks, kThreads, 0, p);
      } else {
        // Ignored pixels meet no tile.
        if (p.classes.own || max || topk) clear(gpu, p, false);
        if (!max && !topk) pair_gradient(true);
      }
      if (classes) clear(gpu, p, true);
    }
    if (need_guide) {
      p.held = pairs.guide();
      p.streamed = pairs.query();
      p.target = {write_image(grad_guide), guide.size(3)};
      if (listed) {
        to_guide->run(p);
      } else if (max || topk) {
        clear(gpu, p, false);
      } else {
        pair_gradient(false);
      }
      if (classes) clear(gpu, p, true);
    }
  });
  return {grad_query, grad_guide};
}

}  // namespace
}  // namespace cisc::cross_similarity

CISC_REGISTER(m) { m.impl("cross_similarity_backward", TORCH_BOX(&cisc::cross_similarity::cuda_backward)); }
