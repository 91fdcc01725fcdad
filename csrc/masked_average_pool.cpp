// masked_average_pool: mean of the bilinearly upsampled features over the pixels of each class.
//
// Upsampling is linear, so its adjoint is applied to the mask: one pass over the labels gives each feature
// pixel its exact weight per class, one pass over the features sums. The upsampled features never exist.

#include "masked_average_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "bilinear.h"
#include "checks.h"

namespace cisc::masked_average_pool {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::parallel_for;

constexpr int64_t kPlanes = 4;  // channels that share one reading of the weights
constexpr const char* kForward = "masked_average_pool";
constexpr const char* kBackward = "masked_average_pool_backward";

// A strided tensor of at most four dimensions, read in place.
template <typename T>
struct View {
  T* data;
  std::array<int64_t, 4> stride{};

  View(const Tensor& tensor, T* pointer) : data(pointer) {
    for (int64_t d = 0; d < tensor.dim(); ++d) stride[d] = tensor.stride(d);
  }
};

template <typename T>
View<const T> read(const Tensor& tensor) {
  return {tensor, static_cast<const T*>(tensor.const_data_ptr())};
}

// Classes of one image without repetition; a slot is a position among them.
struct Slots {
  std::vector<std::pair<int64_t, int32_t>> sorted;  // class, slot
  std::vector<int32_t> of_column;                   // [S], -1 where the class is -1
  std::array<int32_t, 256> small;                   // slot of a label below 256, -1 if not asked for
  size_t first_large = 0;                           // first entry of `sorted` with a class of 256 or more

  int64_t count() const { return static_cast<int64_t>(sorted.size()); }

  int32_t find(int64_t label) const {
    if (static_cast<uint64_t>(label) < small.size()) return small[label];
    const auto begin = sorted.begin() + static_cast<std::ptrdiff_t>(first_large);
    const auto found = std::lower_bound(begin, sorted.end(), std::make_pair(label, int32_t{0}));
    return found != sorted.end() && found->first == label ? found->second : -1;
  }
};

// classes: [B,S]
template <typename T>
std::vector<int64_t> read_classes(const Tensor& classes, int64_t image) {
  const auto view = read<T>(classes);
  std::vector<int64_t> row(classes.size(1));
  for (size_t s = 0; s < row.size(); ++s) {
    row[s] = view.data[image * view.stride[0] + static_cast<int64_t>(s) * view.stride[1]];
  }
  return row;
}

Slots find_slots(const char* op, const Tensor& classes, int64_t image) {
  const auto row = classes.scalar_type() == ScalarType::Int ? read_classes<int32_t>(classes, image)
                                                            : read_classes<int64_t>(classes, image);
  Slots slots;
  for (size_t s = 0; s < row.size(); ++s) {
    check(row[s] >= -1, op, "classes must be -1 or a class, got ", row[s], " at [", image, ",", s, "]");
    if (row[s] >= 0) slots.sorted.emplace_back(row[s], 0);
  }
  std::sort(slots.sorted.begin(), slots.sorted.end());
  slots.sorted.erase(std::unique(slots.sorted.begin(), slots.sorted.end()), slots.sorted.end());
  slots.small.fill(-1);
  for (size_t i = 0; i < slots.sorted.size(); ++i) {
    slots.sorted[i].second = static_cast<int32_t>(i);
    if (slots.sorted[i].first < 256) {
      slots.small[slots.sorted[i].first] = static_cast<int32_t>(i);
      slots.first_large = i + 1;
    }
  }
  for (const int64_t value : row) {
    const auto found =
        std::lower_bound(slots.sorted.begin(), slots.sorted.end(), std::make_pair(value, int32_t{0}));
    slots.of_column.push_back(value < 0 ? -1 : found->second);
  }
  return slots;
}

// One image's labels and the features' grid that they are pooled on.
struct Geometry {
  int64_t height, width;                                            // features
  int64_t label_height, label_width;                                // labels
  int64_t whole() const { return 4 * label_height * label_width; }  // a pixel's weight in exact units
};

// A rectangle of the features' grid.
struct Piece {
  int64_t top, bottom, left, right;
  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
  int64_t pixels() const { return rows() * columns(); }
  int64_t blocks() const { return (pixels() + kBlock - 1) / kBlock; }
};

// Weights of one piece, packed: block after block of kBlock pixels, of each only the classes found there.
struct Weights {
  Piece piece{};
  int64_t slots;
  std::unique_ptr<int64_t[]> exact;   // [slots, pixels], in units of 1 / Geometry::whole()
  std::unique_ptr<float[]> packed;    // [blocks, slots, kBlock], 0 behind the last pixel
  std::unique_ptr<int32_t[]> slot;    // [blocks, slots]
  std::unique_ptr<int32_t[]> filled;  // [blocks]

