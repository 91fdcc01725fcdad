// Backward of prototype_similarity on a GPU: a tile of the query is kept in registers, so that the query is
// read once and its gradient written once.
//
// Work at B = 16, C = 256, 181 x 181, one prototype, float32: 1074 MB take an H200 250 us. A value takes
// about 8 instructions: 40 us.

#include <tuple>

#include "prototype_similarity_backward_pixels.cuh"
#include "prototype_similarity_backward_planes.cuh"

namespace cisc::prototype_similarity {

namespace {

constexpr int kFinishThreads = 1024, kFinishParts = kFinishThreads / kWarp, kFinishDeep = 256;

// Of one prototype: the sum of the chunks, in order, and from there the gradient through the norm.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(Back b, Vectors<T> grad_prototypes) {
  CISC_SHARED(memory, float[kFinishParts][kFinishDeep]);
  CISC_SHARED(total, double);
  constexpr int beside = kFinishDeep / kWarp;
  const Problem& p = b.problem;
  const int part = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t slot = blockIdx.x % p.slots, image = blockIdx.x / p.slots;
  float* partial = b.partial + (image * b.chunks * p.slots + slot) * p.channels;
  const float* units = p.units.of(image) + slot * p.units.stride_s;
  double along = 0.0;
  for (int64_t first = 0; first < p.channels; first += kFinishDeep) {
    float sum[beside] = {};
    for (int64_t chunk = part; chunk < b.chunks; chunk += kFinishParts) {
      const float* from = partial + chunk * p.slots * p.channels;
#pragma unroll
      for (int i = 0; i < beside; ++i) {
        const int64_t channel = first + i * kWarp + lane;
        if (channel < p.channels) sum[i] += from[channel];
      }
    }
#pragma unroll
    for (int i = 0; i < beside; ++i) memory[part][i * kWarp + lane] = sum[i];
    __syncthreads();
    const int64_t channel = first + threadIdx.x;
    if (threadIdx.x < kFinishDeep && channel < p.channels) {
      double all = 0.0;
      for (int k = 0; k < kFinishParts; ++k) all += static_cast<double>(memory[k][threadIdx.x]);
      partial[channel] = static_cast<float>(all);  // the first chunk's are added by now
      along += all * static_cast<double>(units[channel * p.units.stride_c]);
    }
    __syncthreads();
  }
  along = block_sum<kFinishThreads>(along);
  if (threadIdx.x == 0) total = along;
  __syncthreads();
  if (threadIdx.x >= kFinishDeep) return;
  const float toward = static_cast<float>(total), inverse = p.units.inverse[image * p.slots + slot];
  T* to = grad_prototypes.data + image * grad_prototypes.stride_b + slot * grad_prototypes.stride_s;
  for (int64_t channel = threadIdx.x; channel < p.channels; channel += kFinishDeep) {
    const float unit = units[channel * p.units.stride_c];
    to[channel * grad_prototypes.stride_c] = T::narrow(fmaf(-toward, unit, partial[channel]) * inverse);
  }
}

// Whether groups of n elements of both lie at the same distances from multiples of them, and 32 bits count
// pixels and channels.
template <int n, typename T>
bool alike(const Planes<const T>& a, const Planes<T>& b, int64_t pixels, int64_t channels) {
  return a.stride_b == b.stride_b && a.stride_c == b.stride_c && pixels < kNarrow && channels < kNarrow &&
         (reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data)) % (n * sizeof(T)) == 0;
}

