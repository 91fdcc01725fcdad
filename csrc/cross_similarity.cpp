// cross_similarity: cosines of query pixels with the guide's pixels of a class, reduced while they are in
// registers; their matrix does not exist, forward or backward.

#include "cross_similarity.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "cross_similarity_kernel.h"
#include "cross_similarity_sweep.h"

namespace cisc::cross_similarity {

extern const Kernels kPortable = kKernels;

namespace {

constexpr const char* kForward = "cross_similarity";
constexpr const char* kBackward = "cross_similarity_backward";
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostSide = 1LL << 30, kMostPixels = (1LL << 31) - 64;  // positions are int32
constexpr double kLn2 = 0.69314718055994531;

using MaybeTensor = std::optional<Tensor>;

const Kernels& kernels() { return CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16); }

struct Settings {
  Reduction reduction;
  int64_t k;
  double temperature;
  int64_t ignore_index;
  double eps;

  // log2(e) / temperature, finite for the smallest temperature too, where the best cosine takes all.
  float steepness() const { return static_cast<float>(std::min(1.0 / (kLn2 * temperature), 1e37)); }
};

Reduction reduction_of(const char* op, const std::string& name) {
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

void check_image(const char* op, const char* name, const Tensor& image, const char* shape) {
  check_rank(op, name, image, 4, shape);
  check_features(op, name, image.scalar_type());
  check_cpu(op, name, image);
  const int64_t h = image.size(2), w = image.size(3);
  check(h <= kMostSide && w <= kMostSide && h * w <= kMostPixels, op, name, " must have at most ",
        kMostPixels, " pixels, got ", h, " x ", w);
}

void check_pair_labels(const char* op, const char* name, const Tensor& labels, const Tensor& image) {
  check_labels(op, labels, name);
  check_size(op, name, labels, 0, image.size(0), "[B,H,W]");
  check(labels.size(1) <= kMostSide && labels.size(2) <= kMostSide, op, name, " must have sides of at most ",
        kMostSide, " pixels, got ", labels.size(1), " x ", labels.size(2));
  check(labels.size(1) * labels.size(2) > 0 || image.size(2) * image.size(3) == 0, op, name,
        " must have at least one pixel");
}

void check_inputs(const Inputs& in) {
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
bool in_pairs(const Inputs& in) {
  return isa() == Isa::avx512_bf16 && in.query.scalar_type() == ScalarType::BFloat16 &&
         in.guide.scalar_type() == ScalarType::BFloat16;
}

Problem problem_of(const Inputs& in) {
  return {shape_of(isa()), in.channels(), in.query_pixels(),     in.guide_pixels(),
          in.slots(),      in.winners(),  in.settings.reduction, in_pairs(in)};
}

// Results of forward, contiguous.
struct Outputs {
  float* similarity;  // [B,S,h,w]
  int64_t* index;     // [B,S,h,w], or null
  int64_t* winners;   // [B,S,h,w,k] of "topk"
  float* log_totals;  // [B,S,h,w] of "softmax"
};

// What the tiles have come to, written to the outputs.
class Writer {
 public:
  Writer(const Pair& pair, const Outputs& out, Reduction reduction)
      : pair_(pair), out_(out), reduction_(reduction), k_(pair.in.winners()) {}

  // Candidates of "topk" of a query pixel while the guide's group passes: where the winners will be.
  void* heap(const Group& group, int64_t pixel) const {
    return out_.winners + pair_.place(pair_.columns_of(group)[0], pixel) * k_;
  }

  // state: [fields,tile]
  void tile(const Group& group, const Positions& held, const float* state, int64_t width) const {
    for (int64_t i = 0; i < held.n; ++i) {
      const auto field = [&](Field f) { return state[f * width + i]; };
      Result r;
      if (reduction_ == Reduction::topk) {
        r = mean_of_winners(group, held[i]);
      } else if (out_.index != nullptr) {
        const float position = field(kIndex);
        r.index = pair_.guide.sorted.pixel(static_cast<int32_t>(float_to_bits(position)));
      }
      if (reduction_ == Reduction::max) r.value = field(kBest);
      if (reduction_ == Reduction::softmax) {
        const double total = static_cast<double>(field(kTotal)) - static_cast<double>(field(kTotalLost));
        const double weighted =
            static_cast<double>(field(kWeighted)) - static_cast<double>(field(kWeightedLost));
        r.value = static_cast<float>(weighted / total);
        const double top = static_cast<double>(field(kTop)) - static_cast<double>(r.value);
        r.log_total = static_cast<float>(std::log2(total) + top * pair_.in.settings.steepness());
      }
      finish(group, held[i], r);
    }
  }

  // Classes of which no pixel is finite: no tile has met them.
  void spoilt_groups() const {
    for (const Group& group : pair_.guide.sorted.groups) {
      if (group.count > 0) continue;
      const Positions pixels = pair_.compared_with(group);
      for (int64_t i = 0; i < pixels.n; ++i) finish(group, pixels[i], Result{});
    }
  }

 private:
  struct Result {
    float value = kNan;
    int64_t index = -1;
    float log_total = kNan;
  };

  Result mean_of_winners(const Group& group, int64_t pixel) const {
    const void* from = heap(group, pixel);
    const int64_t count = std::min(k_, group.count);
    Entry best = read_entry(from, 0);
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const Entry e = read_entry(from, i);
      sum += e.value;
      if (is_worse(best, e)) best = e;
    }
    return {static_cast<float>(sum / static_cast<double>(count)), pair_.guide.sorted.pixel(best.index), kNan};
  }

  // The pixels of a group whose cosines are NaN, `most` of them at most, ascending: those that are not
  // finite; with a query that is not, all. Their number.
  int64_t not_numbers(const Group& group, bool query_spoilt, int64_t most, int64_t* to) const {
    const int32_t* finite = pair_.guide.sorted.data() + group.begin;
    const int32_t *spoilt = finite + group.count, *finite_end = query_spoilt ? spoilt : finite;
    const int32_t* spoilt_end = spoilt + group.spoilt;
    int64_t count = 0;
    for (; count < most && (finite != finite_end || spoilt != spoilt_end); ++count) {
      const bool next = spoilt == spoilt_end || (finite != finite_end && *finite < *spoilt);
      to[count] = next ? *finite++ : *spoilt++;
    }
    return count;
  }

  // Turn the candidates into winners where they are; what is not a number beats all.
  void settle_winners(const Group& group, int64_t pixel, bool query_spoilt) const {
    void* entries = heap(group, pixel);
    int64_t *winners = out_.winners + pair_.place(pair_.columns_of(group)[0], pixel) * k_, ahead = 0;
    const int64_t count = std::min(k_, group.count);
    if (query_spoilt || group.spoilt > 0) {
      ahead = query_spoilt ? std::min(k_, group.count + group.spoilt) : std::min(k_, group.spoilt);
      for (int64_t n = count; n > 1; --n) {  // best first
        const Entry worst = read_entry(entries, 0);
        replace(entries, n - 1, read_entry(entries, n - 1));
        write_entry(entries, n - 1, worst);
      }
    }
    const int64_t kept = query_spoilt ? 0 : std::min(k_ - ahead, count);
    for (int64_t i = kept; i-- > 0;) {
      winners[ahead + i] = pair_.guide.sorted.pixel(read_entry(entries, i).index);
    }
    if (ahead > 0) not_numbers(group, query_spoilt, ahead, winners);
    std::fill(winners + ahead + kept, winners + k_, -1);
  }

  void finish(const Group& group, int64_t pixel, Result r) const {
    const bool query_spoilt = pair_.query.spoilt(pixel);
    if (query_spoilt || group.spoilt > 0) {
      r.value = r.log_total = kNan;
      not_numbers(group, query_spoilt, 1, &r.index);
    }
    const std::vector<int64_t>& columns = pair_.columns_of(group);
    if (reduction_ == Reduction::topk) settle_winners(group, pixel, query_spoilt);
    for (const int64_t column : columns) {
      const int64_t place = pair_.place(column, pixel);
      if (reduction_ != Reduction::mean) out_.similarity[place] = r.value;
      if (out_.index != nullptr) out_.index[place] = r.index;
      if (reduction_ == Reduction::softmax) out_.log_totals[place] = r.log_total;
      if (reduction_ == Reduction::topk && column != columns[0]) {
        const int64_t* from = out_.winners + pair_.place(columns[0], pixel) * k_;
        std::copy(from, from + k_, out_.winners + place * k_);
      }
    }
  }

  const Pair& pair_;
  const Outputs& out_;
  Reduction reduction_;
  int64_t k_;
};

// All reductions but the mean, which asks for its index.
void compare(const Pair& pair, const Outputs& out) {
  const Inputs& in = pair.in;
  const Reduction reduction = in.settings.reduction;
  const Reduction passes = reduction == Reduction::mean ? Reduction::max : reduction;
  const bool pairs = in_pairs(in), indexed = out.index != nullptr;
  const Plan plan = problem_of(in).plan(true, false, passes);
  const Writer writer(pair, out, reduction);
  const int64_t width = plan.shape.tile, words = plan.fields * width;
  Sweep sweep(pair.query, pair.guide, plan, pairs, kernels());
  const auto state = unfilled<float>(std::min(plan.held_tiles, sweep.tiles()) * words);
  for (int64_t begin = 0; begin < sweep.tiles(); begin += plan.held_tiles) {
    const int64_t end = std::min(begin + plan.held_tiles, sweep.tiles());
    const auto nothing = [](int64_t, int64_t, int64_t) {};
    sweep.run(begin, end, false, nothing, [&](Visit& v) {
      void* heaps[64] = {};
      v.run.state = state.get() + (v.tile - begin) * words;
      v.run.steepness = in.settings.steepness();
      if (passes == Reduction::topk) {
        for (int64_t i = 0; i < v.held.n; ++i) heaps[i] = writer.heap(*v.group, v.held[i]);
        v.run.heaps = heaps;
        v.run.k = in.winners();
        v.run.seen = v.row;
      }
      kernels().reduce(passes, pairs, indexed, v.run);
      if (v.ends) writer.tile(*v.group, v.held, v.run.state, width);
    });
  }
  writer.spoilt_groups();
}

// Sums of weighted vectors of an image, one for each segment: to [channels,segments]
void sum_segments(const Side& side, const Segments& segments, float* to) {
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

void compare_with_means(const Pair& pair, const Outputs& out) {
  const Means means(pair);
  const int64_t channels = means.channels, width = shape_of(isa()).tile;
  const int64_t floats = (channels + 1 + means.panel + 1) * width;
  each_tile(pair.query.sorted, floats, [&](float* packed, const Positions& held, const Group& group) {
    const auto [begin, end] = pair.guide.sorted.partners(group.slot);
    if (begin == end) return;
    float *rest = packed + std::max<int64_t>(channels, 1) * width, *values = rest + width;
    kernels().pack_tile(pair.query.pixels, held, false, packed, rest);
    for (int64_t g = begin; g < end; ++g) {
      if (g == begin || g % means.panel == 0) {
        kernels().products(packed, means.of(g / means.panel * means.panel), channels, values);
      }
      for (const int64_t column : pair.columns_of(pair.guide.sorted.groups[static_cast<size_t>(g)])) {
        for (int64_t i = 0; i < held.n; ++i) {
          const float value = values[g % means.panel * width + i];
          out.similarity[pair.place(column, held[i])] = pair.query.spoilt(held[i]) ? kNan : value;
        }
      }
    }
  });
}

// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// guide: [B,C,h',w'] float32, bfloat16 or float16, any strides
// guide_labels, query_labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64
// outputs
// similarity: [B,S,h,w] float32
// index: [B,S,h,w] int64, or [0]
// saved: winners [B,S,h,w,k] int64 of "topk"; of "softmax" [B,S,h,w] float32, log2 of the sum over j of
//     exp((cosine_j - similarity) / temperature); else [0]
std::tuple<Tensor, Tensor, Tensor> forward_op(const Tensor& query, const Tensor& guide,
                                              const Tensor& guide_labels, const MaybeTensor& classes,
                                              const MaybeTensor& query_labels, const std::string& reduction,
                                              int64_t k, double temperature, int64_t ignore_index, double eps,
                                              bool return_index) {
  const Settings settings{reduction_of(kForward, reduction), k, temperature, ignore_index, eps};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kForward};
  check_inputs(in);
  const bool topk = settings.reduction == Reduction::topk, softmax = settings.reduction == Reduction::softmax;
  const bool indexed = return_index || settings.reduction == Reduction::max;
  const std::vector<int64_t> shape{in.batch(), in.slots(), query.size(2), query.size(3)}, none{0};
  std::vector<int64_t> of_saved = softmax ? shape : none;
  if (topk) {
    of_saved = shape;
    of_saved.push_back(in.winners());
  }
  const auto filled = [&](const std::vector<int64_t>& size, ScalarType dtype, double value) {
    Tensor tensor = torch::stable::new_empty(query, {size.data(), size.size()}, dtype);
    return torch::stable::fill_(tensor, value);
  };
  Tensor similarity = filled(shape, ScalarType::Float, 0.0);
  Tensor index = filled(indexed ? shape : none, ScalarType::Long, -1.0);
  Tensor saved = filled(of_saved, topk ? ScalarType::Long : ScalarType::Float, topk ? -1.0 : -INFINITY);
  const Outputs out{static_cast<float*>(similarity.mutable_data_ptr()),
                    indexed ? static_cast<int64_t*>(index.mutable_data_ptr()) : nullptr,
                    topk ? static_cast<int64_t*>(saved.mutable_data_ptr()) : nullptr,
                    softmax ? static_cast<float*>(saved.mutable_data_ptr()) : nullptr};
  for (int64_t b = 0; b < in.batch(); ++b) {
    const Pair pair(in, b);
    if (settings.reduction == Reduction::mean) compare_with_means(pair, out);
    if (settings.reduction != Reduction::mean || indexed) compare(pair, out);
  }
  return {similarity, index, saved};
}

// Backward.

// grad: [B,S,h,w] float32, any strides
struct Gradient {
  const float* data;
  int64_t strides[4], width;

  float at(int64_t b, int64_t column, int64_t pixel) const {
    const int64_t offset = b * strides[0] + column * strides[1];
    if (strides[2] == width * strides[3]) return data[offset + pixel * strides[3]];
    return data[offset + pixel / width * strides[2] + pixel % width * strides[3]];
  }

  // Of all columns of a group.
  float of(const Pair& pair, const Group& group, int64_t pixel) const {
    float sum = 0.0f;
    for (const int64_t column : pair.columns_of(group)) sum += at(pair.b, column, pixel);
    return sum;
  }
};

// The gradient of one pixel becomes NaN.
void spoil_pixel(const Side& side, int64_t pixel, const Image<void*>& grad) {
  const int64_t y = pixel / side.pixels.width, x = pixel % side.pixels.width;
  const std::vector<float> nan(static_cast<size_t>(side.pixels.channels), kNan);
  write_row(grad.kind, nan.data(), grad.stride_c, side.pixels.channels, grad.data,
            y * grad.stride_y + x * grad.stride_x);
}

// Zeros in all of an image's gradient, NaN for what is not finite.
void clear(const Side& side, const Image<void*>& grad) {
  const int64_t width = side.pixels.width;
  const std::vector<float> zeros(static_cast<size_t>(width), 0.0f);
  parallel_for(0, side.pixels.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t y = 0; y < side.pixels.pixels / width; ++y) {
        write_row(grad.kind, zeros.data(), grad.stride_x, width, grad.data,
                  c * grad.stride_c + y * grad.stride_y);
      }
    }
  });
  for (int64_t pixel = 0; pixel < side.pixels.pixels; ++pixel) {
    if (side.spoilt(pixel)) spoil_pixel(side, pixel, grad);
  }
}

