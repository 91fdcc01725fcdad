// masked_average_pool: mean of the bilinearly upsampled features over the pixels of each class.
//
// Upsampling is linear, so its adjoint is applied to the mask: one pass over the labels gives each feature
// pixel its exact weight per class, one pass over the features sums. The upsampled features never exist.

#include "masked_average_pool_arguments.h"

#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "labels_kernel.h"
#include "masked_average_pool_kernel.h"
#include "tensors.h"

namespace cisc::masked_average_pool {

const Kernels kPortable{&pool_planes, &pool_pixels, &scatter};

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// How many items of some work make kGrain elements.
int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(kGrain / std::max<int64_t>(elements_each, 1), 1);
}

// One image's labels and the features' grid that they are pooled on.
struct Geometry {
  int64_t height, width;                                            // features
  int64_t label_height, label_width;                                // labels
  int64_t whole() const { return 4 * label_height * label_width; }  // a pixel's weight in exact units
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

  Packed view() const { return {piece, slots, packed.get(), slot.get(), filled.get()}; }
};

// The pieces of the grid one after the other: f(piece).
template <typename Function>
void each_piece(const Plan& plan, const Geometry& g, const Function& f) {
  for (int64_t top = 0; top < g.height; top += plan.rows) {
    for (int64_t left = 0; left < g.width; left += plan.columns) {
      f(Piece{top, std::min(top + plan.rows, g.height), left, std::min(left + plan.columns, g.width)});
    }
  }
}

// Add the weights of the feature rows [begin, end) of the piece, and count the pixels whose upper left
// neighbour lies there. labels: [H,W]
template <typename L>
void spread_rows(const L* labels, int64_t stride_y, int64_t stride_x, const Geometry& g,
                 const Slots::View& slots, int64_t begin, int64_t end, Weights& weights, int64_t* counts) {
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
  parallel_for(0, weights.piece.blocks(), grain(kBlock * weights.slots), [&](int64_t begin, int64_t end) {
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
  const Labels from = read_labels(labels);
  const Crew crew(piece.rows(), counting_bytes(weights.slots),
                  grain(g.label_height * g.label_width / g.height), kPoolCrewBytes);
  const auto own = crew.zeros<int64_t>(weights.slots);
  const auto spread = [&](const auto* data) {
    crew.run([&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t slot = 0; slot < weights.slots; ++slot) {
        int64_t* rows = weights.exact.get() + (slot * piece.rows() + begin) * piece.columns();
        std::fill(rows, rows + (end - begin) * piece.columns(), 0);
      }
      spread_rows(data, from.stride_y, from.stride_x, g, slots.view(), piece.top + begin, piece.top + end,
                  weights, own[thread]);
    });
  };
  with_labels(from, image, 0, 0, spread);
  crew.add_all(own, weights.slots, counts.data());
  pack(g, weights);
}

// 1 / (count + eps) per slot
std::vector<double> scales(const std::vector<int64_t>& counts, double eps) {
  std::vector<double> scale;
  for (const int64_t count : counts) scale.push_back(1.0 / (static_cast<double>(count) + eps));
  return scale;
}

const Kernels& kernels() { return CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16); }

// sums[slot, c] += features[c] . weights[slot]
void pool(const Image<const void*>& features, int64_t image, int64_t first, int64_t channels,
          const Packed& weights, double* sums) {
  const Kernels& kernel = kernels();
  if (features.stride_c == 1 && features.stride_x != 1) {  // channels-last
    parallel_for(0, (channels + kBlock - 1) / kBlock, grain(kBlock * weights.piece.pixels()),
                 [&](int64_t begin, int64_t end) {
                   kernel.pool_pixels(features, image, first, channels, begin, end, weights, sums);
                 });
    return;
  }
  const Crew crew((channels + kPlanes - 1) / kPlanes, pooling_bytes(weights.slots),
                  grain(kPlanes * weights.piece.pixels()), kPoolCrewBytes);
  const auto own = crew.each<double>(weights.slots * kPlanes);
  crew.run([&](int64_t thread, int64_t begin, int64_t end) {
    kernel.pool_planes(features, image, first, channels, begin, end, weights, own[thread], sums);
  });
}