  Weights(const Plan& plan, int64_t slot_count)
      : slots(slot_count),
        exact(new int64_t[plan.rows * plan.columns * slot_count]),
        packed(new float[plan.blocks * kBlock * slot_count]),
        slot(new int32_t[plan.blocks * slot_count]),
        filled(new int32_t[plan.blocks]) {}
};

std::vector<Piece> cut(const Plan& plan, const Geometry& g) {
  std::vector<Piece> pieces;
  for (int64_t top = 0; top < g.height; top += plan.rows) {
    for (int64_t left = 0; left < g.width; left += plan.columns) {
      pieces.push_back(
          {top, std::min(top + plan.rows, g.height), left, std::min(left + plan.columns, g.width)});
    }
  }
  return pieces;
}

// Add the weights of the feature rows [begin, end) of the piece, and count the pixels whose upper left
// neighbour lies there. labels: [H,W]
template <typename L>
void spread_rows(const L* labels, int64_t stride_y, int64_t stride_x, const Geometry& g, const Slots& slots,
                 int64_t begin, int64_t end, Weights& weights, std::vector<int64_t>& counts) {
  struct Column {
    int64_t low, part;
  };
  const Piece piece = weights.piece;
  const int64_t whole_x = 2 * g.label_width, whole_y = 2 * g.label_height;
  const int64_t first_y = first_output(begin - 1, g.height, g.label_height, false);
  const int64_t last_y = first_output(end, g.height, g.label_height, false);
  const int64_t first_x = first_output(piece.left - 1, g.width, g.label_width, false);
  const int64_t last_x = first_output(piece.right, g.width, g.label_width, false);
  std::array<Column, kColumns> columns;
  for (int64_t x0 = first_x; x0 < last_x; x0 += kColumns) {
    const int64_t n = std::min(kColumns, last_x - x0);
    for (int64_t i = 0; i < n; ++i) {
      const Tap tap = bilinear_tap(x0 + i, g.width, g.label_width, false);
      columns[i] = {tap.low, tap.part};
    }
    for (int64_t y = first_y; y < last_y; ++y) {
      const Tap tap_y = bilinear_tap(y, g.height, g.label_height, false);
      const bool counted = tap_y.low >= begin;
      int32_t slot = -1;
      int64_t low = 0, run = 0, weight_high = 0;  // pixels of one class between the same two feature pixels
      const auto add_row = [&](int64_t row, int64_t weight) {
        if (row < begin || row >= end || weight == 0) return;
        int64_t* cells =
            weights.exact.get() + (slot * piece.rows() + row - piece.top) * piece.columns() - piece.left;
        const int64_t high = std::min(low + 1, g.width - 1);
        if (low >= piece.left && low < piece.right) cells[low] += weight * (run * whole_x - weight_high);
        if (high >= piece.left && high < piece.right) cells[high] += weight * weight_high;
      };
      const auto flush = [&] {
        if (slot < 0) return;
        add_row(tap_y.low, whole_y - tap_y.part);
        add_row(tap_y.high, tap_y.part);
        if (counted && low >= piece.left) counts[slot] += run;
      };
      const L* row = labels + y * stride_y + x0 * stride_x;
      for (int64_t i = 0; i < n; ++i) {
        const int32_t here = slots.find(static_cast<int64_t>(row[i * stride_x]));
        if (here != slot || columns[i].low != low) {
          flush();
          slot = here;
          low = columns[i].low;
          run = weight_high = 0;
        }
        ++run;
        weight_high += columns[i].part;
      }
      flush();
    }
  }
}

// Pack weights.exact as float32, leaving out the blocks without a pixel of the class.
void pack(const Geometry& g, Weights& weights) {
  const double unit = 1.0 / static_cast<double>(g.whole());
  const int64_t pixels = weights.piece.pixels();
  parallel_for(0, weights.piece.blocks(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n = std::min(kBlock, pixels - block * kBlock);
      int32_t filled = 0;
      for (int64_t slot = 0; slot < weights.slots; ++slot) {
        const int64_t* from = weights.exact.get() + slot * pixels + block * kBlock;
        int64_t any = 0;
        for (int64_t i = 0; i < n; ++i) any |= from[i];
        if (any == 0) continue;
        float* to = weights.packed.get() + (block * weights.slots + filled) * kBlock;
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(static_cast<double>(from[i]) * unit);
        std::fill(to + n, to + kBlock, 0.0f);
        weights.slot[block * weights.slots + filled++] = static_cast<int32_t>(slot);
      }
      weights.filled[block] = filled;
    }
  });
}

