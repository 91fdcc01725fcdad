// Backward of cross_similarity on a GPU. "max" and "topk": cross_similarity_winners.cuh. "softmax", and
// "mean" of wide labels: cross_similarity_pair_gradients.cuh. "mean" else: means of unit vectors
// (cross_similarity_means.cuh), here.

#include <algorithm>
#include <tuple>

#include "cross_similarity_backward_sweep.cuh"
#include "cross_similarity_means.cuh"
#include "cross_similarity_pair_gradients.cuh"
#include "cross_similarity_pairs.cuh"
#include "cross_similarity_sweep.cuh"
#include "cross_similarity_winners.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kMeanChannels = 8;  // that a thread sums

// A block has 64 pixels of the side that the gradient of "mean" goes to. It makes the sums of the table's
// rows twice, as they are not kept; where channels come in parts, in one launch for what lies along the
// vectors, and in another one.
__global__ void __launch_bounds__(kThreads)
    mean_gradient_kernel(Means p, Side side, Gradient grad, Target target, bool to_query, bool begins,
                         bool writes,
                         // outputs
                         double* alongs /* [images,pixels], or null: all in one launch */) {
  CISC_SHARED(held, Pixels);
  CISC_SHARED(parts, double[kThreads]);
  const int64_t tiles = ceil_div(side.pixels, kTile), image = blockIdx.x / tiles, b = p.image + image;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  const bool own = p.classes.own;
  if (part == 0) {
    const int64_t pixel = blockIdx.x % tiles * kTile + row;
    held.set(side, b, row, pixel < side.pixels ? pixel : -1, to_query && !own, 0);
  }
  __syncthreads();
  const int64_t pixel = held.pixel[row], label = held.label[row];
  const int64_t own_row = own ? p.row_of(label, to_query) : 0;
  const int64_t begin = own_row < 0 ? 0 : own_row, end = own ? own_row + 1 : p.rows;
  const bool kept = alongs != nullptr;
  double along = 0.0;
  if (kept && writes && pixel >= 0) along = alongs[image * side.pixels + pixel];
  for (int pass = kept && writes ? 1 : 0; pass < (writes ? 2 : 1); ++pass) {
    for (int64_t first = part * kMeanChannels; pixel >= 0 && first < p.channels;
         first += kParts * kMeanChannels) {
      float sums[kMeanChannels] = {};
      for (int64_t r = begin; r < end; ++r) {
        if (p.counts[image * p.rows + r] == 0) continue;
        if (!to_query && !own && p.classes.at(b, r) != label) continue;
        const float weight = to_query ? grad.at(b, own ? 0 : r, pixel) : 1.0f;
        const float* from = p.table + (image * p.rows + r) * p.channels + first;
#pragma unroll
        for (int c = 0; c < kMeanChannels; ++c) {
          if (first + c < p.channels) sums[c] = fmaf(weight, from[c], sums[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kMeanChannels; ++c) {
        if (first + c >= p.channels) continue;
        const int64_t channel = p.first_channel + first + c;
        const float unit = held.unit(side, row, channel);
        if (pass == 0) {
          along += static_cast<double>(sums[c]) * static_cast<double>(unit);
        } else {
          target.write(target.offset(b, pixel), channel,
                       through_norm(sums[c], unit, along, held.scale[row], held.rest[row]));
        }
      }
    }
    if (pass == 1) break;
    parts[threadIdx.x] = along;
    __syncthreads();
    along = 0.0;
    for (int i = 0; i < kParts; ++i) along += parts[i * kTile + row];
  }
  if (!kept || writes || part != 0 || pixel < 0) return;
  double& to = alongs[image * side.pixels + pixel];
  to = begins ? along : to + along;
}

// A thread has a pixel: 0, or NaN for what is not finite; NaN for all where a class is below -1.
__global__ void __launch_bounds__(kThreads)
    clear_kernel(Side side, SlotClasses classes, int64_t images, bool spoil, Target target) {
  if (spoil && !any_below_none<kThreads>(classes)) return;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= images * side.pixels) return;
  const int64_t to = target.offset(side.first + number / side.pixels, number % side.pixels);
  const float value = spoil ? kNan : 0.0f * side.rest[number];
  for (int64_t c = 0; c < side.channels; ++c) target.write(to, c, value);
}

void clear(const Gpu& gpu, const Kernel& p, bool spoil) {
  const int64_t blocks = ceil_div(p.images * p.held.pixels, kThreads);
  gpu.launch(clear_kernel, blocks, kThreads, 0, p.held, p.classes, p.images, spoil, p.target);
}

// Gradient of "mean", of the images whose sides are ready.
class ToMeans {
 public:
  ToMeans(const Gpu& gpu, const Inputs& in) : gpu_(gpu), tables_(gpu, in) {
    if (!tables_.in_parts()) return;
    alongs_ = device_empty(in.query, {std::max(in.query_pixels(), in.guide_pixels())}, ScalarType::Double);
  }

  void run(const Kernel& p, bool to_query) {
    const auto finish = [&](const Means& means, bool begins, bool writes) {
      Side side = p.held;
      side.order = nullptr;  // ignored pixels too
      double* alongs = tables_.in_parts() ? data_of<double>(*alongs_) : nullptr;
      gpu_.launch(mean_gradient_kernel, means.images * ceil_div(side.pixels, kTile), kThreads, 0, means, side,
                  p.grad, p.target, to_query, begins, writes, alongs);
    };
    if (to_query) {
      tables_.each(p.held, p.streamed, p.classes, p.images, 2, Alike{}, finish);
    } else {
      tables_.each(p.streamed, p.held, p.classes, p.images, 2, p.grad, finish);
    }
  }

 private:
  const Gpu& gpu_;
  MeanTables tables_;
  std::optional<Tensor> alongs_;
};

// Gradient of "softmax" by tensor cores, of the images whose sides are packed.
class ToPacked {
 public:
  // Whether the library has code of them for this GPU. Where labels share a bin, pixels of a class are none
  // of its range alone: the plain kernel then makes those images' gradients anew.
  static bool serves(const Gpu& gpu, const Inputs& in) {
#if defined(CISC_HAS_SM90) || defined(CISC_SIMT)
    return in.settings.reduction == Reduction::softmax && gpu.capability() == 90 && in.query_pixels() > 0 &&
           in.guide_pixels() > 0;
#else
    return false;
#endif
  }

  ToPacked(const Gpu& gpu, const Inputs& in, const Packing& packing)
      : gpu_(gpu),
        packing_(packing),
        exponents_(device_empty(in.query, {in.batch() * ceil_div(in.guide_pixels(), kBackwardRows)},
                                ScalarType::Int)) {}

  void run(const Kernel& p, const Pairs& pairs, bool to_query) {
    const Rows &held = to_query ? pairs.query_rows() : pairs.guide_rows(),
               &streamed = to_query ? pairs.guide_rows() : pairs.query_rows();
    [[maybe_unused]] const BackwardSweep sweep{
        p,          to_query,       packing_.matrix(),           packing_.shape, held.data, streamed.data,
        held.scale, streamed.scale, data_of<int32_t>(exponents_)};
#if defined(CISC_HAS_SM90) || defined(CISC_SIMT)
    backward_sm90(gpu_, sweep);
#endif
  }

 private:
  const Gpu& gpu_;
  Packing packing_;
  Tensor exponents_;
};

// grad: [B,S,h,w] float32, any strides
// similarity, index, saved: what forward has given
// the others: as in `cuda_forward`
// outputs
// gradients of query and guide, in their dtypes and, where those are dense, their strides; [0] if not needed
std::tuple<Tensor, Tensor> cuda_backward(const Tensor& grad, const Tensor& similarity, const Tensor& index,
                                         const Tensor& saved, const Tensor& query, const Tensor& guide,
                                         const Tensor& guide_labels, const MaybeTensor& classes,
                                         const MaybeTensor& query_labels, const std::string& reduction,
                                         int64_t k, double temperature, int64_t ignore_index, double eps,
                                         bool rounded, bool need_query, bool need_guide) {
  const Settings settings{reduction_of(kBackward, reduction), k, temperature, ignore_index, eps, rounded};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kBackward};
  check_backward(in, grad, similarity, index, saved, kHere);
  const Gpu gpu(kBackward, "query", query);
  check_devices(in);
  check_same_device(kBackward, "grad", grad, query);
  check_same_device(kBackward, "similarity", similarity, query);
  check_same_device(kBackward, "index", index, query);
  check_same_device(kBackward, "saved", saved, query);
  if (classes) check_class_values(kBackward, *classes);
  const bool max = settings.reduction == Reduction::max, topk = settings.reduction == Reduction::topk;
  const bool softmax = settings.reduction == Reduction::softmax;
  if (max || topk) check_winner_values(in, max ? index : saved);
  const auto result = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::empty_like(like) : device_empty(like, {0}, like.scalar_type());
  };
  Tensor grad_query = result(query, need_query), grad_guide = result(guide, need_guide);
  need_query = need_query && query.numel() > 0;
  need_guide = need_guide && guide.numel() > 0;
  if (!need_query && !need_guide) return {grad_query, grad_guide};
  Kernel p{};
  p.grad = {static_cast<const float*>(grad.const_data_ptr()),
            grad.stride(0),
            grad.stride(1),
            grad.stride(2),
            grad.stride(3),
            std::max<int64_t>(query.size(3), 1)};
  p.slots = in.slots();
  p.query_pixels = in.query_pixels();
  if (max || topk) p.winners = static_cast<const int64_t*>((max ? index : saved).const_data_ptr());
  p.k = topk ? in.winners() : 1;
  const bool packs = ToPacked::serves(gpu, in), plain = !packs || wide_labels(in);
  std::optional<Results> again;
  if (softmax && plain && by_sweep(gpu, in)) {
    // The slopes of a small temperature magnify what two cosines of a pair differ by.
    again = Results::of(in, false);
    softmax_by_plain(gpu, in, packs, again->similarity, again->saved);
  }
  const auto set_values = [&](const Tensor& values, const Tensor& log_totals) {
    p.similarity = static_cast<const float*>(values.const_data_ptr());
    p.log_totals = static_cast<const float*>(log_totals.const_data_ptr());
  };
  p.steepness = settings.steepness();
  p.inverse_temperature = static_cast<float>(1.0 / settings.temperature);
  p.of_shared_bins = packs;
  const auto packing = packs ? std::optional<Packing>(Packing::of(in, true)) : std::nullopt;
  Pairs pairs(gpu, in, packing);
  std::optional<ToPacked> to_packed;
  if (packs) to_packed.emplace(gpu, in, *packing);
  p.classes = pairs.classes();
  const bool listed = (max || topk) && grad.numel() > 0;
  std::optional<ToGuide> to_guide;
  if (listed && need_guide) to_guide.emplace(in, gpu, p.winners, p.k);
  std::optional<ToMeans> to_means;
  if (settings.reduction == Reduction::mean && MeanTables::serve(in)) to_means.emplace(gpu, in);
  const auto pair_gradient = [&](bool to_query) {
    if (to_means) return to_means->run(p, to_query);
    if (softmax) set_values(similarity, saved);
    if (to_packed) to_packed->run(p, pairs, to_query);
    if (!plain) return;
    if (again) set_values(again->similarity, again->saved);
    const int64_t blocks = p.images * ceil_div(p.held.pixels, kTile) * ceil_div(p.held.channels, kTile);
    const auto kernel = softmax
                            ? to_query ? pair_gradient_kernel<true, true> : pair_gradient_kernel<true, false>
                        : to_query ? pair_gradient_kernel<false, true>
                                   : pair_gradient_kernel<false, false>;
    gpu.launch(kernel, blocks, kThreads, 0, p);
  };
  pairs.each([&](int64_t images) {
    p.images = images;
    if (need_query) {
      p.held = pairs.query();
      p.streamed = pairs.guide();
      p.target = {write_image(grad_query), query.size(3)};
      if (listed) {
        p.held.order = nullptr;  // ignored pixels too
        const int64_t blocks = images * ceil_div(p.held.pixels, kTile);
        gpu.launch(gather_winners_kernel, blocks, kThreads, 0, p);
      } else {
        // Ignored pixels meet no tile.
        if ((p.classes.own && !to_means) || max || topk) clear(gpu, p, false);
        if (!max && !topk) pair_gradient(true);
      }
      if (classes) clear(gpu, p, true);
    }
    if (need_guide) {
      p.held = pairs.guide();
      p.streamed = pairs.query();
      p.target = {write_image(grad_guide), guide.size(3)};
      if (listed) {
        to_guide->run(p);
      } else if (max || topk) {
        clear(gpu, p, false);
      } else {
        pair_gradient(false);
      }
      if (classes) clear(gpu, p, true);
    }
  });
  return {grad_query, grad_guide};
}

}  // namespace
}  // namespace cisc::cross_similarity

CISC_DEFINE(cisc::cross_similarity::kBackwardSchema)

CISC_REGISTER(m) { m.impl("cross_similarity_backward", TORCH_BOX(&cisc::cross_similarity::cuda_backward)); }
