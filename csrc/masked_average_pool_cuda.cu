// masked_average_pool on a GPU: the weights of the features' pixels are gathered from the labels, exactly, in
// integers; then the features are read once for all classes, or their gradient is written once.
//
// Work at B = 16, C = 256, 181 x 181 features and 721 x 721 labels, one class: the bytes of float32 features
// take an H200 125 us. A label takes about 3 instructions where its column is summed, a feature pixel about
// 100 more: 4 us. A 16-byte group of features takes 8 instructions and as many for the sum over a warp: 20
// us.

#include <algorithm>
#include <vector>

#include "labels.h"
#include "masked_average_pool_arguments.h"
#include "planes.cuh"
#include "tensors.h"

namespace cisc::masked_average_pool {

namespace {

using planes::Group;
using planes::kWide;
using planes::Planes;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSlots = 32;    // whose sums a block has in shared memory, and of a word of Weights::present
constexpr int kInFlight = 8;  // loads that a thread has under way
constexpr int kDeep = 256;    // channels of a block
constexpr int kOwn = kDeep / kWarps;    // channels of a warp
constexpr int64_t kLabelColumns = 256;  // whose sums a warp has in shared memory
constexpr int kTall = 8;                // label rows that a thread reads at once
constexpr int kBins = 8;                // words: labels that are there, by their last 8 bits
constexpr int64_t kManyRows = 64;       // label rows of a feature pixel that are shared among a block's warps
constexpr int64_t kWeightBytes = 32 << 20, kPartialBytes = 16 << 20;
constexpr int64_t kBlocks = 4096;  // of a launch, where there is as much to do
constexpr int64_t kPixelShared = 48 << 10;

// Consecutive pixels of one image, or all pixels of some: `columns` of `rows`.
struct Piece {
  int64_t image, images, row, rows, column, columns;

  CISC_HD int64_t pixels() const { return rows * columns; }
};

// Weights of the pixels of a piece, and which slots have any.
struct Weights {
  Piece piece;
  int64_t slots, words;    // words of kSlots slots
  int64_t each, segments;  // pixels of a segment of a row, and segments of a row
  int64_t width;           // of the features
  float* weight;           // [images,S,pixels]
  uint32_t* present;       // [images,rows*segments,words], a bit for each slot; unless S = 1

  CISC_HD int64_t first_pixel() const { return piece.row * width + piece.column; }

  __device__ __forceinline__ const float* of(int64_t image, int64_t slot) const {
    return weight + (image * slots + slot) * piece.pixels();
  }

  // The slots of a word that have weight in the segments of the pixels [begin, end), end > begin.
  __device__ __forceinline__ uint32_t bits(int64_t image, int64_t word, int64_t begin, int64_t end) const {
    const int64_t last = segment_of(end - 1);
    uint32_t found = 0;
    for (int64_t t = segment_of(begin); t <= last; ++t) {
      found |= present[(image * piece.rows * segments + t) * words + word];
    }
    return found;
  }

  __device__ __forceinline__ int64_t segment_of(int64_t pixel) const {
    return pixel / piece.columns * segments + pixel % piece.columns / each;
  }
};

// a / b, rounded up
constexpr int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t batch, h, w, height, width;  // features, labels
  double unit() const { return 1.0 / (4.0 * static_cast<double>(height) * static_cast<double>(width)); }
};

// classes: [B,S] int32 or int64 in place
struct Classes {
  const void* data;
  int64_t stride_b, stride_s;
  bool is_long;