// grad: [B,S,h,w] float32, any strides
// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// prototypes: [B,S,C] float32, bfloat16 or float16, any strides
// outputs
// gradients of query and prototypes, in their dtypes and, where those are dense, their strides
std::tuple<Tensor, Tensor> cuda_backward(const Tensor& grad, const Tensor& query, const Tensor& prototypes,
                                         double eps) {
  check_arguments(kBackward, query, prototypes, kHere);
  check_grad(kBackward, grad, {query.size(0), prototypes.size(1), query.size(2), query.size(3)}, "[B,S,h,w]",
             kHere);
  const Gpu gpu(kBackward, "query", query);
  check_same_device(kBackward, "prototypes", prototypes, query);
  check_same_device(kBackward, "grad", grad, query);
  const int64_t batch = query.size(0), slots = prototypes.size(1), channels = query.size(1);
  Tensor grad_query = torch::stable::empty_like(query),
         grad_prototypes = torch::stable::empty_like(prototypes);
  if (batch * slots * channels == 0) {
    return {torch::stable::zero_(grad_query), torch::stable::zero_(grad_prototypes)};
  }
  const int64_t pixels = query.size(2) * query.size(3), cells = slots * channels;
  with_float(float_kind(query.scalar_type()), [&](auto type) {
    using T = decltype(type);
    constexpr int n = kWide<T>;
    auto view = planes::planes_of<const T>(query, query.const_data_ptr());
    auto result = planes::planes_of<T>(grad_query, grad_query.mutable_data_ptr());
    const bool in_pixels = planes::in_pixels(view, channels) && planes::in_pixels(result, channels);
    const bool wide =
        planes::in_planes(view) && planes::in_planes(result) && alike<n>(view, result, pixels, channels);
    const bool fused = !in_pixels || (slots == 1 && channels <= kDeep);
    int64_t most = std::clamp<int64_t>(kUnitBytes / (4 * cells), 1, batch);
    if (!fused) most = std::clamp<int64_t>(kInversePixels / std::max<int64_t>(pixels, 1), 1, most);
    UnitVectors vectors(prototypes, most, false);
    Back b{{channels, slots, pixels, 0, 0, norm_limit(eps), vectors.units},
           planes::planes_of<const float>(grad, grad.const_data_ptr()),
           most,
           std::clamp<int64_t>(kPartialBytes / (4 * most * cells), 1, ceil_div(kBlocks, most)),
           0,
           0,
           false,
           nullptr,
           nullptr,
           false};
    Tensor partial = device_empty(query, {most * cells * b.most_chunks}, ScalarType::Float);
    Tensor inverse =
        device_empty(query, {fused ? 0 : std::min(most * pixels, kInversePixels)}, ScalarType::Float);
    b.partial = data_of<float>(partial);
    b.inverse = fused ? nullptr : data_of<float>(inverse);
    for (int64_t first = 0; first < batch; first += most) {
      const int64_t images = std::min(most, batch - first);
      vectors.make(gpu, first, images, b.problem.eps);
      // Without pixels there are no chunks to sum: 0, or NaN for a prototype that is not finite.
      if (pixels == 0) {
        b.chunks = 0;
      } else if (in_pixels) {
        launch_backward_pixels<T>(gpu, view, b, images, result);
      } else if (wide) {
        if (slots == 1 && channels <= kDeep) {
          launch_backward_planes<T, n, true>(gpu, view, b, images, result);
        } else {
          launch_backward_planes<T, 4, false>(gpu, view, b, images, result);
        }
      } else {
        launch_backward_planes<T, 1, false>(gpu, view, b, images, result);
      }
      with_float(float_kind(prototypes.scalar_type()), [&](auto other) {
        using P = decltype(other);
        const Vectors<P> to{
            static_cast<P*>(grad_prototypes.mutable_data_ptr()) + first * grad_prototypes.stride(0),
            grad_prototypes.stride(0), grad_prototypes.stride(1), grad_prototypes.stride(2)};
        gpu.launch(finish_kernel<P>, images * slots, kFinishThreads, 0, b, to);
      });
      view.data += images * view.stride_b;
      result.data += images * result.stride_b;
      b.grad.data += images * b.grad.stride_b;
    }
  });
  return {grad_query, grad_prototypes};
}

}  // namespace
}  // namespace cisc::prototype_similarity

CISC_DEFINE(cisc::prototype_similarity::kBackwardSchema)

CISC_REGISTER(m) {
  m.impl("prototype_similarity_backward", TORCH_BOX(&cisc::prototype_similarity::cuda_backward));
}
