// A query image and its guide as cross_similarity takes them: sides sorted by class, sums.
#pragma once

#include <vector>

#include "cross_similarity_arguments.h"
#include "cross_similarity_sweep.h"

namespace cisc::cross_similarity {

inline const Kernels& kernels() { return CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16); }

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