  __device__ __forceinline__ int64_t at(int64_t image, int64_t slot) const {
    const int64_t offset = image * stride_b + slot * stride_s;
    return is_long ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

struct Gather {
  Geometry g;
  Weights weights;
  const void* labels;  // [B,H,W]
  int64_t label_b, label_y, label_x;
  Classes classes;           // [B,S]
  int64_t tasks, shared_by;  // warps that share a segment
  bool count;
  double unit;
  unsigned long long* totals;  // [B,S], added to: 4 H W times the pixels of a class
  int* invalid;                // set where a class is below -1
};

// 2 m times the weight with which output x of m takes input i of n.
template <typename I>
__device__ __forceinline__ I hat(I x, I i, I n, I m) {
  I t = (2 * x + 1) * n - m - 2 * m * i;
  if (i == 0 && t < 0) t = 0;
  if (i == n - 1 && t > 0) t = 0;
  t = 2 * m - (t < 0 ? -t : t);
  return t > 0 ? t : 0;
}

// The outputs [first_tap, end_tap) of m take something from input i of n.
template <typename I>
__device__ __forceinline__ I first_tap(I i, I n, I m) {
  const I t = (2 * i - 1) * m - n;
  const I first = t < 0 ? 0 : t / (2 * n) + 1;
  return first < m ? first : m;
}

template <typename I>
__device__ __forceinline__ I end_tap(I i, I n, I m) {
  if (i >= n - 1) return m;
  const I t = (2 * i + 3) * m - n;
  const I end = t <= 0 ? 0 : (t + 2 * n - 1) / (2 * n);
  return end < m ? end : m;
}

// A warp, or all warps of a block, has a segment of a row of features: first the labels of each column are
// summed with the row's weights, then the columns with each pixel's.
template <typename L, typename I>
__global__ void __launch_bounds__(kThreads, sizeof(I) == 4 ? 3 : 2) weights_kernel(Gather p) {
  struct Memory {
    I columns[kWarps][kLabelColumns];
    I sums[kWarps][kWarp];
    unsigned seen[kWarps][kBins];
  };
  CISC_SHARED(memory, Memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Weights& to = p.weights;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.g.batch * to.slots;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (p.classes.at(i / to.slots, i % to.slots) < -1) *p.invalid = 1;  // whoever writes, the same
  }
  const bool shared = p.shared_by > 1;
  const auto meet = [&] {
    if (shared) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };
  const int64_t task = shared ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (task >= p.tasks) return;
  const int part = shared ? warp : 0, parts = static_cast<int>(p.shared_by);
  const int64_t segment = task % to.segments, line = task / to.segments;
  const int64_t local_row = line % to.piece.rows, local_image = line / to.piece.rows;
  const int64_t image = to.piece.image + local_image, local_column = segment * to.each;
  const int64_t inside =
      to.piece.columns - local_column < to.each ? to.piece.columns - local_column : to.each;
  const int lanes_each = kWarp / static_cast<int>(to.each);
  const int pixel = lane / lanes_each, place = lane % lanes_each;

  const I n_y = static_cast<I>(p.g.h), m_y = static_cast<I>(p.g.height);
  const I n_x = static_cast<I>(p.g.w), m_x = static_cast<I>(p.g.width);
  const I row = static_cast<I>(to.piece.row + local_row);
  const I column = static_cast<I>(to.piece.column + local_column);
  const I top = first_tap(row, n_y, m_y), bottom = end_tap(row, n_y, m_y);
  const I left = first_tap(column, n_x, m_x);
  const I right = end_tap(column + static_cast<I>(inside) - 1, n_x, m_x);
  const bool mine = pixel < inside;
  const I own = column + (mine ? pixel : 0);
  const I own_left = first_tap(own, n_x, m_x), own_right = mine ? end_tap(own, n_x, m_x) : own_left;
  const L* labels = static_cast<const L*>(p.labels) + image * p.label_b;

  unsigned* seen = memory.seen[shared ? 0 : warp];
  if (to.slots > 1) {
    if (lane < kBins) seen[lane] = 0;
    meet();
    for (I y = top + part; y < bottom; y += parts) {
      const L* from = labels + y * p.label_y;
      int before = -1;
      for (I x = left + lane; x < right; x += kWarp) {
        const int bin = static_cast<int>(from[x * p.label_x]) & 255;
        if (bin != before) atomicOr(&seen[bin / 32], 1u << (bin % 32));
        before = bin;
      }
    }
    meet();
  }

  uint32_t bits = 0;
  I* columns = memory.columns[warp];
  for (int64_t s = 0; s < to.slots; ++s) {
    const int64_t value = p.classes.at(image, s);
    const L target = static_cast<L>(value);
    const int bin = static_cast<int>(value & 255);
    const bool there = value >= 0 && static_cast<int64_t>(target) == value &&
                       (to.slots == 1 || (seen[bin / 32] >> bin % 32 & 1));
    I total = 0;
    if (there) {
      for (I begin = left; begin < right; begin += static_cast<I>(kLabelColumns)) {
        const I end =
            right - begin < static_cast<I>(kLabelColumns) ? right : begin + static_cast<I>(kLabelColumns);
        for (I x = begin + lane; x < end; x += kWarp) columns[x - begin] = 0;
        for (I y = top + kTall * part; y < bottom; y += kTall * parts) {
          I weight[kTall];
#pragma unroll
          for (int i = 0; i < kTall; ++i)
            weight[i] = y + i < bottom ? hat(static_cast<I>(y + i), row, n_y, m_y) : 0;
#pragma unroll 1
          for (I x = begin + lane; x < end; x += kWarp) {
            const L* from = labels + y * p.label_y + x * p.label_x;
            I sum = 0;
#pragma unroll
            for (int i = 0; i < kTall; ++i) {
              if (weight[i] > 0 && from[i * p.label_y] == target) sum += weight[i];
            }
            columns[x - begin] += sum;
          }
        }
        __syncwarp();
        const I first = (own_left > begin ? own_left : begin) + place,
                last = own_right < end ? own_right : end;
        for (I x = first; x < last; x += lanes_each) total += hat(x, own, n_x, m_x) * columns[x - begin];
        __syncwarp();
      }
      for (int distance = 1; distance < lanes_each; distance *= 2) {
        total += __shfl_xor_sync(kAll, total, distance);
      }
      if (shared) {
        memory.sums[warp][lane] = total;
        __syncthreads();
        total = 0;
        for (int k = 0; k < kWarps; ++k) total += memory.sums[k][lane];
        __syncthreads();
      }
      const bool counts = place == 0 && mine;
      if (p.count && part == 0) {
        const unsigned long long all = warp_sum(counts ? static_cast<unsigned long long>(total) : 0ull);
        if (lane == 0 && all != 0) atomicAdd(&p.totals[image * to.slots + s], all);
      }
      if (__any_sync(kAll, counts && total > 0)) bits |= 1u << s % kSlots;
    }
    if (part == 0 && place == 0 && mine) {
      to.weight[(local_image * to.slots + s) * to.piece.pixels() + local_row * to.piece.columns +
                local_column + pixel] = static_cast<float>(static_cast<double>(total) * p.unit);
    }
    if (to.slots > 1 && (s % kSlots == kSlots - 1 || s == to.slots - 1)) {
      if (part == 0 && lane == 0) to.present[task * to.words + s / kSlots] = bits;
      bits = 0;
    }
  }
}

struct Pool {
  Weights weights;
  int64_t channels, deep_blocks;      // blocks of kDeep channels
  int64_t first_slot, slots, groups;  // slots of this launch, in groups of kSlots
  int64_t chunks, steps;              // chunks of an image, steps of a chunk
  float* partial;                     // [images,chunks,slots,C]
};

// Which part of a Pool a block has.
struct Part {
  int64_t group, chunk, image;
  int64_t channel;     // the first one
  int64_t first_slot;  // among all
  int slots;

  __device__ __forceinline__ static Part of(const Pool& p) {
    Part part;
    int64_t block = blockIdx.x;
    part.group = block % p.groups;
    block /= p.groups;
    part.channel = block % p.deep_blocks * kDeep;
    block /= p.deep_blocks;
    part.chunk = block % p.chunks;
    part.image = block / p.chunks;
    part.first_slot = p.first_slot + part.group * kSlots;
    const int64_t left = p.slots - part.group * kSlots;
    part.slots = static_cast<int>(left < kSlots ? left : kSlots);
    return part;
  }

  __device__ __forceinline__ float* partial(const Pool& p) const {
    return p.partial + ((image * p.chunks + chunk) * p.slots + group * kSlots) * p.channels + channel;
  }
};

// Add to `sums` [slots,kDeep] what the warp's channels have at n pixels of each thread, from `pixel` of the
// piece on, where `there`. from: the first of the warp's channels at the pixel
template <int n, bool one, typename T>
__device__ __forceinline__ void pool_window(const T* from, int64_t stride_c, int64_t left, const Pool& p,
                                            const Part& part, int64_t pixel, bool there, int64_t begin,
                                            int64_t end,
                                            // outputs
                                            float* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t bits = 1;
  float weight[n];
  bool mine = there;
  const auto read_weights = [&](int64_t slot) {
    const float* of = p.weights.of(part.image, slot) + pixel;
#pragma unroll
    for (int i = 0; i < n; ++i) weight[i] = mine ? of[i] : 0.0f;
  };
  if (one) {
    read_weights(part.first_slot);
    mine = false;
#pragma unroll
    for (int i = 0; i < n; ++i) mine = mine || weight[i] > 0.0f;
    if (!__any_sync(kAll, mine)) return;
  } else {
    bits = p.weights.bits(part.image, part.first_slot / kSlots, begin, end);
    if (bits == 0) return;
  }
#pragma unroll 1
  for (int first = 0; first < kOwn && static_cast<int64_t>(first) * kWarps < left; first += kInFlight) {
    Group<T, n> x[kInFlight] = {};
    if (mine) {
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t channel = static_cast<int64_t>(first + j) * kWarps;
        if (channel < left) x[j] = Group<T, n>::read(from + channel * stride_c);
      }
    }
    for (uint32_t rest = bits; rest != 0; rest &= rest - 1) {
      const int slot = __ffs(static_cast<int>(rest)) - 1;
      if (!one) read_weights(part.first_slot + slot);
      float sum[kInFlight], touched = 0.0f;
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        sum[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < n; ++i) sum[j] = fmaf(x[j].at(i), weight[i], sum[j]);
        touched = fmaf(0.0f, sum[j], touched);
      }
      if (__any_sync(kAll, !(touched == 0.0f))) {  // infinity or NaN times no weight is nothing: once more
#pragma unroll 1
        for (int j = first; j < first + kInFlight && static_cast<int64_t>(j) * kWarps < left; ++j) {
          const T* at = from + static_cast<int64_t>(j) * kWarps * stride_c;
          float total = 0.0f;
#pragma unroll
          for (int i = 0; i < n; ++i) {
            if (weight[i] > 0.0f) total = fmaf(at[i].widen(), weight[i], total);
          }
          total = warp_sum(total);
          if (lane == 0) sums[slot * kDeep + j * kWarps] += total;
        }
        continue;
      }
      const float of_channel = planes::sums_over<kInFlight, kWarp>(sum);
      const int channel = (first + lane / (kWarp / kInFlight)) * kWarps;
      if (lane % (kWarp / kInFlight) == 0 && channel < left) sums[slot * kDeep + channel] += of_channel;
    }
  }
}

// Features whose pixels lie side by side, n at an access: a warp has every eighth channel, a thread n pixels.
template <typename T, int n, bool one>
__global__ void __launch_bounds__(kThreads, one ? 3 : 2)
    pool_planes_kernel(Planes<const T> features, Pool p) {
  CISC_DYNAMIC_SHARED(memory);
  auto* sums = reinterpret_cast<float*>(memory);
  const Part part = Part::of(p);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int i = threadIdx.x; i < part.slots * kDeep; i += kThreads) sums[i] = 0.0f;
  __syncthreads();
  const int64_t left = p.channels - part.channel - warp;  // channels from the warp's first one on
  const int64_t pixels = p.weights.piece.pixels();
  if (left > 0) {
    const T* from = features.data + (p.weights.piece.image + part.image) * features.stride_b +
                    (part.channel + warp) * features.stride_c;
    const int64_t origin = p.weights.first_pixel();
    int64_t head = n > 1 ? planes::past_aligned<n>(from + origin) : 0;  // pixels in front of the first group
    head = head > 0 ? n - head : 0;
    if (head > pixels) head = pixels;
    const int64_t groups = (pixels - head) / n;
    for (int64_t step = 0; step < p.steps; ++step) {
      const int64_t first = (part.chunk * p.steps + step) * kWarp, group = first + lane;
      if (first >= groups) break;
      const int64_t pixel = head + group * n;
      const int64_t last = first + kWarp < groups ? first + kWarp : groups;
      const bool there = group < groups;
      pool_window<n, one>(from + features.offset_of(origin + (there ? pixel : 0)), features.stride_c, left, p,
                          part, pixel, there, head + first * n, head + last * n, sums + warp);
    }
    if (n > 1 && part.chunk == p.chunks - 1) {  // what lies in front of the groups and behind them
      const int64_t tail = head + groups * n, edge = lane < head ? lane : tail + lane - head;
      const bool there = edge < pixels;
      if (head > 0 || tail < pixels) {
        const T* at = from + features.offset_of(origin + (there ? edge : 0));
        pool_window<1, one>(at, features.stride_c, left, p, part, edge, there, 0, pixels, sums + warp);
      }
    }
  }
  __syncthreads();
  const int64_t deep = p.channels - part.channel < kDeep ? p.channels - part.channel : kDeep;
  float* partial = part.partial(p);
  for (int i = threadIdx.x; i < part.slots * kDeep; i += kThreads) {
    if (i % kDeep < deep) partial[i / kDeep * p.channels + i % kDeep] = sums[i];
  }
}

