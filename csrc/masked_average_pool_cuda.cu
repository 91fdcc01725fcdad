// masked_average_pool on a GPU: the features are read once for all classes.
//
// Work at B = 16, C = 256, 181 x 181 features, one class: the bytes of float32 features take an H200 125 us.
// A 16-byte group of features takes 8 instructions and as many for the sum over a warp: 20 us.

#include <algorithm>

#include "masked_average_pool_weights.cuh"

namespace cisc::masked_average_pool::device {

namespace {

constexpr int kInFlight = 8;  // loads that a thread has under way
constexpr int64_t kPartialBytes = 16 << 20;
constexpr int64_t kBlocks = 4096;  // of a launch, where there is as much to do
constexpr int64_t kPixelShared = 48 << 10;

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
// span, other: where the pixels of the warp lie
template <int n, bool one, typename T>
__device__ __forceinline__ void pool_window(const T* from, int64_t stride_c, int left, const Pool& p,
                                            const Part& part, int64_t pixel, bool there, Span span,
                                            Span other,
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
    const int64_t word = part.first_slot / kSlots;
    bits = p.weights.bits(part.image, word, span) | p.weights.bits(part.image, word, other);
    if (bits == 0) return;
  }
#pragma unroll 1
  for (int first = 0; first < kOwn && first * kWarps < left; first += kInFlight) {
    Group<T, n> x[kInFlight] = {};
    if (mine) {
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int channel = (first + j) * kWarps;
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
        __syncwarp();                              // elsewhere other threads add to the sums
#pragma unroll 1
        for (int j = first; j < first + kInFlight && j * kWarps < left; ++j) {
          const T* at = from + j * kWarps * stride_c;
          float total = 0.0f;
#pragma unroll
          for (int i = 0; i < n; ++i) {
            if (weight[i] > 0.0f) total = fmaf(at[i].widen(), weight[i], total);
          }
          total = warp_sum(total);
          if (lane == 0) sums[slot * kDeep + j * kWarps] += total;
        }
        __syncwarp();
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
  const int64_t deep = p.channels - part.channel < kDeep ? p.channels - part.channel : kDeep;
  const int left = static_cast<int>(deep) - warp;                 // channels from the warp's first one on
  const int pixels = static_cast<int>(p.weights.piece.pixels());  // few: a piece is of bounded size
  if (left > 0) {
    const T* from = features.data + (p.weights.piece.image + part.image) * features.stride_b +
                    (part.channel + warp) * features.stride_c;
    const int64_t origin = p.weights.first_pixel();
    int head = n > 1 ? planes::past_aligned<n>(from + origin) : 0;  // pixels in front of the first group
    head = head > 0 ? n - head : 0;
    if (head > pixels) head = pixels;
    const int groups = (pixels - head) / n;
    const int begin = static_cast<int>(part.chunk * p.steps) * kWarp;
    int end = begin + static_cast<int>(p.steps) * kWarp;
    if (end > groups) end = groups;
    for (int first = begin; first < end; first += kWarp) {
      const int group = first + lane;
      const int pixel = head + group * n;
      const int last = first + kWarp < groups ? first + kWarp : groups;
      const bool there = group < groups;
      pool_window<n, one>(from + features.offset_of(origin + (there ? pixel : 0)), features.stride_c, left, p,
                          part, pixel, there, {head + first * n, head + last * n}, {}, sums + warp);
    }
    if (n > 1 && part.chunk == p.chunks - 1) {  // what lies in front of the groups and behind them
      const int tail = head + groups * n, edge = lane < head ? lane : tail + lane - head;
      const bool there = edge < pixels;
      if (head > 0 || tail < pixels) {
        const T* at = from + features.offset_of(origin + (there ? edge : 0));
        pool_window<1, one>(at, features.stride_c, left, p, part, edge, there, {0, head}, {tail, pixels},
                            sums + warp);
      }
    }
  }
  __syncthreads();
  float* partial = part.partial(p);
  for (int i = threadIdx.x; i < part.slots * kDeep; i += kThreads) {
    if (i % kDeep < deep) partial[i / kDeep * p.channels + i % kDeep] = sums[i];
  }
}

// Features whose channels lie side by side: `lanes` threads have a pixel's, some pixels at a time. A thread
// keeps to its channels; a pixel without weight is not read.
template <typename T, bool one>
__global__ void __launch_bounds__(kThreads, one&& kWide<T> == 4 ? 3 : 2)
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
      bits = p.weights.bits(part.image, part.first_slot / kSlots, {pixel, pixel + count});
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

// Sums of the features of one piece; fills in which chunks they are of.
template <typename T, bool one>
void pool_of(const Gpu& gpu, const Planes<const T>& features, int64_t most_chunks, Pool& p) {
  const int64_t pixels = p.weights.piece.pixels(), slots = std::min<int64_t>(p.slots, kSlots);
  const int64_t beside = p.weights.piece.images * p.groups * p.deep_blocks;
  const bool in_pixels = planes::in_pixels(features, p.channels), wide = planes::in_planes(features);
  const int64_t steps = ceil_div(pixels, in_pixels ? kInFlight : kWarp * (wide ? kWide<T> : 1));
  int64_t lanes = 0, teams = 1;
  if (in_pixels) {
    lanes = ceil_div(std::min<int64_t>(p.channels, kDeep), kWide<T> * kWarp) * kWarp;
    teams = std::clamp<int64_t>(kPixelShared / (slots * lanes * kWide<T> * 4), 1, kThreads / lanes);
  }
  p.steps = std::max(ceil_div(steps, most_chunks), teams);
  p.chunks = ceil_div(steps, p.steps);
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
    const int64_t beside = piece.images * ceil_div(share.slots, kSlots) * ceil_div(channels, kDeep);
    share.chunks =
        std::clamp<int64_t>(std::min(kPartialBytes / (row * share.slots), ceil_div(kBlocks, beside)), 1,
                            ceil_div(piece.pixels(), kInFlight));
    return share;
  }
};

// features: [B,C,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// prototypes: [B,S,C] float32
Tensor cuda_forward(const Tensor& features, const Tensor& labels, const Tensor& classes, double eps) {
  check_forward(features, labels, classes, kHere);
  const Gpu gpu(kForward, "features", features);
  check_same_device(kForward, "labels", labels, features);
  check_same_device(kForward, "classes", classes, features);
  check_class_values(kForward, classes);
  const int64_t batch = features.size(0), slots = classes.size(1), channels = features.size(1);
  if (batch * slots * channels == 0 || labels.numel() == 0) {
    return without_pixels(gpu, classes, {batch, slots, channels}, ScalarType::Float);
  }
  Tensor prototypes = device_empty(features, {batch, slots, channels}, ScalarType::Float);
  // A piece's images have one chunk each at least, and a group of slots.
  const int64_t image_bytes = std::min<int64_t>(slots, kSlots) * channels * 4;
  Gatherer gatherer(gpu, labels, classes, features.size(2), features.size(3), kPartialBytes / image_bytes);
  int64_t floats = 0;
  for (const Piece& piece : gatherer.pieces) {
    const Share share = Share::of(piece, slots, channels);
    floats = std::max(floats, piece.images * share.chunks * share.slots * channels);
  }
  Tensor partial = device_empty(features, {floats}, ScalarType::Float);
  const int64_t area = features.size(2) * features.size(3);
  for (const Piece& piece : gatherer.pieces) {
    Pool p{gatherer.of(piece, true), channels, ceil_div(channels, kDeep), 0, 0, 0, 0, 0,
           data_of<float>(partial)};
    const Share share = Share::of(piece, slots, channels);
    const bool first = piece.row == 0 && piece.column == 0;
    const bool last = (piece.row + piece.rows - 1) * features.size(3) + piece.column + piece.columns == area;
    for (; p.first_slot < slots; p.first_slot += share.slots) {
      p.slots = std::min(share.slots, slots - p.first_slot);
      p.groups = ceil_div(p.slots, kSlots);
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
                     ceil_div(channels, kFinishChannels),
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

}  // namespace
}  // namespace cisc::masked_average_pool::device

CISC_DEFINE(cisc::masked_average_pool::kSchema)

CISC_REGISTER(m) {
  m.impl("masked_average_pool", TORCH_BOX(&cisc::masked_average_pool::device::cuda_forward));
}
