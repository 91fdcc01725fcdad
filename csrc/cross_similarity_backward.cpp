// Backward of cross_similarity: winners' gradients are sums over lists, those of "softmax" come from cosines
// that are made once more.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cross_similarity_pair.h"

namespace cisc::cross_similarity {
namespace {

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
                                       bool rounded, bool need_query, bool need_guide) {
  const Settings settings{reduction_of(kBackward, reduction), k, temperature, ignore_index, eps, rounded};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kBackward};
  check_backward(in, grad, similarity, index, saved, Place::cpu);
  Winners winners{nullptr, 1};
  if (settings.reduction == Reduction::max)
    winners.data = static_cast<const int64_t*>(index.const_data_ptr());
  if (settings.reduction == Reduction::topk) {
    winners = {static_cast<const int64_t*>(saved.const_data_ptr()), in.winners()};
  }
  if (winners.data != nullptr) {
    check_winners(in, winners.data, grad.numel() * winners.count);
  }
  const std::vector<int64_t> none{0};
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

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) { m.def(cisc::cross_similarity::kBackwardSchema); }

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("cross_similarity_backward", TORCH_BOX(&cisc::cross_similarity::backward_op));
}