// Features whose channels lie side by side: `lanes` threads have a pixel's, some pixels at a time. A thread
// keeps to its channels; a pixel without weight is not read.
template <typename T, bool one>
__global__ void __launch_bounds__(kThreads, 3)
    pool_pixels_kernel(Planes<const T> features, Pool p, int lanes) {
  constexpr int n = kWide<T>;
  CISC_DYNAMIC_SHARED(memory);
  auto* sums = reinterpret_cast<float*>(memory);  // [teams,slots,lanes*n]
  const Part part = Part::of(p);
  const int threads = static_cast<int>(blockDim.x), teams = threads / lanes, deep = lanes * n;
  const int team = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t channel = part.channel + lane * n, pixels = p.weights.piece.pixels();
  const bool there = channel < p.channels;
  const T* from =
      features.data + (p.weights.piece.image + part.image) * features.stride_b + (there ? channel : 0);
  const int64_t origin = p.weights.first_pixel();
  float* own = sums + team * part.slots * deep + lane * n;
  for (int s = 0; s < part.slots; ++s) {
#pragma unroll
    for (int i = 0; i < n; ++i) own[s * deep + i] = 0.0f;
  }
  float total[n] = {};
  for (int64_t step = team; step < p.steps; step += teams) {
    const int64_t pixel = (part.chunk * p.steps + step) * kInFlight;
    if (pixel >= pixels) break;
    const int count = static_cast<int>(pixels - pixel < kInFlight ? pixels - pixel : kInFlight);
    uint32_t bits = 1;
    float weight[kInFlight];
    const auto read_weights = [&](int64_t slot) {
      const float* of = p.weights.of(part.image, slot) + pixel;
      bool any = false;
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        weight[j] = j < count ? of[j] : 0.0f;
        any = any || weight[j] > 0.0f;
      }
      return any;
    };
    if (one) {
      if (!read_weights(part.first_slot)) continue;
    } else {
      bits = p.weights.bits(part.image, part.first_slot / kSlots, pixel, pixel + count);
      if (bits == 0) continue;
    }
    Group<T, n> x[kInFlight] = {};
    planes::Walk<const T> walk(features, from, origin + pixel);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (there && j < count && (!one || weight[j] > 0.0f)) x[j] = Group<T, n>::read(walk.at);
      walk.next(features);
    }
    if (one) {
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
#pragma unroll
        for (int i = 0; i < n; ++i) total[i] = fmaf(x[j].at(i), weight[j], total[i]);
      }
      bits = 0;
    }
    for (; bits != 0; bits &= bits - 1) {
      const int slot = __ffs(static_cast<int>(bits)) - 1;
      if (!read_weights(part.first_slot + slot)) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) total[i] = own[slot * deep + i];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (!(weight[j] > 0.0f)) continue;