// A column's winners of a query pixel.
struct Winners {
  const int64_t* data;
  int64_t count;  // of a pixel

  const int64_t* of(const Pair& pair, int64_t column, int64_t pixel) const {
    return data + pair.place(column, pixel) * count;
  }
};

// f(winner, share of the gradient) for each winner of a query pixel
template <typename Function>
void each_winner(const Pair& pair, const Winners& winners, const Gradient& grad, int64_t pixel,
                 const Function& f) {
  for (int64_t s = 0; s < pair.in.slots(); ++s) {
    const int64_t* of = winners.of(pair, s, pixel);
    const int64_t found = winners.count - std::count(of, of + winners.count, int64_t{-1});
    if (found == 0) continue;
    const float share = grad.at(pair.b, s, pixel) / static_cast<float>(found);
    for (int64_t j = 0; j < winners.count; ++j) {
      if (of[j] >= 0) f(of[j], share);
    }
  }
}

// sums: [channels,n], of the pixels [first, first + n), to their gradients
void finish_pixels(const Side& side, int64_t first, int64_t n, const float* sums, const Image<void*>& grad) {
  const int64_t width = shape_of(isa()).tile;
  each_tile(all_pixels(n), (side.pixels.channels + 1) * width,
            [&](float* workspace, const Positions& held, const Group&) {
              kernels().finish(side.pixels, {nullptr, first + held.first, held.n}, sums + held.first, n, grad,
                               workspace);
            });
}