// Weights of one piece from image `image` of labels [B,H,W]; its pixels are added to counts [slots].
void build(const Tensor& labels, int64_t image, const Geometry& g, const Slots& slots, const Piece& piece,
           Weights& weights, std::vector<int64_t>& counts) {
  weights.piece = piece;
  std::mutex merging;
  const auto spread = [&](auto* data) {
    const auto view = View(labels, data);
    parallel_for(piece.top, piece.bottom, 8, [&](int64_t begin, int64_t end) {
      for (int64_t slot = 0; slot < weights.slots; ++slot) {
        int64_t* rows = weights.exact.get() + (slot * piece.rows() + begin - piece.top) * piece.columns();
        std::fill(rows, rows + (end - begin) * piece.columns(), 0);
      }
      std::vector<int64_t> own(counts.size(), 0);
      spread_rows(view.data + image * view.stride[0], view.stride[1], view.stride[2], g, slots, begin, end,
                  weights, own);
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t slot = 0; slot < own.size(); ++slot) counts[slot] += own[slot];
    });
  };
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      spread(static_cast<const uint8_t*>(labels.const_data_ptr()));
      break;
    case ScalarType::Int:
      spread(static_cast<const int32_t*>(labels.const_data_ptr()));
      break;
    default:
      spread(static_cast<const int64_t*>(labels.const_data_ptr()));
  }
  pack(g, weights);
}

// sums[j] = sum of values[j] * weights; a pixel of weight 0 is left out even where its value is NaN or inf.
std::array<float, kPlanes> dot(const std::array<const float*, kPlanes>& values, const float* weights) {
  static_assert(kPlanes == 4);
  const float *v0 = values[0], *v1 = values[1], *v2 = values[2], *v3 = values[3];
  float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < kBlock; ++i) {
    const float weight = weights[i];
    s0 += weight != 0.0f ? v0[i] * weight : 0.0f;
    s1 += weight != 0.0f ? v1[i] * weight : 0.0f;
    s2 += weight != 0.0f ? v2[i] * weight : 0.0f;
    s3 += weight != 0.0f ? v3[i] * weight : 0.0f;
  }
  return {s0, s1, s2, s3};
}

// The features or gradients of one channel of one image, read or written pixel block by pixel block.
template <typename T>
struct Plane {
  T* data;  // first pixel of the piece
  int64_t stride_y, stride_x, columns;
  bool dense;  // the piece is one contiguous run

  Plane(T* image, int64_t sy, int64_t sx, const Piece& piece)
      : data(image + piece.top * sy + piece.left * sx),
        stride_y(sy),
        stride_x(sx),
        columns(piece.columns()),
        dense(sx == 1 && (sy == columns || piece.rows() == 1)) {}

  // f(offset of pixel, its number in the block), for n pixels from `first` on
  template <typename F>
  void each(int64_t first, int64_t n, F&& f) const {
    int64_t y = first / columns, x = first % columns;
    for (int64_t i = 0; i < n;) {
      const int64_t run = std::min(columns - x, n - i);
      const int64_t base = y * stride_y + x * stride_x;
      for (int64_t j = 0; j < run; ++j) f(base + j * stride_x, i + j);
      i += run;
      x = 0;
      ++y;
    }
  }
};

// Pixels [first, first + n) of a plane as kBlock float32, 0 behind the last; in place where they lie so.
template <typename T>
const float* read_block(const Plane<const T>& plane, int64_t first, int64_t n,
                        std::array<float, kBlock>& buffer) {
  if (plane.dense) {
    const T* from = plane.data + first;
    if constexpr (std::is_same_v<T, float>) {
      if (n == kBlock) return from;
    }
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<float>(from[i]);
  } else {
    plane.each(first, n,
               [&](int64_t offset, int64_t i) { buffer[i] = static_cast<float>(plane.data[offset]); });
  }
  std::fill(buffer.begin() + n, buffer.end(), 0.0f);
  return buffer.data();
}