#pragma unroll
        for (int i = 0; i < n; ++i) total[i] = fmaf(x[j].at(i), weight[j], total[i]);
      }
#pragma unroll
      for (int i = 0; i < n; ++i) own[slot * deep + i] = total[i];
    }
  }
  if (one) {
#pragma unroll
    for (int i = 0; i < n; ++i) own[i] = total[i];
  }
  __syncthreads();
  float* partial = part.partial(p);
  for (int i = threadIdx.x; i < part.slots * deep; i += threads) {
    if (part.channel + i % deep >= p.channels) continue;
    float sum = 0.0f;
    for (int k = 0; k < teams; ++k) sum += sums[k * part.slots * deep + i];
    partial[i / deep * p.channels + i % deep] = sum;
  }
}

constexpr int kFinishChannels = kWarp, kFinishParts = kThreads / kFinishChannels;

struct Finish {
  Pool pool;
  int64_t image, all_slots, tiles;  // tiles of kFinishChannels channels
  bool first, last;                 // of the pieces of these images
  double unit, eps;
  const unsigned long long* totals;
  const int* invalid;
  float* prototypes;  // [B,S,C]
};

__device__ __forceinline__ double pixels_of(unsigned long long total, double unit) {
  return static_cast<double>(total) * unit;
}

// Sums of the chunks, in order, added to those of earlier pieces; at the end, the mean.
__global__ void __launch_bounds__(kThreads) finish_kernel(Finish p) {
  CISC_SHARED(sums, double[kFinishParts][kFinishChannels]);
  const int lane = static_cast<int>(threadIdx.x) % kFinishChannels,
            part = static_cast<int>(threadIdx.x) / kFinishChannels;
  const Pool& pool = p.pool;
  const int64_t channel = blockIdx.x % p.tiles * kFinishChannels + lane, line = blockIdx.x / p.tiles;
  const int64_t slot = line % pool.slots, image = line / pool.slots;
  const bool there = channel < pool.channels;
  double sum = 0.0;
  if (there) {
    const float* from = pool.partial + (image * pool.chunks * pool.slots + slot) * pool.channels + channel;
    const int64_t stride = pool.slots * pool.channels;
#pragma unroll 8
    for (int64_t chunk = part; chunk < pool.chunks; chunk += kFinishParts) sum += from[chunk * stride];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part != 0 || !there) return;
  for (int k = 1; k < kFinishParts; ++k) sum += sums[k][lane];
  const int64_t row = (p.image + image) * p.all_slots + pool.first_slot + slot;
  float* to = p.prototypes + row * pool.channels + channel;
  if (!p.first) sum += *to;
  if (p.last) {
    sum = *p.invalid != 0 ? static_cast<double>(NAN) : sum / (pixels_of(p.totals[row], p.unit) + p.eps);
  }
  *to = static_cast<float>(sum);
}

