// What cross_similarity and its backward are called with.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cross_similarity.h"

namespace cisc::cross_similarity {

constexpr const char *kForward = "cross_similarity", *kBackward = "cross_similarity_backward";
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostSide = 1LL << 30, kMostPixels = (1LL << 31) - 512;  // a tile ends within int32
constexpr double kLn2 = 0.69314718055994531;

using MaybeTensor = std::optional<Tensor>;

// What both schemas name after their own tensors.
#define CISC_PAIR_ARGUMENTS                                                    \
  "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? " \
  "query_labels, str reduction, int k, float temperature, int ignore_index, float eps, bool rounded"

constexpr const char* kSchema = "cross_similarity(" CISC_PAIR_ARGUMENTS
                                ", bool return_index) -> (Tensor similarity, Tensor index, Tensor saved)";
constexpr const char* kBackwardSchema =
    "cross_similarity_backward(Tensor grad, Tensor similarity, Tensor index, Tensor "
    "saved, " CISC_PAIR_ARGUMENTS ", bool need_query, bool need_guide) -> (Tensor, Tensor)";

struct Settings {
  Reduction reduction;
  int64_t k;
  double temperature;
  int64_t ignore_index;
  double eps;
  bool rounded;  // unit vectors of float32 may be rounded to float16

  // log2(e) / temperature: finite for the smallest, where the best cosine takes all; for the largest, where
  // all weights are 1, such that what stands for no cosine keeps a weight of 0.
  float steepness() const { return static_cast<float>(std::clamp(1.0 / (kLn2 * temperature), 1e-12, 1e37)); }
};

inline Reduction reduction_of(const char* op, const std::string& name) {
  Reduction found{};
  if (find_reduction(name, &found)) return found;
  fail(op, "reduction must be max, topk, softmax or mean, got ", name);
}

// What both directions are given.
struct Inputs {
  const Tensor &query, &guide, &guide_labels;
  const MaybeTensor &classes, &query_labels;
  Settings settings;
  const char* op;