void forward_image(const Tensor& features, const Tensor& labels, int64_t image, const Geometry& g,
                   const Slots& slots, double eps, float* prototypes) {
  const int64_t all = features.size(1), columns = static_cast<int64_t>(slots.of_column.size());
  const Plan p = plan(all, g.height, g.width, slots.count);
  Weights weights(p, slots.count);
  std::vector<double> sums(static_cast<size_t>(p.channels * slots.count));
  for (int64_t first = 0; first < all; first += p.channels) {
    const int64_t channels = std::min(p.channels, all - first);
    std::vector<int64_t> counts(static_cast<size_t>(slots.count), 0);
    std::fill(sums.begin(), sums.end(), 0.0);
    each_piece(p, g, [&](const Piece& piece) {
      build(labels, image, g, slots, piece, weights, counts);
      pool(read_image(features), image, first, channels, weights.view(), sums.data());
    });
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

// gradient[c] = sum over the classes of grad[s,c] * weights[slot of s] / (count + eps). grad: [B,S,C]
// float32; gradient: [B,C,h,w], contiguous
void backward_image(const Tensor& grad, const Tensor& labels, int64_t image, const Geometry& g,
                    const Slots& slots, double eps, Float kind, void* gradient) {
  const int64_t channels = grad.size(2);
  const Plan p = plan(channels, g.height, g.width, slots.count);
  Weights weights(p, slots.count);
  std::vector<int64_t> counts(static_cast<size_t>(slots.count), 0);
  each_piece(p, g, [&](const Piece& piece) { build(labels, image, g, slots, piece, weights, counts); });
  const std::vector<double> scale = scales(counts, eps);
  std::vector<int64_t> unused(static_cast<size_t>(slots.count), 0);
  const float* from = static_cast<const float*>(grad.const_data_ptr()) + image * grad.stride(0);
  const Kernels& kernel = kernels();
  const bool whole = p.rows == g.height && p.columns == g.width;  // its weights are there
  each_piece(p, g, [&](const Piece& piece) {
    if (!whole) build(labels, image, g, slots, piece, weights, unused);
    const Crew crew(channels, scattering_bytes(slots.count), grain(piece.pixels()), kPoolCrewBytes);
    const auto totals = crew.each<double>(slots.count);
    const auto factors = crew.each<float>(slots.count);
    crew.run([&](int64_t thread, int64_t begin, int64_t end) {
      double* own = totals[thread];
      float* factor = factors[thread];
      for (int64_t c = begin; c < end; ++c) {
        std::fill(own, own + slots.count, 0.0);
        for (size_t s = 0; s < slots.of_column.size(); ++s) {
          const int32_t slot = slots.of_column[s];
          if (slot < 0) continue;
          own[slot] += from[static_cast<int64_t>(s) * grad.stride(1) + c * grad.stride(2)] * scale[slot];
        }
        for (int64_t slot = 0; slot < slots.count; ++slot) factor[slot] = static_cast<float>(own[slot]);
        kernel.scatter(factor, weights.view(), g.width, kind, gradient,
                       (image * channels + c) * g.height * g.width);
      }
    });
  });
}

// Raises for a class below -1.
void check_values(const char* op, const Tensor& classes) {
  for (int64_t b = 0; b < classes.size(0); ++b) read_classes(op, classes, b);
}

// features: [B,C,h,w] float32, bfloat16 or float16, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// prototypes: [B,S,C] float32
Tensor forward(const Tensor& features, const Tensor& labels, const Tensor& classes, double eps) {
  check_forward(features, labels, classes, Place::cpu);
  check_values(kForward, classes);
  const int64_t images = features.size(0);
  const Geometry g{features.size(2), features.size(3), labels.size(1), labels.size(2)};

  const std::array<int64_t, 3> size{images, classes.size(1), features.size(1)};
  Tensor prototypes = torch::stable::new_zeros(features, {size.data(), size.size()}, ScalarType::Float);
  if (prototypes.numel() == 0 || labels.numel() == 0) return prototypes;
  float* out = static_cast<float*>(prototypes.mutable_data_ptr());
  for (int64_t b = 0; b < images; ++b) {
    const Slots slots(read_classes(kForward, classes, b));
    if (slots.count > 0) forward_image(features, labels, b, g, slots, eps, out);
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
  check_backward(grad, labels, classes, h, w, dtype, Place::cpu);
  check_values(kBackward, classes);
  const int64_t images = grad.size(0), channels = grad.size(2);
  const Geometry g{h, w, labels.size(1), labels.size(2)};

  const std::array<int64_t, 4> size{images, channels, h, w};
  const torch::headeronly::IntHeaderOnlyArrayRef shape(size.data(), size.size());
  if (grad.numel() == 0 || labels.numel() == 0) return torch::stable::new_zeros(grad, shape, dtype);
  Tensor gradient = torch::stable::new_empty(grad, shape, dtype);
  void* out = gradient.mutable_data_ptr();
  for (int64_t b = 0; b < images; ++b) {
    const Slots slots(read_classes(kBackward, classes, b));
    backward_image(grad, labels, b, g, slots, eps, float_kind(dtype), out);
  }
  return gradient;
}

}  // namespace
}  // namespace cisc::masked_average_pool

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::masked_average_pool::kSchema);
  m.def(cisc::masked_average_pool::kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("masked_average_pool", TORCH_BOX(&cisc::masked_average_pool::forward));
  m.impl("masked_average_pool_backward", TORCH_BOX(&cisc::masked_average_pool::backward));
}
