// A query image and its guide as cross_similarity takes them: arguments, sides sorted by class, sums.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cross_similarity.h"
#include "cross_similarity_sweep.h"

namespace cisc::cross_similarity {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostSide = 1LL << 30, kMostPixels = (1LL << 31) - 64;  // positions are int32
constexpr double kLn2 = 0.69314718055994531;

using MaybeTensor = std::optional<Tensor>;

// What both schemas name after their own tensors.
#define CISC_PAIR_ARGUMENTS                                                    \
  "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? " \
  "query_labels, str reduction, int k, float temperature, int ignore_index, float eps"

inline const Kernels& kernels() { return CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16); }

struct Settings {
  Reduction reduction;
  int64_t k;
  double temperature;
  int64_t ignore_index;
  double eps;

  // log2(e) / temperature, finite for the smallest temperature too, where the best cosine takes all.
  float steepness() const { return static_cast<float>(std::min(1.0 / (kLn2 * temperature), 1e37)); }
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
};

inline void check_image(const char* op, const char* name, const Tensor& image, const char* shape) {
  check_rank(op, name, image, 4, shape);
  check_features(op, name, image.scalar_type());
  check_cpu(op, name, image);
  const int64_t h = image.size(2), w = image.size(3);
  check(h <= kMostSide && w <= kMostSide && h * w <= kMostPixels, op, name, " must have at most ",
        kMostPixels, " pixels, got ", h, " x ", w);
}

inline void check_pair_labels(const char* op, const char* name, const Tensor& labels, const Tensor& image) {
  check_labels(op, labels, name);
  check_size(op, name, labels, 0, image.size(0), "[B,H,W]");
  check(labels.size(1) <= kMostSide && labels.size(2) <= kMostSide, op, name, " must have sides of at most ",
        kMostSide, " pixels, got ", labels.size(1), " x ", labels.size(2));
  check(labels.size(1) * labels.size(2) > 0 || image.size(2) * image.size(3) == 0, op, name,
        " must have at least one pixel");
}

inline void check_inputs(const Inputs& in) {
  const char* op = in.op;
  check_image(op, "query", in.query, "[B,C,h,w]");
  check_image(op, "guide", in.guide, "[B,C,h',w']");
  check_size(op, "guide", in.guide, 0, in.batch(), "[B,C,h',w']");
  check_size(op, "guide", in.guide, 1, in.channels(), "[B,C,h',w']");
  check_pair_labels(op, "guide_labels", in.guide_labels, in.guide);
  check(in.classes.has_value() != in.query_labels.has_value(), op,
        "exactly one of classes and query_labels must be given");
  if (in.classes) {
    check_classes(op, *in.classes);
    check_size(op, "classes", *in.classes, 0, in.batch(), "[B,S]");
  }
  if (in.query_labels) check_pair_labels(op, "query_labels", *in.query_labels, in.query);
  check(in.settings.k > 0, op, "k must be at least 1, got ", in.settings.k);
  check(in.settings.temperature >= std::numeric_limits<float>::min(), op,
        "temperature must be at least 1.17549e-38, got ", in.settings.temperature);
  check(in.settings.eps > 0.0, op, "eps must be above 0, got ", in.settings.eps);
}

// Labels of two images that may be equal, without the one to ignore, as numbers.
struct OwnLabels {
  std::vector<int64_t> values;  // ascending; empty where all are bytes
  int64_t ignore_index;

  int64_t slots() const { return values.empty() ? 256 : static_cast<int64_t>(values.size()); }

  int32_t operator()(int64_t label) const {
    if (label == ignore_index) return -1;
    if (values.empty()) return static_cast<int32_t>(label);
    const auto found = std::lower_bound(values.begin(), values.end(), label);
    return found != values.end() && *found == label ? static_cast<int32_t>(found - values.begin()) : -1;
  }
};

// A query image and its guide.
struct Pair {
  const Inputs& in;
  int64_t b;
  Side query, guide;
  std::vector<std::vector<int64_t>> columns;  // [slots] of the output; in own-label mode one for all

  Pair(const Inputs& inputs, int64_t image)
      : in(inputs),
        b(image),
        query(inputs.query, image, inputs.settings.eps, kernels()),
        guide(inputs.guide, image, inputs.settings.eps, kernels()) {
    in.classes ? by_classes() : by_own_labels();
  }

  template <typename SlotOf>
  std::vector<int32_t> codes(const Tensor& labels, const Tensor& features, const SlotOf& slot_of) const {
    return codes_of(read_labels(labels), b, labels.size(1), labels.size(2), features.size(2),
                    features.size(3), slot_of);
  }

  void by_classes() {
    const Slots slots(read_classes(in.op, *in.classes, b));
    columns.resize(static_cast<size_t>(slots.count));
    for (size_t s = 0; s < slots.of_column.size(); ++s) {
      if (slots.of_column[s] >= 0)
        columns[static_cast<size_t>(slots.of_column[s])].push_back(static_cast<int64_t>(s));
    }
    const Slots::View view = slots.view();
    const auto of = codes(in.guide_labels, in.guide, [&](int64_t label) { return view.find(label); });
    guide.sorted = sort_by_class(of, slots.count, [&](int64_t pixel) { return guide.spoilt(pixel); });
    query.sorted = all_pixels(query.pixels.pixels);
  }