// sums[slot, c] += features[c] . weights[slot], kPlanes channels at a time. features: [B,C,h,w]
template <typename T>
void pool_planes(const View<const T>& features, int64_t image, int64_t first, int64_t channels,
                 const Weights& weights, double* sums) {
  const Piece piece = weights.piece;
  parallel_for(0, (channels + kPlanes - 1) / kPlanes, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> own(weights.slots * kPlanes);
    std::array<std::array<float, kBlock>, kPlanes> buffers;
    for (int64_t c = begin * kPlanes; c < std::min(end * kPlanes, channels); c += kPlanes) {
      std::fill(own.begin(), own.end(), 0.0);
      const int64_t n_planes = std::min(kPlanes, channels - c);
      std::vector<Plane<const T>> planes;
      for (int64_t j = 0; j < n_planes; ++j) {
        const T* data = features.data + image * features.stride[0] + (first + c + j) * features.stride[1];
        planes.emplace_back(data, features.stride[2], features.stride[3], piece);
      }
      for (int64_t block = 0; block < piece.blocks(); ++block) {
        const int32_t filled = weights.filled[block];
        if (filled == 0) continue;
        const int64_t n = std::min(kBlock, piece.pixels() - block * kBlock);
        std::array<const float*, kPlanes> values;
        for (int64_t j = 0; j < n_planes; ++j) {
          values[j] = read_block(planes[j], block * kBlock, n, buffers[j]);
        }
        for (int64_t j = n_planes; j < kPlanes; ++j) values[j] = values[0];
        for (int32_t k = 0; k < filled; ++k) {
          const int64_t entry = block * weights.slots + k;
          const auto found = dot(values, weights.packed.get() + entry * kBlock);
          double* to = own.data() + weights.slot[entry] * kPlanes;
          for (int64_t j = 0; j < kPlanes; ++j) to[j] += found[j];
        }
      }
      for (int64_t slot = 0; slot < weights.slots; ++slot) {
        for (int64_t j = 0; j < n_planes; ++j) sums[slot * channels + c + j] += own[slot * kPlanes + j];
      }
    }
  });
}

// The same for features whose channels lie side by side (channels-last).
template <typename T>
void pool_pixels(const View<const T>& features, int64_t image, int64_t first, int64_t channels,
                 const Weights& weights, double* sums) {
  const Piece piece = weights.piece;
  parallel_for(0, (channels + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    std::array<float, kBlock> own;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t n = std::min(kBlock, channels - group * kBlock);
      const T* data = features.data + image * features.stride[0] + first + group * kBlock;
      const Plane<const T> plane(data, features.stride[2], features.stride[3], piece);
      for (int64_t block = 0; block < piece.blocks(); ++block) {
        for (int32_t k = 0; k < weights.filled[block]; ++k) {
          const int64_t entry = block * weights.slots + k;
          const float* weight = weights.packed.get() + entry * kBlock;
          own.fill(0.0f);
          plane.each(block * kBlock, std::min(kBlock, piece.pixels() - block * kBlock),
                     [&](int64_t offset, int64_t i) {
                       if (weight[i] == 0.0f) return;
                       const T* from = plane.data + offset;
                       for (int64_t c = 0; c < n; ++c) own[c] += weight[i] * static_cast<float>(from[c]);
                     });
          double* to = sums + weights.slot[entry] * channels + group * kBlock;
          for (int64_t c = 0; c < n; ++c) to[c] += own[c];
        }
      }
    }
  });
}

