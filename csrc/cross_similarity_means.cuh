// "mean" of cross_similarity on a GPU without cosines of pairs: it is a query pixel's unit vector times the
// mean of the guide's unit vectors of a class.
//
// A table has a row for each class of an image: one for each slot of `classes`, or for each byte where pixels
// are compared with those of their own label. Backward to the guide has the same table of the query's unit
// vectors, weighted by the gradient. Members of a class are found by the sorted order, and summed in it.
#pragma once

#include "cross_similarity_device.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kSummed = 4;                // channels that a block sums
constexpr int64_t kTableBytes = 8 << 20;  // of workspace

// Some channels of the table's rows, for some images.
struct Means {
  Side query, guide;
  SlotClasses classes;
  int64_t image, images, rows, first_channel, channels;
  int64_t ignore_index;
  float* table;     // [images,rows,channels]; of a class without guide pixels not set
  int32_t* counts;  // [images,rows], the guide's pixels

  __device__ int64_t class_of(int64_t b, int64_t row) const { return classes.own ? row : classes.at(b, row); }

  // Own-label mode: the row of a pixel, or -1.
  __device__ int64_t row_of(int64_t label, bool ignores) const {
    return label < 0 || label >= rows || (ignores && label == ignore_index) ? -1 : label;
  }
};

// Positions in a side's order that hold a class; others too where wider labels share a bin.
struct Members {
  int64_t begin, end, label;
  bool mixed;

  __device__ static Members of(const Side& side, int64_t b, int64_t label) {
    const bool bytes = side.labels.kind == Integer::u8;
    if (label < 0 || (bytes && label >= kBins)) return {0, 0, label, false};
    const int32_t* starts = side.starts_of(b) + class_sort::bin_of(label);
    return {starts[0], starts[1], label, !bytes};
  }

  __device__ bool has(const Side& side, int64_t b, int64_t pixel) const {
    return !mixed || side.label(b, pixel) == label;
  }
};