struct Scatter {
  Weights weights;
  int64_t channels, deep_blocks, windows, area;  // area: h * w
  const float* grad;                             // [B,S,C]
  int64_t grad_b, grad_s, grad_c;
  double unit, eps;
  const unsigned long long* totals;
  const int* invalid;
};

// What a thread writes: n pixels of the warp's channels, from `pixel` of the piece on. to: the first of these
// channels at the pixel; factor: at S = 1, of the warp's channel that has the thread's number
template <int n, bool one, typename T>
__device__ __forceinline__ void scatter_window(const Scatter& p, int64_t image, int64_t channel,
                                               int64_t pixel, bool there, int64_t begin, int64_t end,
                                               float factor,
                                               // outputs
                                               T* to) {
  constexpr int kBeside = n > 4 ? 4 : 8;  // channels whose sums a thread has at once
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool spoilt = *p.invalid != 0;
  const int64_t left = p.channels - channel, all_image = p.weights.piece.image + image;
  float weight[n];
  const auto read_weights = [&](int64_t slot) {
    const float* of = p.weights.of(image, slot) + pixel;
#pragma unroll
    for (int i = 0; i < n; ++i) weight[i] = there ? of[i] : 0.0f;
  };
  if (one) read_weights(0);
#pragma unroll 1
  for (int first = 0; first < kOwn && static_cast<int64_t>(first) * kWarps < left; first += kBeside) {
    float sum[kBeside][n];
#pragma unroll
    for (int j = 0; j < kBeside; ++j) {
#pragma unroll
      for (int i = 0; i < n; ++i) sum[j][i] = spoilt ? NAN : 0.0f;
    }
    const auto add = [&](float of_lane, int from) {
#pragma unroll
      for (int j = 0; j < kBeside; ++j) {
        const float f = __shfl_sync(kAll, of_lane, from + j);
        const bool careful = !isfinite(f);  // of which nothing is nothing
#pragma unroll
        for (int i = 0; i < n; ++i) {
          sum[j][i] = careful && !(weight[i] > 0.0f) ? sum[j][i] : fmaf(f, weight[i], sum[j][i]);
        }
      }
    };
    if (one) {
      add(factor, first);
    } else {
      for (int64_t word = 0; word < p.weights.words; ++word) {
        for (uint32_t bits = p.weights.bits(image, word, begin, end); bits != 0; bits &= bits - 1) {
          const int64_t slot = word * kSlots + __ffs(static_cast<int>(bits)) - 1;
          read_weights(slot);
          const int64_t here = static_cast<int64_t>(first + lane % kBeside) * kWarps;
          const double count = pixels_of(p.totals[all_image * p.weights.slots + slot], p.unit) + p.eps;
          float of_lane = 0.0f;
          if (here < left) {
            const float* grad = p.grad + all_image * p.grad_b + slot * p.grad_s + (channel + here) * p.grad_c;
            of_lane = __fdiv_rn(*grad, static_cast<float>(count));
          }
          add(of_lane, 0);
        }
      }
    }
    if (!there) continue;
#pragma unroll
    for (int j = 0; j < kBeside; ++j) {
      const int64_t here = static_cast<int64_t>(first + j) * kWarps;
      if (here >= left) continue;
      Group<T, n>::of(sum[j]).write(to + here * p.area);
    }
  }
}