void winners_to_query(const Pair& pair, const Winners& winners, const Gradient& grad,
                      const Image<void*>& to) {
  const int64_t pixels = pair.query.pixels.pixels, of_pixel = pair.in.slots() * winners.count;
  const int64_t step = listed_pixels(pair.query.pixels.channels, of_pixel);
  const auto sums = unfilled<float>(std::min(step, pixels) * pair.query.pixels.channels);
  for (int64_t first = 0; first < pixels; first += step) {
    const int64_t n = std::min(step, pixels - first);
    Lists lists(n, n * of_pixel);
    for (int64_t i = first; i < first + n; ++i) {
      each_winner(pair, winners, grad, i, [&](int64_t winner, float share) {
        lists.add(winner, share * pair.guide.inverse_norm(winner));
      });
      lists.end();
    }
    sum_segments(pair.guide, lists.segments(), sums.get());
    finish_pixels(pair.query, first, n, sums.get(), to);
  }
}

void winners_to_guide(const Pair& pair, const Winners& winners, const Gradient& grad,
                      const Image<void*>& to) {
  const int64_t pixels = pair.guide.pixels.pixels, queries = pair.query.pixels.pixels;
  std::vector<int32_t> counts(static_cast<size_t>(pixels), 0);
  for (int64_t i = 0; i < queries; ++i) {
    each_winner(pair, winners, grad, i,
                [&](int64_t winner, float) { ++counts[static_cast<size_t>(winner)]; });
  }
  const int64_t most = summed_pixels(pair.guide.pixels.channels);
  const auto sums = unfilled<float>(std::min(most, pixels) * pair.guide.pixels.channels);
  for (int64_t first = 0; first < pixels;) {
    Lists lists(std::min(most, pixels - first), 0);
    int64_t end = first;
    for (int64_t entries = 0; end < pixels && end - first < most; ++end) {
      entries += counts[static_cast<size_t>(end)];
      if (end > first && entries > kEntries) break;
      lists.start.push_back(entries);
    }
    lists.pixel.resize(static_cast<size_t>(lists.start.back()));
    lists.weight.resize(lists.pixel.size());
    std::vector<int64_t> next(lists.start);
    for (int64_t i = 0; i < queries; ++i) {
      each_winner(pair, winners, grad, i, [&](int64_t winner, float share) {
        if (winner < first || winner >= end) return;
        const auto at = static_cast<size_t>(next[static_cast<size_t>(winner - first)]++);
        lists.pixel[at] = static_cast<int32_t>(i);
        lists.weight[at] = share * pair.query.inverse_norm(i);
      });
    }
    sum_segments(pair.query, lists.segments(), sums.get());
    finish_pixels(pair.guide, first, end - first, sums.get(), to);
    first = end;
  }
}