// gradient[c] = sum over the classes of grad[s,c] * weights[slot of s] / (count + eps), for one piece.
// grad: [B,S,C]; gradient: contiguous [B,C,h,w]
template <typename T>
void scatter(const View<const float>& grad, const std::vector<double>& scale, const Slots& slots,
             int64_t image, int64_t channels, const Geometry& g, const Weights& weights, T* gradient) {
  const Piece piece = weights.piece;
  parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> own(weights.slots);
    std::array<float, kBlock> values;
    for (int64_t c = begin; c < end; ++c) {
      std::fill(own.begin(), own.end(), 0.0);
      for (size_t s = 0; s < slots.of_column.size(); ++s) {
        const int32_t slot = slots.of_column[s];
        if (slot < 0) continue;
        const int64_t offset = image * grad.stride[0] + static_cast<int64_t>(s) * grad.stride[1];
        own[slot] += grad.data[offset + c * grad.stride[2]] * scale[slot];
      }
      const Plane<T> plane(gradient + (image * channels + c) * g.height * g.width, g.width, 1, piece);
      for (int64_t block = 0; block < piece.blocks(); ++block) {
        values.fill(0.0f);
        for (int32_t k = 0; k < weights.filled[block]; ++k) {
          const int64_t entry = block * weights.slots + k;
          const float* weight = weights.packed.get() + entry * kBlock;
          const float factor = static_cast<float>(own[weights.slot[entry]]);
          for (int64_t i = 0; i < kBlock; ++i) {
            values[i] += weight[i] != 0.0f ? factor * weight[i] : 0.0f;
          }
        }
        const int64_t n = std::min(kBlock, piece.pixels() - block * kBlock);
        if (plane.dense) {
          T* to = plane.data + block * kBlock;
          for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(values[i]);
        } else {
          plane.each(block * kBlock, n,
                     [&](int64_t offset, int64_t i) { plane.data[offset] = static_cast<T>(values[i]); });
        }
      }
    }
  });
}

// 1 / (count + eps) per slot
std::vector<double> scales(const std::vector<int64_t>& counts, double eps) {
  std::vector<double> scale;
  for (const int64_t count : counts) scale.push_back(1.0 / (static_cast<double>(count) + eps));
  return scale;
}

template <typename T>
void forward_image(const Tensor& features, const Tensor& labels, int64_t image, const Geometry& g,
                   const Slots& slots, double eps, float* prototypes) {
  const auto view = read<T>(features);
  const int64_t all = features.size(1), columns = static_cast<int64_t>(slots.of_column.size());
  const bool channels_last = view.stride[1] == 1 && view.stride[3] != 1;
  const Plan p = plan(all, g.height, g.width, slots.count());
  const std::vector<Piece> pieces = cut(p, g);
  Weights weights(p, slots.count());
  std::vector<double> sums(p.channels * slots.count());
  for (int64_t first = 0; first < all; first += p.channels) {
    const int64_t channels = std::min(p.channels, all - first);
    std::vector<int64_t> counts(slots.count(), 0);
    std::fill(sums.begin(), sums.end(), 0.0);
    for (const Piece& piece : pieces) {
      build(labels, image, g, slots, piece, weights, counts);
      if (channels_last) {
        pool_pixels(view, image, first, channels, weights, sums.data());
      } else {
        pool_planes(view, image, first, channels, weights, sums.data());
      }
    }
    const std::vector<double> scale = scales(counts, eps);
    for (int64_t s = 0; s < columns; ++s) {
      const int32_t slot = slots.of_column[s];
      if (slot < 0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums[slot * channels + c];
        prototypes[(image * columns + s) * all + first + c] = static_cast<float>(sum * scale[slot]);
      }
    }
  }
}

template <typename T>
void backward_image(const Tensor& grad, const Tensor& labels, int64_t image, const Geometry& g,
                    const Slots& slots, double eps, T* gradient) {
  const Plan p = plan(grad.size(2), g.height, g.width, slots.count());
  const std::vector<Piece> pieces = cut(p, g);
  Weights weights(p, slots.count());
  std::vector<int64_t> counts(slots.count(), 0);
  for (const Piece& piece : pieces) build(labels, image, g, slots, piece, weights, counts);
  const std::vector<double> scale = scales(counts, eps);
  std::vector<int64_t> unused(slots.count(), 0);
  for (const Piece& piece : pieces) {
    if (pieces.size() > 1) build(labels, image, g, slots, piece, weights, unused);
    scatter(read<float>(grad), scale, slots, image, grad.size(2), g, weights, gradient);
  }
}

void check_common(const char* op, const Tensor& labels, const Tensor& classes, int64_t images, int64_t height,
                  int64_t width) {
  check_labels(op, labels);
  check_classes(op, classes);
  check_size(op, "labels", labels, 0, images, "[B,H,W]");
  check_size(op, "classes", classes, 0, images, "[B,S]");
  check(classes.size(1) <= kMaxClasses, op, "classes must have at most ", kMaxClasses, " columns, got ",
        classes.size(1));
  check(labels.size(1) * labels.size(2) <= kMaxLabels, op, "labels must have at most ", kMaxLabels,
        " pixels per image, got ", labels.size(1), " x ", labels.size(2));
  check(height * width > 0 || labels.numel() == 0, op, "features must have at least one pixel, got ", height,
        " x ", width);
}