// A block has a row of an image.
__global__ void __launch_bounds__(kThreads) count_members_kernel(Means p) {
  const int64_t b = p.image + blockIdx.x / p.rows;
  const Members those = Members::of(p.guide, b, p.class_of(b, blockIdx.x % p.rows));
  if (!those.mixed) {
    if (threadIdx.x == 0) p.counts[blockIdx.x] = static_cast<int32_t>(those.end - those.begin);
    return;
  }
  int32_t count = 0;
#pragma unroll 1
  for (int64_t at = those.begin + threadIdx.x; at < those.end; at += kThreads) {
    count += those.has(p.guide, b, p.guide.pixel_at(b, at)) ? 1 : 0;
  }
  count = block_sum<kThreads>(count);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

// Every pixel of the guide counts alike.
struct Alike {
  static constexpr bool of_query = false;  // it weights pixels of the guide

  __device__ float at(int64_t, int64_t, int64_t) const { return 1.0f; }
};

// A block has a row of an image, and 4 of its channels: the sum of weighted unit vectors of one side, divided
// by the number of the guide's.
template <typename Weights>
__global__ void __launch_bounds__(kThreads) sum_members_kernel(Means p, Weights weights) {
  const int64_t slices = ceil_div(p.channels, kSummed);
  const int64_t first = blockIdx.x % slices * kSummed, place = blockIdx.x / slices, row = place % p.rows;
  const int64_t b = p.image + place / p.rows;
  const int32_t count = p.counts[place];
  if (count == 0) return;
  const Side& side = Weights::of_query ? p.query : p.guide;
  const bool all = Weights::of_query && !p.classes.own;
  const Members those = all ? Members{0, side.pixels, 0, false} : Members::of(side, b, p.class_of(b, row));
  const int64_t slot = p.classes.own ? 0 : row, begin = (p.first_channel + first) * side.image.stride_c;
  Sum sums[kSummed];
  for (int64_t at = those.begin + threadIdx.x; at < those.end; at += kThreads) {
    const int64_t pixel = side.pixel_at(b, at), of = (b - side.first) * side.pixels + pixel;
    if (!those.has(side, b, pixel)) continue;
    float values[kSummed];
    read_channels(side.image, side.offset(b, pixel) + begin, 1, p.channels - first, values);
    const float scale = side.scale[of], rest = side.rest[of], low = side.low[of];
    const float weight = weights.at(b, slot, pixel);
#pragma unroll
    for (int i = 0; i < kSummed; ++i) sums[i].add(weight * unit_of(values[i], scale, rest, low));
  }
#pragma unroll
  for (int i = 0; i < kSummed; ++i) {
    const double sum = block_sum<kThreads>(static_cast<double>(sums[i].value));
    if (threadIdx.x == 0 && first + i < p.channels) {
      p.table[place * p.channels + first + i] = static_cast<float>(sum / static_cast<double>(count));
    }
  }
}

// Host: the tables, part by part.
class MeanTables {
 public:
  // Labels of 32 and 64 bits, compared with their own kind, may have as many classes as pixels: for these
  // there is no table, and all pairs are met.
  static bool serve(const Inputs& in) {
    return in.classes || in.guide_labels.scalar_type() == ScalarType::Byte ||
           in.query_labels->scalar_type() == ScalarType::Byte;
  }

  MeanTables(const Gpu& gpu, const Inputs& in) : gpu_(gpu) {
    p_.rows = in.classes ? in.slots() : kBins;
    p_.ignore_index = in.settings.ignore_index;
    all_channels_ = in.channels();
    const int64_t rows = std::max<int64_t>(p_.rows, 1), floats = kTableBytes / 4;
    channels_ = std::clamp<int64_t>(floats / rows - 1, 1, std::max<int64_t>(all_channels_, 1));
    images_ = channels_ < all_channels_ ? 1
                                        : std::clamp<int64_t>(floats / (rows * (channels_ + 1)), 1,
                                                              std::max<int64_t>(in.batch(), 1));
    counts_ = device_empty(in.query, {images_ * p_.rows}, ScalarType::Int);
    table_ = device_empty(in.query, {images_ * p_.rows * channels_}, ScalarType::Float);
    p_.counts = data_of<int32_t>(counts_);
    p_.table = data_of<float>(table_);
  }

  // Whether a table has but a part of the channels.
  bool in_parts() const { return channels_ < all_channels_; }

  // f(means, whether it is the first part, whether in the last pass) for each part of the images whose sides
  // are ready: all parts `passes` times, but a single one once, in the last pass.
  template <typename Weights, typename Function>
  void each(const Side& query, const Side& guide, const SlotClasses& classes, int64_t images, int passes,
            const Weights& weights, const Function& f) {
    Means p = p_;
    p.query = query;
    p.guide = guide;
    p.classes = classes;
    for (int64_t image = 0; image < images; image += images_) {
      p.image = query.first + image;
      p.images = std::min(images_, images - image);
      gpu_.launch(count_members_kernel, p.images * p.rows, kThreads, 0, p);
      for (int pass = in_parts() ? 0 : passes - 1; pass < passes; ++pass) {
        p.first_channel = 0;
        do {  // without any channel too
          p.channels = std::min(channels_, all_channels_ - p.first_channel);
          const int64_t blocks = p.images * p.rows * ceil_div(p.channels, kSummed);
          gpu_.launch(sum_members_kernel<Weights>, blocks, kThreads, 0, p, weights);
          f(p, p.first_channel == 0, pass == passes - 1);
          p.first_channel += channels_;
        } while (p.first_channel < all_channels_);
      }
    }
  }

 private:
  const Gpu& gpu_;
  Means p_{};
  int64_t all_channels_ = 0, channels_ = 0, images_ = 0;
  Tensor counts_, table_;
};

}  // namespace
}  // namespace cisc::cross_similarity