// A block writes the pixels of a window of up to kDeep channels of one image; a warp every eighth channel.
template <typename T, bool one>
__global__ void __launch_bounds__(kThreads, one ? 3 : 2) scatter_kernel(Scatter p, T* gradient) {
  constexpr int n = kWide<T>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t window = blockIdx.x / p.deep_blocks % p.windows,
                image = blockIdx.x / p.deep_blocks / p.windows;
  const int64_t channel = blockIdx.x % p.deep_blocks * kDeep + warp, left = p.channels - channel;
  if (left <= 0) return;
  const int64_t all_image = p.weights.piece.image + image, pixels = p.weights.piece.pixels();
  float factor = 0.0f;
  if (one && static_cast<int64_t>(lane) * kWarps < left) {
    const double count = pixels_of(p.totals[all_image], p.unit) + p.eps;
    factor = __fdiv_rn(p.grad[all_image * p.grad_b + (channel + lane * kWarps) * p.grad_c],
                       static_cast<float>(count));
  }
  T* to = gradient + (all_image * p.channels + channel) * p.area + p.weights.first_pixel();
  int64_t head = planes::past_aligned<n>(to);
  head = head > 0 ? n - head : 0;
  if (head > pixels) head = pixels;
  const int64_t groups = (pixels - head) / n, first = window * kWarp, group = first + lane;
  if (first < groups) {
    const int64_t last = first + kWarp < groups ? first + kWarp : groups;
    const bool there = group < groups;
    const int64_t pixel = head + (there ? group : 0) * n;
    scatter_window<n, one>(p, image, channel, pixel, there, head + first * n, head + last * n, factor,
                           to + pixel);
  }
  const int64_t tail = head + groups * n;
  if (window == p.windows - 1 && (head > 0 || tail < pixels)) {
    const int64_t edge = lane < head ? lane : tail + lane - head;
    const bool there = edge < pixels;
    const int64_t pixel = there ? edge : 0;
    scatter_window<1, one>(p, image, channel, pixel, there, 0, pixels, factor, to + pixel);
  }
}

// Pixels of a segment, a power of two: as many as their labels' columns, and one pixel's on either side, fit.
int64_t segment_pixels(const Geometry& g) {
  const int64_t ratio = (g.width + g.w - 1) / g.w;
  int64_t each = kWarp;
  while (each > 1 && (each + 1) * ratio > kLabelColumns) each /= 2;
  return each;
}

// Pieces of the batch, whole images where they fit. The weights of one take kWeightBytes at most, unless
// those of one pixel take more.
std::vector<Piece> pieces_of(const Geometry& g, int64_t slots) {
  const int64_t most = std::max<int64_t>(kWeightBytes / (5 * slots), 1), area = g.h * g.w;
  std::vector<Piece> pieces;
  if (area <= most) {
    const int64_t launches = (g.batch * area + most - 1) / most;
    int64_t images = std::min((g.batch + launches - 1) / launches, most / area);
    images = std::max<int64_t>(images, 1);
    for (int64_t b = 0; b < g.batch; b += images) {
      pieces.push_back({b, std::min(images, g.batch - b), 0, g.h, 0, g.w});
    }
    return pieces;
  }
  const int64_t columns = std::min(g.w, most), rows = columns < g.w ? 1 : std::max<int64_t>(most / g.w, 1);
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t y = 0; y < g.h; y += rows) {
      for (int64_t x = 0; x < g.w; x += columns) {
        pieces.push_back({b, 1, y, std::min(rows, g.h - y), x, std::min(columns, g.w - x)});
      }
    }
  }
  return pieces;
}

