// Both sides of some images of cross_similarity, made ready for its kernels.
#pragma once

#include <algorithm>
#include <optional>

#include "cross_similarity_bytes.cuh"
#include "cross_similarity_rows.cuh"
#include "tensor_cores.cuh"

namespace cisc::cross_similarity {
namespace {

// How both sides are packed for tensor cores.
struct Packing {
  Form form;
  Float kind;  // of the rows' numbers
  RowShape shape;
  bool finite;         // NaN is in the scales alone: see pack_kernel
  bool bytes = false;  // as int8, too

  static Packing of(const Inputs& in, bool finite = false) {
    const Float query = float_kind(in.query.scalar_type()), guide = float_kind(in.guide.scalar_type());
    const bool alike = query == guide && query != Float::f32;
    const Form form = alike ? Form::exact : in.settings.rounded ? Form::rounded : Form::split;
    return {form, alike ? query : Float::f16, RowShape::of(in.channels(), form), finite};
  }

  // Chunks of a row of int8.
  int32_t byte_chunks() const { return (shape.chunks + 1) / 2; }

  Matrix matrix() const { return kind == Float::bf16 ? Matrix::bf16 : Matrix::f16; }
};

// A thread has a pixel.
__global__ void __launch_bounds__(kThreads, 4) measure_kernel(Side side, int64_t images, double eps) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= images * side.pixels) return;
  const int64_t offset = side.offset(side.first + number / side.pixels, number % side.pixels);
  double parts[kParts] = {};  // in the order in which pack_kernel adds, for the same bits
  for (int64_t c = 0; c < side.channels; c += kDepth) {
    float values[kDepth];
    read_channels(side.image, offset + c * side.image.stride_c, 1, side.channels - c, values);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      parts[i % kParts] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
  }
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) squares += parts[i];
  const Length length = inverse_length(::sqrt(squares), eps);
  side.scale[number] = length.scale;
  side.rest[number] = length.rest;
  side.low[number] = length.low;
}

// Whether labels other than bytes may share a bin.
inline bool wide_labels(const Inputs& in) {
  return in.guide_labels.scalar_type() != ScalarType::Byte ||
         (in.query_labels && in.query_labels->scalar_type() != ScalarType::Byte);
}

// Host: workspace of a few images at a time, both sides measured and sorted, and packed where asked for.
class Pairs {
 public:
  Pairs(const Gpu& gpu, const Inputs& in, std::optional<Packing> packing = {})
      : gpu_(gpu),
        in_(in),
        packing_(packing),
        query_(side_of(in.query, in.query_labels)),
        guide_(side_of(in.guide, in.guide_labels)) {
    sizes_ = {in.batch(),
              query_.pixels,
              guide_.pixels,
              own(),
              packing_ ? packing_->shape.width() : 0,
              packing_ && packing_->bytes ? byte_width() : 0};
    at_once_ = sizes_.at_once();
    workspace_ = device_empty(in.query, {sizes_.words(at_once_)}, ScalarType::Int);
    if (packing_) packed_ = device_empty(in.query, {sizes_.numbers(at_once_)}, ScalarType::Half);
    if (packing_ && packing_->bytes)
      bytes_ = device_empty(in.query, {sizes_.bytes(at_once_)}, ScalarType::Byte);
    classes_ = {own() ? Classes{} : classes_of(*in.classes), own()};
  }

  const Side& query() const { return query_; }
  const Side& guide() const { return guide_; }
  const SlotClasses& classes() const { return classes_; }
  const Rows& query_rows() const { return query_rows_; }
  const Rows& guide_rows() const { return guide_rows_; }
  const Bytes& query_bytes() const { return query_bytes_; }
  const Bytes& guide_bytes() const { return guide_bytes_; }

  // f(images), with the sides of so many ready
  template <typename Function>
  void each(const Function& f) {
    for (int64_t b = 0; b < in_.batch(); b += at_once_) {
      const int64_t images = std::min(at_once_, in_.batch() - b);
      prepare(b, images);
      f(images);
    }
  }