  void by_own_labels() {
    OwnLabels own{{}, in.settings.ignore_index};
    const Tensor& labels = *in.query_labels;
    if (labels.scalar_type() != ScalarType::Byte || in.guide_labels.scalar_type() != ScalarType::Byte) {
      codes(in.guide_labels, in.guide, [&](int64_t label) {
        own.values.push_back(label);
        return 0;
      });
      std::sort(own.values.begin(), own.values.end());
      own.values.erase(std::unique(own.values.begin(), own.values.end()), own.values.end());
      if (own.values.empty()) own.values.push_back(own.ignore_index);  // no guide pixel
    }
    columns = {{0}};
    guide.sorted = sort_by_class(codes(in.guide_labels, in.guide, own), own.slots(),
                                 [&](int64_t pixel) { return guide.spoilt(pixel); });
    query.sorted = sort_by_class(codes(labels, in.query, own), own.slots(), [](int64_t) { return false; });
  }

  const std::vector<int64_t>& columns_of(const Group& group) const {
    return columns[in.classes ? static_cast<size_t>(group.slot) : 0];
  }

  // The query's pixels that are compared with a group of the guide.
  Positions compared_with(const Group& group) const {
    if (in.classes) return {nullptr, 0, query.pixels.pixels};
    const Group* own = query.sorted.find(group.slot);
    if (own == nullptr) return {nullptr, 0, 0};
    return {query.sorted.data(), own->begin, own->count};
  }

  // Place of a query pixel in a tensor [B,S,h,w].
  int64_t place(int64_t column, int64_t pixel) const {
    return (b * in.slots() + column) * query.pixels.pixels + pixel;
  }
};

// Where both hold bfloat16 and there is an instruction for it.
inline bool in_pairs(const Inputs& in) {
  return isa() == Isa::avx512_bf16 && in.query.scalar_type() == ScalarType::BFloat16 &&
         in.guide.scalar_type() == ScalarType::BFloat16;
}

inline Problem problem_of(const Inputs& in) {
  return {shape_of(isa()), in.channels(), in.query_pixels(),     in.guide_pixels(),
          in.slots(),      in.winners(),  in.settings.reduction, in_pairs(in)};
}

// Sums of weighted vectors of an image, one for each segment: to [channels,segments]
inline void sum_segments(const Side& side, const Segments& segments, float* to) {
  const int64_t channels = side.pixels.channels, pixels = side.pixels.pixels;
  const Crew crew(channels, 4 * pixels, 1, kThreadsBytes);
  const auto rows = crew.each<float>(pixels);
  crew.share(channels, [&](int64_t thread, int64_t c) {
    kernels().segment_sums(side.pixels, c, segments, rows[thread], to + c * segments.count);
  });
}

// Pixels of an image in segments, with weights.
struct Lists {
  std::vector<int64_t> start{0};
  std::vector<int32_t> pixel;
  std::vector<float> weight;

  Lists(int64_t segments, int64_t entries) {
    start.reserve(static_cast<size_t>(segments + 1));
    pixel.reserve(static_cast<size_t>(entries));
    weight.reserve(static_cast<size_t>(entries));
  }

  void add(int64_t at, float by) {
    pixel.push_back(static_cast<int32_t>(at));
    weight.push_back(by);
  }

  void end() { start.push_back(static_cast<int64_t>(pixel.size())); }

  Segments segments() const {
    return {static_cast<int64_t>(start.size()) - 1, start.data(), pixel.data(), weight.data()};
  }
};

// Mean unit vectors of the guide's groups, packed as a streamed side.
struct Means {
  int64_t panel, channels;
  std::vector<float> data;  // [panels,channels,panel]

  explicit Means(const Pair& pair) : panel(shape_of(isa()).panel), channels(pair.guide.pixels.channels) {
    const ByClass& guide = pair.guide.sorted;
    const auto groups = static_cast<int64_t>(guide.groups.size());
    Lists lists(groups, pair.guide.pixels.pixels);
    for (const Group& group : guide.groups) {
      for (int64_t i = group.begin; i < group.begin + group.count + group.spoilt; ++i) {
        lists.add(guide.pixel(i), pair.guide.inverse_norm(guide.pixel(i)));
      }
      lists.end();
    }
    std::vector<float> sums(static_cast<size_t>(channels * groups));
    sum_segments(pair.guide, lists.segments(), sums.data());
    data.resize(static_cast<size_t>(ceil_div(groups, panel) * panel * channels));
    for (int64_t g = 0; g < groups; ++g) {
      const Group& group = guide.groups[static_cast<size_t>(g)];
      const auto members = static_cast<float>(group.count + group.spoilt);
      for (int64_t c = 0; c < channels; ++c) {
        of(g)[c * panel] = sums[static_cast<size_t>(c * groups + g)] / members;
      }
    }
  }

  // Channels of a group's mean, `panel` apart.
  float* of(int64_t group) { return data.data() + group / panel * panel * channels + group % panel; }
  const float* of(int64_t group) const { return const_cast<Means*>(this)->of(group); }
};

// f(thread's workspace of `floats`, tile's pixels, tile's group) for the tiles of a side
template <typename Function>
void each_tile(const ByClass& sorted, int64_t floats, const Function& f) {
  const int64_t width = shape_of(isa()).tile;
  const Cut tiles(sorted, width);
  const Crew crew(tiles.count(), 4 * floats, 1, kThreadsBytes);
  const auto workspaces = crew.each<float>(floats);
  crew.share(tiles.count(), [&](int64_t thread, int64_t tile) {
    f(workspaces[thread], positions_of(sorted, tiles, tile),
      sorted.groups[static_cast<size_t>(tiles.group(tile))]);
  });
}

}  // namespace cisc::cross_similarity