  int64_t batch() const { return query.size(0); }
  int64_t channels() const { return query.size(1); }
  int64_t query_pixels() const { return query.size(2) * query.size(3); }
  int64_t guide_pixels() const { return guide.size(2) * guide.size(3); }
  int64_t slots() const { return classes ? classes->size(1) : 1; }
  int64_t winners() const { return std::max<int64_t>(std::min(settings.k, guide_pixels()), 1); }
  std::vector<int64_t> shape() const { return {batch(), slots(), query.size(2), query.size(3)}; }
};

inline void check_image(const char* op, const char* name, const Tensor& image, const char* shape,
                        Place place) {
  check_rank(op, name, image, 4, shape);
  check_features(op, name, image.scalar_type());
  check_place(op, name, image, place);
  const int64_t h = image.size(2), w = image.size(3);
  check(h <= kMostSide && w <= kMostSide && h * w <= kMostPixels, op, name, " must have at most ",
        kMostPixels, " pixels, got ", h, " x ", w);
}

inline void check_pair_labels(const char* op, const char* name, const Tensor& labels, const Tensor& image,
                              Place place) {
  check_labels(op, labels, name, place);
  check_size(op, name, labels, 0, image.size(0), "[B,H,W]");
  check(labels.size(1) <= kMostSide && labels.size(2) <= kMostSide, op, name, " must have sides of at most ",
        kMostSide, " pixels, got ", labels.size(1), " x ", labels.size(2));
  check(labels.size(1) * labels.size(2) > 0 || image.size(2) * image.size(3) == 0, op, name,
        " must have at least one pixel");
}

inline void check_inputs(const Inputs& in, Place place) {
  const char* op = in.op;
  check_image(op, "query", in.query, "[B,C,h,w]", place);
  check_image(op, "guide", in.guide, "[B,C,h',w']", place);
  check_size(op, "guide", in.guide, 0, in.batch(), "[B,C,h',w']");
  check_size(op, "guide", in.guide, 1, in.channels(), "[B,C,h',w']");
  check_pair_labels(op, "guide_labels", in.guide_labels, in.guide, place);
  check(in.classes.has_value() != in.query_labels.has_value(), op,
        "exactly one of classes and query_labels must be given");
  if (in.classes) {
    check_classes(op, *in.classes, place);
    check_size(op, "classes", *in.classes, 0, in.batch(), "[B,S]");
  }
  if (in.query_labels) check_pair_labels(op, "query_labels", *in.query_labels, in.query, place);
  check(in.settings.k > 0, op, "k must be at least 1, got ", in.settings.k);
  const double temperature = in.settings.temperature;
  check(temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max(),
        op, "temperature must be from 1.17549e-38 to 3.40282e+38, got ", temperature);
  check(in.settings.eps > 0.0, op, "eps must be above 0, got ", in.settings.eps);
}

inline void check_saved(const char* name, const Tensor& tensor, const std::vector<int64_t>& size,
                        ScalarType dtype, Place place) {
  check_rank(kBackward, name, tensor, static_cast<int64_t>(size.size()), "as forward gave it");
  for (size_t d = 0; d < size.size(); ++d) {
    check_size(kBackward, name, tensor, static_cast<int64_t>(d), size[d], "as forward gave it");
  }
  check(tensor.scalar_type() == dtype && tensor.is_contiguous(), kBackward, name, " must be contiguous ",
        torch::headeronly::toString(dtype), " as forward gave it");
  check_place(kBackward, name, tensor, place);
}

// grad: [B,S,h,w]
// similarity, index, saved: what forward has given
inline void check_backward(const Inputs& in, const Tensor& grad, const Tensor& similarity,
                           const Tensor& index, const Tensor& saved, Place place) {
  check_inputs(in, place);
  const std::vector<int64_t> shape = in.shape();
  check_grad(kBackward, grad, {in.batch(), in.slots(), in.query.size(2), in.query.size(3)}, "[B,S,h,w]",
             place);
  if (in.settings.reduction == Reduction::max) {
    check_saved("index", index, shape, ScalarType::Long, place);
  } else if (in.settings.reduction == Reduction::topk) {
    std::vector<int64_t> of_saved(shape);
    of_saved.push_back(in.winners());
    check_saved("saved", saved, of_saved, ScalarType::Long, place);
  } else if (in.settings.reduction == Reduction::softmax) {
    check_saved("similarity", similarity, shape, ScalarType::Float, place);
    check_saved("saved", saved, shape, ScalarType::Float, place);
  }
}

// What forward gives, of what nothing is compared with.
struct Results {
  Tensor similarity, index, saved;
  bool indexed;

  static Results of(const Inputs& in, bool return_index) {
    const bool topk = in.settings.reduction == Reduction::topk;
    const bool indexed = return_index || in.settings.reduction == Reduction::max;
    const std::vector<int64_t> shape = in.shape(), none{0};
    std::vector<int64_t> of_saved = in.settings.reduction == Reduction::softmax ? shape : none;
    if (topk) {
      of_saved = shape;
      of_saved.push_back(in.winners());
    }
    const auto filled = [&](const std::vector<int64_t>& size, ScalarType dtype, double value) {
      Tensor tensor = torch::stable::new_empty(in.query, {size.data(), size.size()}, dtype);
      return torch::stable::fill_(tensor, value);
    };
    return {filled(shape, ScalarType::Float, 0.0), filled(indexed ? shape : none, ScalarType::Long, -1.0),
            filled(of_saved, topk ? ScalarType::Long : ScalarType::Float, topk ? -1.0 : -INFINITY), indexed};
  }
};

// winners: `count` of them, on the CPU
inline void check_winners(const Inputs& in, const int64_t* winners, int64_t count) {
  const auto [least, most] = std::minmax_element(winners, winners + count);
  check(count == 0 || (*least >= -1 && *most < in.guide_pixels()), kBackward,
        "winners must be -1 or pixels of the guide");
}

}  // namespace cisc::cross_similarity