// The weights of one piece after another, and the pixels of the classes.
class Gatherer {
 public:
  Gatherer(const Gpu& gpu, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w)
      : gpu_(gpu),
        geometry{labels.size(0), h, w, labels.size(1), labels.size(2)},
        slots(classes.size(1)),
        pieces(pieces_of(geometry, slots)) {
    const int64_t each = segment_pixels(geometry);
    int64_t most = 0, most_segments = 0;
    for (const Piece& piece : pieces) {
      most = std::max(most, piece.images * piece.pixels());
      most_segments =
          std::max(most_segments, piece.images * piece.rows * ((piece.columns + each - 1) / each));
    }
    const int64_t words = (slots + kSlots - 1) / kSlots;
    weight_ = device_empty(labels, {most * slots}, ScalarType::Float);
    present_ = device_empty(labels, {slots > 1 ? most_segments * words : 0}, ScalarType::Int);
    totals_ = device_zeros(labels, {geometry.batch * slots + 1}, ScalarType::Long);
    const Labels view = read_labels(labels);
    kind_ = view.kind;
    p_ = {geometry,
          {{}, slots, words, each, 0, w, data_of<float>(weight_), data_of<uint32_t>(present_)},
          view.data,
          view.stride_b,
          view.stride_y,
          view.stride_x,
          {classes.const_data_ptr(), classes.stride(0), classes.stride(1),
           classes.scalar_type() == ScalarType::Long},
          0,
          1,
          false,
          geometry.unit(),
          data_of<unsigned long long>(totals_),
          reinterpret_cast<int*>(data_of<int64_t>(totals_) + geometry.batch * slots)};
    if ((2 * geometry.height + h - 1) / h > kManyRows) p_.shared_by = kWarps;
  }

  Weights of(const Piece& piece, bool count) {
    p_.weights.piece = piece;
    p_.weights.segments = (piece.columns + p_.weights.each - 1) / p_.weights.each;
    p_.tasks = piece.images * piece.rows * p_.weights.segments;
    p_.count = count;
    const Geometry& g = geometry;
    const auto taps = [](int64_t n, int64_t m) { return std::min(m, 2 * m / n + 3); };
    const double narrow = 1LL << 31;
    const bool wide = 4.0 * g.height * taps(g.h, g.height) * g.width * taps(g.w, g.width) >= narrow ||
                      6.0 * g.height * (g.h + 2) >= narrow || 6.0 * g.width * (g.w + 2) >= narrow;
    switch (kind_) {
      case Integer::u8:
        return launch<uint8_t>(wide);
      case Integer::i32:
        return launch<int32_t>(wide);
      default:
        return launch<int64_t>(wide);
    }
  }

  const unsigned long long* totals() const { return p_.totals; }
  const int* invalid() const { return p_.invalid; }

 private:
  const Gpu& gpu_;

 public:
  const Geometry geometry;
  const int64_t slots;
  const std::vector<Piece> pieces;

 private:
  template <typename L>
  Weights launch(bool wide) {
    const int64_t blocks = p_.shared_by > 1 ? p_.tasks : (p_.tasks + kWarps - 1) / kWarps;
    if (wide) {
      gpu_.launch(weights_kernel<L, int64_t>, blocks, kThreads, 0, p_);
    } else {
      gpu_.launch(weights_kernel<L, int32_t>, blocks, kThreads, 0, p_);
    }
    return p_.weights;
  }

  Integer kind_;
  Gather p_;
  Tensor weight_, present_, totals_;
};

// Sums of the features of one piece; fills in which chunks they are of.
template <typename T, bool one>
void pool_of(const Gpu& gpu, const Planes<const T>& features, int64_t most_chunks, Pool& p) {
  const int64_t pixels = p.weights.piece.pixels(), slots = std::min<int64_t>(p.slots, kSlots);
  const int64_t beside = p.weights.piece.images * p.groups * p.deep_blocks;
  const bool in_pixels = planes::in_pixels(features, p.channels), wide = planes::in_planes(features);
  const int64_t steps = over(pixels, in_pixels ? kInFlight : kWarp * (wide ? kWide<T> : 1));
  int64_t lanes = 0, teams = 1;
  if (in_pixels) {
    lanes = over(std::min<int64_t>(p.channels, kDeep), kWide<T> * kWarp) * kWarp;
    teams = std::clamp<int64_t>(kPixelShared / (slots * lanes * kWide<T> * 4), 1, kThreads / lanes);
  }
  p.steps = std::max(over(steps, most_chunks), teams);
  p.chunks = over(steps, p.steps);
  const int64_t blocks = beside * p.chunks;
  if (in_pixels) {
    gpu.launch(pool_pixels_kernel<T, one>, blocks, static_cast<int>(teams * lanes),
               teams * slots * lanes * kWide<T> * 4, features, p, static_cast<int>(lanes));
  } else if (wide) {
    gpu.launch(pool_planes_kernel<T, kWide<T>, one>, blocks, kThreads, slots * kDeep * 4, features, p);
  } else {
    gpu.launch(pool_planes_kernel<T, 1, one>, blocks, kThreads, slots * kDeep * 4, features, p);
  }
}

// How many slots of the images of a piece have sums at a time, and in how many chunks at most.
struct Share {
  int64_t slots, chunks;

  static Share of(const Piece& piece, int64_t slots, int64_t channels) {
    const int64_t row = piece.images * channels * 4;  // bytes
    Share share;
    share.slots = std::min(slots, std::max<int64_t>(kPartialBytes / row / kSlots, 1) * kSlots);
    const int64_t beside = piece.images * over(share.slots, kSlots) * over(channels, kDeep);
    share.chunks = std::clamp<int64_t>(std::min(kPartialBytes / (row * share.slots), over(kBlocks, beside)),
                                       1, over(piece.pixels(), kInFlight));
    return share;
  }
};