 private:
  bool own() const { return !in_.classes.has_value(); }

  static Side side_of(const Tensor& features, const MaybeTensor& labels) {
    Side side{};
    side.image = read_image(features);
    side.channels = features.size(1);
    side.height = features.size(2);
    side.width = std::max<int64_t>(features.size(3), 1);
    side.pixels = features.size(2) * features.size(3);
    if (!labels) return side;
    side.labels = read_labels(*labels);
    side.label_height = labels->size(1);
    side.label_width = labels->size(2);
    return side;
  }

  int64_t byte_width() const { return static_cast<int64_t>(packing_->byte_chunks()) * kChunkBytes; }

  void quantise(const Side& side, const Rows& rows, int64_t images, const Bytes& bytes) const {
    gpu_.launch(quantise_kernel, ceil_div(images * side.pixels * kWarp, kQuantiseThreads), kQuantiseThreads,
                0, side, images, packing_->form, packing_->kind, packing_->shape, rows, bytes);
  }

  void prepare(int64_t b, int64_t images) {
    int32_t* next = data_of<int32_t>(workspace_);
    uint16_t* packed = packing_ ? data_of<uint16_t>(*packed_) : nullptr;
    const auto take = [&](int64_t count) {
      int32_t* taken = next;
      next += count;
      return taken;
    };
    const auto ready = [&](Side& side, Rows& rows, bool sorted) {
      side.first = b;
      const int64_t pixels = images * side.pixels;
      side.scale = reinterpret_cast<float*>(take(pixels));
      side.rest = reinterpret_cast<float*>(take(pixels));
      side.low = reinterpret_cast<float*>(take(pixels));
      if (sorted) {
        side.order = take(pixels);
        side.starts = take(images * (kBins + 1));
        int32_t* counts = take(images * class_sort::chunks_of(side.pixels) * kBins);
        const LabelBins bins{side, &side == &query_, in_.settings.ignore_index};
        class_sort::sort_items(gpu_, bins, images, side.pixels, counts, side.order, side.starts);
      }
      // Packing measures what is sorted; of ignored pixels backward asks whether they are finite.
      if (!packing_ || (packing_->finite && &side == &query_ && sorted)) {
        gpu_.launch(measure_kernel, ceil_div(pixels, kThreads), kThreads, 0, side, images, in_.settings.eps);
      }
      if (!packing_) return;
      rows = {packed, reinterpret_cast<float*>(take(pixels + kScalePad))};
      packed += pixels * packing_->shape.width();
      pack_rows(gpu_, side, images, packing_->form, packing_->shape, packing_->finite, in_.settings.eps,
                rows);
    };
    ready(query_, query_rows_, own());
    ready(guide_, guide_rows_, true);
    if (!bytes_) return;
    const int64_t width = byte_width();
    auto* rows = data_of<int8_t>(*bytes_);
    auto* steps = reinterpret_cast<Step*>(rows + images * (query_.pixels + guide_.pixels) * width);
    query_bytes_ = {rows, steps, width};
    guide_bytes_ = {rows + images * query_.pixels * width, steps + images * query_.pixels + kScalePad, width};
    quantise(query_, query_rows_, images, query_bytes_);
    quantise(guide_, guide_rows_, images, guide_bytes_);
  }

  const Gpu& gpu_;
  const Inputs& in_;
  std::optional<Packing> packing_;
  Side query_, guide_;
  Rows query_rows_{}, guide_rows_{};
  Bytes query_bytes_{}, guide_bytes_{};
  SlotClasses classes_{};
  PairSizes sizes_{};
  int64_t at_once_ = 1;
  Tensor workspace_;
  std::optional<Tensor> packed_, bytes_;
};

}  // namespace
}  // namespace cisc::cross_similarity
