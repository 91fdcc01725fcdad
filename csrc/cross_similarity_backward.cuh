// What the backward kernels of cross_similarity share on a GPU: the incoming gradient, and where theirs goes.
#pragma once

#include "cross_similarity_device.cuh"

namespace cisc::cross_similarity {
namespace on_gpu {

// grad: [B,S,h,w] float32, any strides
struct Gradient {
  static constexpr bool of_query = true;  // it weights pixels of the query (sum_members_kernel)
  const float* data;
  int64_t stride_b, stride_s, stride_y, stride_x, width;

  __device__ float at(int64_t b, int64_t slot, int64_t pixel) const {
    return data[b * stride_b + slot * stride_s + pixel / width * stride_y + pixel % width * stride_x];
  }
};

// Gradient to one image of each pair, [B,C,h,w], any strides.
struct Target {
  Image<void*> image;
  int64_t width;

  __device__ int64_t offset(int64_t b, int64_t pixel) const {
    return b * image.stride_b + pixel / width * image.stride_y + pixel % width * image.stride_x;
  }

  // offset: of the pixel
  __device__ void write(int64_t offset, int64_t channel, float value) const {
    write_element(image.kind, image.data, offset + channel * image.stride_c, value);
  }
};

// Gradient of a vector's component from that of its unit vector, of which `along` lies along it.
__device__ __forceinline__ float through_norm(float sum, float unit, double along, float scale, float rest) {
  return (sum - unit * static_cast<float>(along)) * rest * scale;
}

struct Kernel {
  Side held, streamed;  // `held` is what the gradient goes to
  SlotClasses classes;
  Gradient grad;
  Target target;
  int64_t images, slots, query_pixels;
  const int64_t* winners;  // [B,S,h,w,k] of "max" and "topk", -1 behind the last
  int64_t k;
  const float* similarity;  // [B,S,h,w] of "softmax"
  const float* log_totals;  // [B,S,h,w] of "softmax"
  float steepness, inverse_temperature;
  bool of_shared_bins;  // the plain kernel meets images alone whose labels share a bin

  // Place of a query pixel in a tensor [B,S,h,w].
  __device__ int64_t place(int64_t b, int64_t slot, int64_t pixel) const {
    return (b * slots + slot) * query_pixels + pixel;
  }
};

}  // namespace on_gpu
}  // namespace cisc::cross_similarity