// features: [B,C,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// prototypes: [B,S,C] float32
Tensor cuda_forward(const Tensor& features, const Tensor& labels, const Tensor& classes, double eps) {
  check_forward(features, labels, classes, kHere, [&](const char* op) { check_class_values(op, classes); });
  const Gpu gpu(kForward, "features", features);
  check_same_device(kForward, "labels", labels, features);
  check_same_device(kForward, "classes", classes, features);
  const int64_t batch = features.size(0), slots = classes.size(1), channels = features.size(1);
  if (batch * slots * channels == 0 || labels.numel() == 0) {
    return device_zeros(features, {batch, slots, channels}, ScalarType::Float);
  }
  Tensor prototypes = device_empty(features, {batch, slots, channels}, ScalarType::Float);
  Gatherer gatherer(gpu, labels, classes, features.size(2), features.size(3));
  int64_t floats = 0;
  for (const Piece& piece : gatherer.pieces) {
    const Share share = Share::of(piece, slots, channels);
    floats = std::max(floats, piece.images * share.chunks * share.slots * channels);
  }
  Tensor partial = device_empty(features, {floats}, ScalarType::Float);
  const int64_t area = features.size(2) * features.size(3);
  for (const Piece& piece : gatherer.pieces) {
    Pool p{gatherer.of(piece, true), channels, over(channels, kDeep), 0, 0, 0, 0, 0, data_of<float>(partial)};
    const Share share = Share::of(piece, slots, channels);
    const bool first = piece.row == 0 && piece.column == 0;
    const bool last = (piece.row + piece.rows - 1) * features.size(3) + piece.column + piece.columns == area;
    for (; p.first_slot < slots; p.first_slot += share.slots) {
      p.slots = std::min(share.slots, slots - p.first_slot);
      p.groups = over(p.slots, kSlots);
      with_float(float_kind(features.scalar_type()), [&](auto type) {
        using T = decltype(type);
        const auto view = planes::planes_of<const T>(features, features.const_data_ptr());
        if (slots == 1) {
          pool_of<T, true>(gpu, view, share.chunks, p);
        } else {
          pool_of<T, false>(gpu, view, share.chunks, p);
        }
      });
      const Finish f{p,
                     piece.image,
                     slots,
                     over(channels, kFinishChannels),
                     first,
                     last,
                     gatherer.geometry.unit(),
                     eps,
                     gatherer.totals(),
                     gatherer.invalid(),
                     data_of<float>(prototypes)};
      gpu.launch(finish_kernel, piece.images * p.slots * f.tiles, kThreads, 0, f);
    }
  }
  return prototypes;
}

// grad: [B,S,C] float32, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// gradient: [B,C,h,w] of `dtype`, contiguous
Tensor cuda_backward(const Tensor& grad, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w,
                     double eps, ScalarType dtype) {
  check_backward(grad, labels, classes, h, w, dtype, kHere,
                 [&](const char* op) { check_class_values(op, classes); });
  const Gpu gpu(kBackward, "grad", grad);
  check_same_device(kBackward, "labels", labels, grad);
  check_same_device(kBackward, "classes", classes, grad);
  const int64_t batch = grad.size(0), slots = grad.size(1), channels = grad.size(2);
  if (grad.numel() == 0 || labels.numel() == 0) return device_zeros(grad, {batch, channels, h, w}, dtype);
  Tensor gradient = device_empty(grad, {batch, channels, h, w}, dtype);
  Gatherer gatherer(gpu, labels, classes, h, w);
  Scatter p{{},
            channels,
            over(channels, kDeep),
            0,
            h * w,
            static_cast<const float*>(grad.const_data_ptr()),
            grad.stride(0),
            grad.stride(1),
            grad.stride(2),
            gatherer.geometry.unit(),
            eps,
            gatherer.totals(),
            gatherer.invalid()};
  const std::vector<Piece>& pieces = gatherer.pieces;
  for (size_t begin = 0, end = 0; begin < pieces.size(); begin = end) {
    while (end < pieces.size() && pieces[end].image == pieces[begin].image) ++end;
    for (size_t i = begin; i < end; ++i) p.weights = gatherer.of(pieces[i], true);
    for (size_t i = begin; i < end; ++i) {
      if (end > begin + 1) p.weights = gatherer.of(pieces[i], false);
      with_float(float_kind(dtype), [&](auto type) {
        using T = decltype(type);
        p.windows = over(pieces[i].pixels(), kWarp * kWide<T>);
        const int64_t blocks = pieces[i].images * p.windows * p.deep_blocks;
        T* to = static_cast<T*>(gradient.mutable_data_ptr());
        if (slots == 1) {
          gpu.launch(scatter_kernel<T, true>, blocks, kThreads, 0, p, to);
        } else {
          gpu.launch(scatter_kernel<T, false>, blocks, kThreads, 0, p, to);
        }
      });
    }
  }
  return gradient;
}

}  // namespace
}  // namespace cisc::masked_average_pool

CISC_REGISTER(m) {
  m.impl("masked_average_pool", TORCH_BOX(&cisc::masked_average_pool::cuda_forward));
  m.impl("masked_average_pool_backward", TORCH_BOX(&cisc::masked_average_pool::cuda_backward));
}
