// Backward of masked_average_pool on a GPU: the gradient of the features is written once.
//
// Work at B = 16, C = 256, 181 x 181 features, one class: the bytes of a float32 gradient take an H200 125
// us.

#include "masked_average_pool_weights.cuh"

namespace cisc::masked_average_pool::device {

namespace {

struct Scatter {
  Weights weights;
  int64_t channels, deep_blocks, windows, area;  // area: h * w
  const float* grad;                             // [B,S,C]
  int64_t grad_b, grad_s, grad_c;
  double unit, eps;
  const unsigned long long* totals;
  const int* invalid;
};

// What a thread writes: n pixels of the warp's channels, from `pixel` of the piece on. to: the first of these
// channels at the pixel; factor: at S = 1, of the warp's channel that has the thread's number
template <int n, bool one, typename T>
__device__ __forceinline__ void scatter_window(const Scatter& p, int64_t image, int64_t channel,
                                               int64_t pixel, bool there, Span span, Span other, float factor,
                                               // outputs
                                               T* to) {
  constexpr int kBeside = n > 4 ? 4 : 8;  // channels whose sums a thread has at once
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool spoilt = *p.invalid != 0;
  const int64_t left = p.channels - channel, all_image = p.weights.piece.image + image;
  float weight[n];
  const auto read_weights = [&](int64_t slot) {
    const float* of = p.weights.of(image, slot) + pixel;
#pragma unroll
    for (int i = 0; i < n; ++i) weight[i] = there ? of[i] : 0.0f;
  };
  if (one) read_weights(0);
#pragma unroll 1
  for (int first = 0; first < kOwn && static_cast<int64_t>(first) * kWarps < left; first += kBeside) {
    float sum[kBeside][n];
#pragma unroll
    for (int j = 0; j < kBeside; ++j) {
#pragma unroll
      for (int i = 0; i < n; ++i) sum[j][i] = spoilt ? NAN : 0.0f;
    }
    const auto add = [&](float of_lane, int from) {
#pragma unroll
      for (int j = 0; j < kBeside; ++j) {
        const float f = __shfl_sync(kAll, of_lane, from + j);
        const bool careful = !isfinite(f);  // of which nothing is nothing
#pragma unroll
        for (int i = 0; i < n; ++i) {
          sum[j][i] = careful && !(weight[i] > 0.0f) ? sum[j][i] : fmaf(f, weight[i], sum[j][i]);
        }
      }
    };
    if (one) {
      add(factor, first);
    } else {
      for (int64_t word = 0; word < p.weights.words; ++word) {
        for (uint32_t bits = p.weights.bits(image, word, span) | p.weights.bits(image, word, other);
             bits != 0; bits &= bits - 1) {
          const int64_t slot = word * kSlots + __ffs(static_cast<int>(bits)) - 1;
          read_weights(slot);
          const int64_t here = static_cast<int64_t>(first + lane % kBeside) * kWarps;
          const double count = pixels_of(p.totals[all_image * p.weights.slots + slot], p.unit) + p.eps;
          float of_lane = 0.0f;
          if (here < left) {
            const float* grad = p.grad + all_image * p.grad_b + slot * p.grad_s + (channel + here) * p.grad_c;
            of_lane = __fdiv_rn(*grad, static_cast<float>(count));
          }
          add(of_lane, 0);
        }
      }
    }
    if (!there) continue;
#pragma unroll
    for (int j = 0; j < kBeside; ++j) {
      const int64_t here = static_cast<int64_t>(first + j) * kWarps;
      if (here >= left) continue;
      Group<T, n>::of(sum[j]).write(to + here * p.area);
    }
  }
}

// A block writes the pixels of a window of up to kDeep channels of one image; a warp every eighth channel.
template <typename T, bool one>
__global__ void __launch_bounds__(kThreads, one ? 3 : 2) scatter_kernel(Scatter p, T* gradient) {
  constexpr int n = kWide<T>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t window = blockIdx.x / p.deep_blocks % p.windows,
                image = blockIdx.x / p.deep_blocks / p.windows;
  const int64_t channel = blockIdx.x % p.deep_blocks * kDeep + warp, left = p.channels - channel;
  if (left <= 0) return;
  const int64_t all_image = p.weights.piece.image + image, pixels = p.weights.piece.pixels();
  float factor = 0.0f;
  if (one && static_cast<int64_t>(lane) * kWarps < left) {
    const double count = pixels_of(p.totals[all_image], p.unit) + p.eps;
    factor = __fdiv_rn(p.grad[all_image * p.grad_b + (channel + lane * kWarps) * p.grad_c],
                       static_cast<float>(count));
  }
  T* to = gradient + (all_image * p.channels + channel) * p.area + p.weights.first_pixel();
  int64_t head = planes::past_aligned<n>(to);
  head = head > 0 ? n - head : 0;
  if (head > pixels) head = pixels;
  const int64_t groups = (pixels - head) / n, first = window * kWarp, group = first + lane;
  if (first < groups) {
    const int64_t last = first + kWarp < groups ? first + kWarp : groups;
    const bool there = group < groups;
    const int64_t pixel = head + (there ? group : 0) * n;
    scatter_window<n, one>(p, image, channel, pixel, there, {head + first * n, head + last * n}, {}, factor,
                           to + pixel);
  }
  const int64_t tail = head + groups * n;
  if (window == p.windows - 1 && (head > 0 || tail < pixels)) {
    const int64_t edge = lane < head ? lane : tail + lane - head;
    const bool there = edge < pixels;
    const int64_t pixel = there ? edge : 0;
    scatter_window<1, one>(p, image, channel, pixel, there, {0, head}, {tail, pixels}, factor, to + pixel);
  }
}

// grad: [B,S,C] float32, any strides
// labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64, -1 = none
// outputs
// gradient: [B,C,h,w] of `dtype`, contiguous
Tensor cuda_backward(const Tensor& grad, const Tensor& labels, const Tensor& classes, int64_t h, int64_t w,
                     double eps, ScalarType dtype) {
  check_backward(grad, labels, classes, h, w, dtype, kHere);
  const Gpu gpu(kBackward, "grad", grad);
  check_same_device(kBackward, "labels", labels, grad);
  check_same_device(kBackward, "classes", classes, grad);
  check_class_values(kBackward, classes);
  const int64_t batch = grad.size(0), slots = grad.size(1), channels = grad.size(2);
  if (grad.numel() == 0 || labels.numel() == 0) {
    return without_pixels(gpu, classes, {batch, channels, h, w}, dtype);
  }
  Tensor gradient = device_empty(grad, {batch, channels, h, w}, dtype);
  Gatherer gatherer(gpu, labels, classes, h, w);
  Scatter p{{},
            channels,
            ceil_div(channels, kDeep),
            0,
            h * w,
            static_cast<const float*>(grad.const_data_ptr()),
            grad.stride(0),
            grad.stride(1),
            grad.stride(2),
            gatherer.geometry.unit(),
            eps,
            gatherer.totals(),
            gatherer.invalid()};
  const std::vector<Piece>& pieces = gatherer.pieces;
  for (size_t begin = 0, end = 0; begin < pieces.size(); begin = end) {
    while (end < pieces.size() && pieces[end].image == pieces[begin].image) ++end;
    for (size_t i = begin; i < end; ++i) p.weights = gatherer.of(pieces[i], true);
    for (size_t i = begin; i < end; ++i) {
      if (end > begin + 1) p.weights = gatherer.of(pieces[i], false);
      with_float(float_kind(dtype), [&](auto type) {
        using T = decltype(type);
        p.windows = ceil_div(pieces[i].pixels(), kWarp * kWide<T>);
        const int64_t blocks = pieces[i].images * p.windows * p.deep_blocks;
        T* to = static_cast<T*>(gradient.mutable_data_ptr());
        if (slots == 1) {
          gpu.launch(scatter_kernel<T, true>, blocks, kThreads, 0, p, to);
        } else {
          gpu.launch(scatter_kernel<T, false>, blocks, kThreads, 0, p, to);
        }
      });
    }
  }
  return gradient;
}

}  // namespace
}  // namespace cisc::masked_average_pool::device

CISC_DEFINE(cisc::masked_average_pool::kBackwardSchema)

CISC_REGISTER(m) {
  m.impl("masked_average_pool_backward", TORCH_BOX(&cisc::masked_average_pool::device::cuda_backward));
}