// What "softmax" knows of a query pixel, `stride` apart.
struct SoftmaxParameters {
  const Pair& pair;
  const Gradient& grad;
  const float *similarity, *log_totals;  // [B,S,h,w]

  void read(const Group& guide, int64_t pixel, float* to, int64_t stride) const {
    const int64_t place = pair.place(pair.columns_of(guide)[0], pixel);
    to[kGrad * stride] = grad.of(pair, guide, pixel);
    to[kValue * stride] = similarity[place];
    to[kLogTotal * stride] = log_totals[place];
  }
};

// Gradient of "softmax" to one side, which is held: the cosines are made once more.
void softmax_to(const Pair& pair, bool to_query, const SoftmaxParameters& parameters,
                const Image<void*>& to) {
  const Settings& settings = pair.in.settings;
  const Side &held = to_query ? pair.query : pair.guide, &streamed = to_query ? pair.guide : pair.query;
  const ByClass& guide = pair.guide.sorted;
  const Plan plan = problem_of(pair.in).plan(to_query, true, settings.reduction);
  const bool pairs = in_pairs(pair.in);
  const int64_t width = plan.shape.tile, panel = plan.shape.panel, channels = held.pixels.channels;
  Sweep sweep(held, streamed, plan, pairs, kernels());
  clear(held, to);
  const int64_t most = std::min(plan.held_tiles, sweep.tiles()), words = channels * width;
  const auto sums = unfilled<float>(most * words);
  const auto streamed_parameters = unfilled<float>(to_query ? 0 : plan.panels * kParameters * panel);
  for (int64_t begin = 0; begin < sweep.tiles(); begin += most) {
    const int64_t end = std::min(begin + most, sweep.tiles());
    parallel_for(0, end - begin, 1, [&](int64_t first, int64_t last) {
      std::fill(sums.get() + first * words, sums.get() + last * words, 0.0f);
    });
    const auto prepare = [&](int64_t group, int64_t first, int64_t last) {
      if (to_query) return;
      const bool own = !pair.in.classes;
      parallel_for(first, last, 16, [&](int64_t from, int64_t behind) {
        for (int64_t number = from; number < behind; ++number) {
          const Positions queries = sweep.panel(number);
          float* at = streamed_parameters.get() + (number - first) * kParameters * panel;
          std::fill(at, at + kParameters * panel, 0.0f);
          const Group* of =
              own ? guide.find(sweep.streamed_group(number).slot) : &guide.groups[static_cast<size_t>(group)];
          for (int64_t i = 0; i < queries.n && of != nullptr; ++i) {
            parameters.read(*of, queries[i], at + i, panel);
          }
        }
      });
    };
    sweep.run(begin, end, !to_query && pair.in.classes.has_value(), prepare, [&](Visit& v) {
      float* slopes = sweep.workspace(v.thread);
      float* of_held = slopes + kSlopeRows * width;
      if (to_query) {
        std::fill(of_held, of_held + kParameters * width, 0.0f);
        for (int64_t i = 0; i < v.held.n; ++i) parameters.read(*v.group, v.held[i], of_held + i, width);
        v.run.held_parameters = of_held;
      } else {
        v.run.streamed_parameters = streamed_parameters.get() + v.panel * kParameters * panel;
      }
      v.run.steepness = settings.steepness();
      v.run.inverse_temperature = static_cast<float>(1.0 / settings.temperature);
      v.run.slopes = slopes;
      v.run.sums = sums.get() + (v.tile - begin) * words;
      kernels().back(pairs, v.run);
    });
    const int64_t floats = (channels + 1) * width;
    const Crew crew(end - begin, 4 * floats, 1, kThreadsBytes);
    const auto workspaces = crew.each<float>(floats);
    crew.share(end - begin, [&](int64_t thread, int64_t i) {
      kernels().finish(held.pixels, sweep.tile(begin + i), sums.get() + i * words, width, to,
                       workspaces[thread]);
    });
  }
  // Classes of which no pixel is finite have met no tile.
  if (!to_query) return;
  for (const Group& group : guide.groups) {
    const Positions pixels = group.count > 0 ? Positions{} : pair.compared_with(group);
    for (int64_t i = 0; i < pixels.n; ++i) spoil_pixel(held, pixels[i], to);
  }
}