// features: [B,C,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// prototypes: [B,S,C] float32
Tensor forward(const Tensor& features, const Tensor& labels, const Tensor& classes, double eps) {
  check_rank(kForward, "features", features, 4, "[B,C,h,w]");
  check_features(kForward, "features", features.scalar_type());
  check_cpu(kForward, "features", features);
  const int64_t images = features.size(0);
  const Geometry g{features.size(2), features.size(3), labels.dim() == 3 ? labels.size(1) : 0,
                   labels.dim() == 3 ? labels.size(2) : 0};
  check_common(kForward, labels, classes, images, g.height, g.width);
  std::vector<Slots> slots;
  for (int64_t b = 0; b < images; ++b) slots.push_back(find_slots(kForward, classes, b));

  const std::array<int64_t, 3> size{images, classes.size(1), features.size(1)};
  Tensor prototypes = torch::stable::new_zeros(features, {size.data(), size.size()}, ScalarType::Float);
  if (prototypes.numel() == 0 || labels.numel() == 0) return prototypes;
  float* out = static_cast<float*>(prototypes.mutable_data_ptr());
  for (int64_t b = 0; b < images; ++b) {
    if (slots[b].count() == 0) continue;
    switch (features.scalar_type()) {
      case ScalarType::Float:
        forward_image<float>(features, labels, b, g, slots[b], eps, out);
        break;
      case ScalarType::BFloat16:
        forward_image<BFloat16>(features, labels, b, g, slots[b], eps, out);
        break;
      default:
        forward_image<Half>(features, labels, b, g, slots[b], eps, out);
    }
  }
  return prototypes;
}

// grad: [B,S,C] float32, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// gradient: [B,C,h,w] of `dtype`, contiguous
Tensor backward(const Tensor& grad, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w,
                double eps, ScalarType dtype) {
  check_rank(kBackward, "grad", grad, 3, "[B,S,C]");
  check_dtype(kBackward, "grad", grad.scalar_type(), {ScalarType::Float}, "float32");
  check_cpu(kBackward, "grad", grad);
  check_features(kBackward, "dtype", dtype);
  check(h >= 0 && w >= 0, kBackward, "h and w must not be negative, got ", h, " x ", w);
  const int64_t images = grad.size(0), channels = grad.size(2);
  check_common(kBackward, labels, classes, images, h, w);
  check_size(kBackward, "grad", grad, 1, classes.size(1), "[B,S,C]");
  const Geometry g{h, w, labels.size(1), labels.size(2)};
  std::vector<Slots> slots;
  for (int64_t b = 0; b < images; ++b) slots.push_back(find_slots(kBackward, classes, b));

  const std::array<int64_t, 4> size{images, channels, h, w};
  const torch::headeronly::IntHeaderOnlyArrayRef shape(size.data(), size.size());
  if (grad.numel() == 0 || labels.numel() == 0) return torch::stable::new_zeros(grad, shape, dtype);
  Tensor gradient = torch::stable::new_empty(grad, shape, dtype);
  void* out = gradient.mutable_data_ptr();
  for (int64_t b = 0; b < images; ++b) {
    switch (dtype) {
      case ScalarType::Float:
        backward_image(grad, labels, b, g, slots[b], eps, static_cast<float*>(out));
        break;
      case ScalarType::BFloat16:
        backward_image(grad, labels, b, g, slots[b], eps, static_cast<BFloat16*>(out));
        break;
      default:
        backward_image(grad, labels, b, g, slots[b], eps, static_cast<Half*>(out));
    }
  }
  return gradient;
}

}  // namespace
}  // namespace cisc::masked_average_pool

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def("masked_average_pool(Tensor features, Tensor labels, Tensor classes, float eps) -> Tensor");
  m.def(
      "masked_average_pool_backward(Tensor grad, Tensor labels, Tensor classes, SymInt h, SymInt w, "
      "float eps, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("masked_average_pool", TORCH_BOX(&cisc::masked_average_pool::forward));
  m.impl("masked_average_pool_backward", TORCH_BOX(&cisc::masked_average_pool::backward));
}
