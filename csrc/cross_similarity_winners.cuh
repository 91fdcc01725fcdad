// Backward of "max" and "topk" of cross_similarity on a GPU. A query pixel gathers its winners; for the
// guide, the winners are sorted by ranges of guide pixels, and a block adds up those of a few.
//
// Both are reads: of a vector for each winner, channel by channel.
#pragma once

#include <algorithm>

#include "cross_similarity_backward.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kGathered = 16;              // channels that a thread sums
constexpr int64_t kEntries = 4 << 20;      // winners that are sorted together
constexpr int64_t kGroupBytes = 32 << 10;  // sums of a group of guide pixels
constexpr int64_t kTotalBytes = 8 << 20;   // the same, kept while more winners are sorted

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
  int of_warp[kThreads / kWarp];
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

// Of the images whose sides are ready.
class ToGuide {
 public:
  ToGuide(const Inputs& in, const Gpu& gpu, const int64_t* winners, int64_t k) : gpu_(gpu) {
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
    class_sort::sort_items(gpu_, entries_, images, entries_.rows * entries_.k, data_of<int32_t>(counts_),
                           order, starts);
    gpu_.launch(add_winners_kernel, images * groups, kThreads, 8 * entries_.group * channels_, p, entries_,
                channels_, shares, order, starts, begins, ends, data_of<double>(totals_));
  }

  const Gpu& gpu_;
  Entries entries_{};
  int64_t channels_ = 0, rows_at_once_ = 0, images_at_once_ = 0, pixels_at_once_ = 0;
  Tensor order_, shares_, counts_, starts_, totals_;
};

// Where values are looked at, on the GPU too.
void check_winner_values(const Inputs& in, const Tensor& winners) {
  if (!Gpu::checks_values()) return;
  const Tensor copy = on_cpu(winners);
  check_winners(in, static_cast<const int64_t*>(copy.const_data_ptr()), copy.numel());
}

}  // namespace
}  // namespace cisc::cross_similarity