void mean_to_query(const Pair& pair, const Gradient& grad, const Image<void*>& to) {
  const Means means(pair);
  const int64_t channels = means.channels, width = shape_of(isa()).tile;
  clear(pair.query, to);
  const int64_t floats = (2 * channels + 1 + means.panel) * width;
  each_tile(pair.query.sorted, floats, [&](float* workspace, const Positions& held, const Group& group) {
    float *sums = workspace + (channels + 1) * width, *slopes = sums + channels * width;
    std::fill(sums, slopes + means.panel * width, 0.0f);
    const auto [begin, end] = pair.guide.sorted.partners(group.slot);
    for (int64_t g = begin; g < end;) {
      const int64_t behind = std::min(g / means.panel * means.panel + means.panel, end);
      for (int64_t row = g; row < behind; ++row) {
        const Group& of = pair.guide.sorted.groups[static_cast<size_t>(row)];
        for (int64_t i = 0; i < held.n; ++i) slopes[(row - g) * width + i] = grad.of(pair, of, held[i]);
      }
      kernels().add_products(slopes, means.of(g), behind - g, channels, sums);
      g = behind;
    }
    kernels().finish(pair.query.pixels, held, sums, width, to, workspace);
  });
}

void mean_to_guide(const Pair& pair, const Gradient& grad, const Image<void*>& to) {
  const std::vector<Group>& groups = pair.guide.sorted.groups;
  const int64_t channels = pair.guide.pixels.channels, width = shape_of(isa()).tile;
  const auto count = static_cast<int64_t>(groups.size());
  clear(pair.guide, to);
  std::vector<float> back(static_cast<size_t>(count * channels));  // [groups,channels]
  for (int64_t first = 0; first < count;) {
    int64_t end = first, entries = 0;
    while (end < count && (end == first || entries < kEntries)) {
      entries += pair.compared_with(groups[static_cast<size_t>(end++)]).n;
    }
    Lists lists(end - first, entries);
    for (int64_t g = first; g < end; ++g) {
      const Group& group = groups[static_cast<size_t>(g)];
      const Positions queries = pair.compared_with(group);
      for (int64_t i = 0; i < queries.n; ++i) {
        lists.add(queries[i], grad.of(pair, group, queries[i]) * pair.query.inverse_norm(queries[i]));
      }
      lists.end();
    }
    std::vector<float> sums(static_cast<size_t>((end - first) * channels));
    sum_segments(pair.query, lists.segments(), sums.data());
    for (int64_t g = first; g < end; ++g) {
      const Group& group = groups[static_cast<size_t>(g)];
      const auto members = static_cast<float>(group.count + group.spoilt);
      for (int64_t c = 0; c < channels; ++c) {
        back[static_cast<size_t>(g * channels + c)] =
            sums[static_cast<size_t>(c * (end - first) + g - first)] / members;
      }
    }
    first = end;
  }
  each_tile(pair.guide.sorted, (2 * channels + 1) * width,
            [&](float* workspace, const Positions& held, const Group& group) {
              float* sums = workspace + (channels + 1) * width;
              const float* of = back.data() + (&group - groups.data()) * channels;
              for (int64_t c = 0; c < channels; ++c) {
                std::fill(sums + c * width, sums + (c + 1) * width, of[c]);
              }
              kernels().finish(pair.guide.pixels, held, sums, width, to, workspace);
            });
}

