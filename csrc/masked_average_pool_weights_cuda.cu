// The weights of the features' pixels on a GPU, from the labels.
//
// Work at B = 16, 181 x 181 features and 721 x 721 labels, one class: a label takes about 3 instructions
// where its column is summed, a feature pixel about 100 more: 4 us.

#include <algorithm>

#include "masked_average_pool_weights.cuh"

namespace cisc::masked_average_pool::device {

namespace {

constexpr int64_t kLabelColumns = 256;  // whose sums a warp has in shared memory
constexpr int kTall = 8;                // label rows that a thread reads at once
constexpr int kBins = 8;                // words: labels that are there, by their last 8 bits
constexpr int64_t kManyRows = 64;       // label rows of a feature pixel that are shared among a block's warps
constexpr int64_t kWeightBytes = 32 << 20;

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

// Pixels of a segment, a power of two: as many as their labels' columns, and one pixel's on either side, fit.
int64_t segment_pixels(const Geometry& g) {
  const int64_t ratio = ceil_div(g.width, g.w);
  int64_t each = kWarp;
  while (each > 1 && (each + 1) * ratio > kLabelColumns) each /= 2;
  return each;
}

// Pieces of the batch, whole images where they fit, but no more than `most_images` of them. The weights of
// one take kWeightBytes at most, unless those of one pixel take more.
std::vector<Piece> pieces_of(const Geometry& g, int64_t slots, int64_t most_images) {
  const int64_t most = std::max<int64_t>(kWeightBytes / (5 * slots), 1), area = g.h * g.w;
  std::vector<Piece> pieces;
  if (area <= most) {
    const int64_t launches = ceil_div(g.batch * area, most);
    const int64_t evenly = ceil_div(g.batch, launches);
    const int64_t images = std::max<int64_t>(std::min({evenly, most / area, most_images}), 1);
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

}  // namespace

Gatherer::Gatherer(const Gpu& gpu, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w,
                   int64_t most_images)
    : gpu_(gpu),
      geometry{labels.size(0), h, w, labels.size(1), labels.size(2)},
      slots(classes.size(1)),
      pieces(pieces_of(geometry, slots, most_images)) {
  const int64_t each = segment_pixels(geometry);
  int64_t most = 0, most_segments = 0;
  for (const Piece& piece : pieces) {
    most = std::max(most, piece.images * piece.pixels());
    most_segments = std::max(most_segments, piece.images * piece.rows * ceil_div(piece.columns, each));
  }
  const int64_t words = ceil_div(slots, kSlots);
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
        classes_of(classes),
        0,
        1,
        false,
        geometry.unit(),
        data_of<unsigned long long>(totals_),
        reinterpret_cast<int*>(data_of<int64_t>(totals_) + geometry.batch * slots)};
  if (ceil_div(2 * geometry.height, h) > kManyRows) p_.shared_by = kWarps;
}

template <typename L>
Weights Gatherer::launch(bool wide) {
  const int64_t blocks = p_.shared_by > 1 ? p_.tasks : ceil_div(p_.tasks, kWarps);
  if (wide) {
    gpu_.launch(weights_kernel<L, int64_t>, blocks, kThreads, 0, p_);
  } else {
    gpu_.launch(weights_kernel<L, int32_t>, blocks, kThreads, 0, p_);
  }
  return p_.weights;
}

Weights Gatherer::of(const Piece& piece, bool count) {
  p_.weights.piece = piece;
  p_.weights.segments = ceil_div(piece.columns, p_.weights.each);
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

}  // namespace cisc::masked_average_pool::device
