// Forward of cross_similarity: cosines of query pixels with the guide's pixels of a class, reduced while they
// are in registers.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "cross_similarity_kernel.h"
#include "cross_similarity_pair.h"

namespace cisc::cross_similarity {

extern const Kernels kPortable = kKernels;

namespace {

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
                                              bool rounded, bool return_index) {
  const Settings settings{reduction_of(kForward, reduction), k, temperature, ignore_index, eps, rounded};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kForward};
  check_inputs(in, Place::cpu);
  const bool topk = settings.reduction == Reduction::topk, softmax = settings.reduction == Reduction::softmax;
  auto [similarity, index, saved, indexed] = Results::of(in, return_index);
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

}  // namespace
}  // namespace cisc::cross_similarity

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) { m.def(cisc::cross_similarity::kSchema); }

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("cross_similarity", TORCH_BOX(&cisc::cross_similarity::forward_op));
}