void check_saved(const char* name, const Tensor& tensor, const std::vector<int64_t>& size, ScalarType dtype) {
  check_rank(kBackward, name, tensor, static_cast<int64_t>(size.size()), "as forward gave it");
  for (size_t d = 0; d < size.size(); ++d) {
    check_size(kBackward, name, tensor, static_cast<int64_t>(d), size[d], "as forward gave it");
  }
  check(tensor.scalar_type() == dtype && tensor.is_contiguous(), kBackward, name, " must be contiguous ",
        torch::headeronly::toString(dtype), " as forward gave it");
  check_cpu(kBackward, name, tensor);
}

// grad: [B,S,h,w] float32, any strides
// similarity, index, saved: what forward has given
// the others: as in `forward_op`
// outputs
// gradients of query and guide, in their dtypes and, where those are dense, their strides; [0] if not needed
std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& similarity, const Tensor& index,
                                       const Tensor& saved, const Tensor& query, const Tensor& guide,
                                       const Tensor& guide_labels, const MaybeTensor& classes,
                                       const MaybeTensor& query_labels, const std::string& reduction,
                                       int64_t k, double temperature, int64_t ignore_index, double eps,
                                       bool need_query, bool need_guide) {
  const Settings settings{reduction_of(kBackward, reduction), k, temperature, ignore_index, eps};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kBackward};
  check_inputs(in);
  const std::vector<int64_t> shape{in.batch(), in.slots(), query.size(2), query.size(3)}, none{0};
  check_rank(kBackward, "grad", grad, 4, "[B,S,h,w]");
  check_dtype(kBackward, "grad", grad.scalar_type(), {ScalarType::Float}, "float32");
  check_cpu(kBackward, "grad", grad);
  for (int64_t d = 0; d < 4; ++d) check_size(kBackward, "grad", grad, d, shape[d], "[B,S,h,w]");
  Winners winners{nullptr, 1};
  if (settings.reduction == Reduction::max) {
    check_saved("index", index, shape, ScalarType::Long);
    winners.data = static_cast<const int64_t*>(index.const_data_ptr());
  } else if (settings.reduction == Reduction::topk) {
    std::vector<int64_t> of_saved(shape);
    of_saved.push_back(in.winners());
    check_saved("saved", saved, of_saved, ScalarType::Long);
    winners = {static_cast<const int64_t*>(saved.const_data_ptr()), in.winners()};
  } else if (settings.reduction == Reduction::softmax) {
    check_saved("similarity", similarity, shape, ScalarType::Float);
    check_saved("saved", saved, shape, ScalarType::Float);
  }
  if (winners.data != nullptr) {
    const int64_t all = grad.numel() * winners.count;
    const auto [least, most] = std::minmax_element(winners.data, winners.data + all);
    check(all == 0 || (*least >= -1 && *most < in.guide_pixels()), kBackward,
          "winners must be -1 or pixels of the guide");
  }
  const Gradient gradient{static_cast<const float*>(grad.const_data_ptr()),
                          {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)},
                          query.size(3)};
  const auto result = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::empty_like(like)
                  : torch::stable::new_empty(like, {none.data(), none.size()}, like.scalar_type());
  };
  Tensor grad_query = result(query, need_query), grad_guide = result(guide, need_guide);
  need_query = need_query && query.numel() > 0;
  need_guide = need_guide && guide.numel() > 0;
  if (!need_query && !need_guide) return {grad_query, grad_guide};
  for (int64_t b = 0; b < in.batch(); ++b) {
    const Pair pair(in, b);
    const Image<void*> to_query = need_query ? Side::image_of(write_image(grad_query), b) : Image<void*>{};
    const Image<void*> to_guide = need_guide ? Side::image_of(write_image(grad_guide), b) : Image<void*>{};
    if (winners.data != nullptr) {
      if (need_query) winners_to_query(pair, winners, gradient, to_query);
      if (need_guide) winners_to_guide(pair, winners, gradient, to_guide);
    } else if (settings.reduction == Reduction::softmax) {
      const SoftmaxParameters parameters{pair, gradient,
                                         static_cast<const float*>(similarity.const_data_ptr()),
                                         static_cast<const float*>(saved.const_data_ptr())};
      if (need_query) softmax_to(pair, true, parameters, to_query);
      if (need_guide) softmax_to(pair, false, parameters, to_guide);
    } else {
      if (need_query) mean_to_query(pair, gradient, to_query);
      if (need_guide) mean_to_guide(pair, gradient, to_guide);
    }
  }
  return {grad_query, grad_guide};
}

}  // namespace
}  // namespace cisc::cross_similarity

#define CISC_ARGUMENTS                                                         \
  "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? " \
  "query_labels, str reduction, int k, float temperature, int ignore_index, float eps, "

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def("cross_similarity(" CISC_ARGUMENTS
        "bool return_index) -> (Tensor similarity, Tensor index, Tensor saved)");
  m.def(
      "cross_similarity_backward(Tensor grad, Tensor similarity, Tensor index, Tensor saved, " CISC_ARGUMENTS
      "bool need_query, bool need_guide) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("cross_similarity", TORCH_BOX(&cisc::cross_similarity::forward_op));
  m.impl("cross_similarity_backward", TORCH_BOX(&cisc::cross_similarity::backward_op));
}
