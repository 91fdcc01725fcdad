// Tensors as the kernels read them, and the workers that run a kernel's tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "crew.h"
#include "labels.h"
#include "upsample.h"

namespace cisc {

inline Float float_kind(ScalarType dtype) {
  return dtype == ScalarType::Float ? Float::f32 : dtype == ScalarType::BFloat16 ? Float::bf16 : Float::f16;
}

// tensor: [B,C,h,w] float32, bfloat16 or float16, any strides
inline Image<const void*> read_image(const Tensor& tensor) {
  return {float_kind(tensor.scalar_type()),
          tensor.const_data_ptr(),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

inline Image<void*> write_image(Tensor& tensor) {
  return {float_kind(tensor.scalar_type()),
          tensor.mutable_data_ptr(),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          tensor.stride(3)};
}

// maps: [B,K,h,w]
inline upsample::Grid grid_of(const Tensor& maps, int64_t height, int64_t width, bool align_corners) {
  return {maps.size(1), maps.size(2), maps.size(3), height, width, align_corners};
}

// labels: [B,H,W] uint8, int32 or int64, any strides
inline Labels read_labels(const Tensor& labels) {
  const ScalarType dtype = labels.scalar_type();
  const Integer kind = dtype == ScalarType::Byte  ? Integer::u8
                       : dtype == ScalarType::Int ? Integer::i32
                                                  : Integer::i64;
  return {kind, labels.const_data_ptr(), labels.stride(0), labels.stride(1), labels.stride(2)};
}

// classes: [B,S] int32 or int64, any strides
inline Classes classes_of(const Tensor& classes) {
  return {classes.scalar_type() == ScalarType::Long,
          classes.const_data_ptr(),
          classes.size(0),
          classes.size(1),
          classes.stride(0),
          classes.stride(1)};
}

// One image's row of classes [B,S] int32 or int64, each at least -1 and below `limit`.
inline std::vector<int64_t> read_classes(const char* op, const Tensor& classes, int64_t image,
                                         int64_t limit = INT64_MAX) {
  std::vector<int64_t> row;
  const Classes view = classes_of(classes);
  for (int64_t s = 0; s < view.slots; ++s) {
    row.push_back(view.at(image, s));
    if (row.back() >= -1 && row.back() < limit) continue;
    const std::string wanted = limit == INT64_MAX ? "a class" : "in [0, " + std::to_string(limit) + ")";
    fail(op, "classes must be -1 or ", wanted, ", got ", row.back(), " at [", image, ",", s, "]");
  }
  return row;
}

// Say which labels are there, once a kernel has met one that is neither a class nor ignored.
[[noreturn]] inline void fail_labels(const char* op, const Tensor& labels, int64_t num_classes,
                                     int64_t ignore_index) {
  const Labels view = read_labels(labels);
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (int64_t b = 0; b < labels.size(0); ++b) {
    for (int64_t y = 0; y < labels.size(1); ++y) {
      for (int64_t x = 0; x < labels.size(2); ++x) {
        const int64_t label = view.at(b, y, x);
        least = std::min(least, label);
        most = std::max(most, label);
      }
    }
  }
  fail(op, "labels must be in [0, ", num_classes, ") or ", ignore_index, ", got values from ", least, " to ",
       most);
}

namespace upsample {

// f(task, its number) for every task of every image, in parallel. grad: [B,K,h,w] float32 of zeros, or null.
// A thread counts in [cells] of its own, zeros at first; returns their sums, which have no order.
template <typename Function>
std::vector<int64_t> run_tasks(const Plan& plan, const Grid& grid, int64_t batch, float* grad, int64_t cells,
                               const Function& f) {
  const int64_t row = grid.planes * grid.w, image_floats = row * grid.h;
  const Crew crew(plan.images * plan.tasks, thread_bytes(plan, cells));
  const auto workspaces = crew.each<float>(plan.thread_floats);
  const auto counts = crew.zeros<int64_t>(cells);
  const std::unique_ptr<float[]> carry(grad != nullptr ? new float[plan.carry_floats] : nullptr);
  for (int64_t first = 0; first < batch; first += plan.images) {
    const int64_t count = std::min(plan.images, batch - first) * plan.tasks;
    crew.run(count, [&](int64_t thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Task task;
        task.image = first + i / plan.tasks;
        task.begin = i % plan.tasks * plan.rows;
        task.end = std::min(task.begin + plan.rows, grid.h);
        task.workspace = workspaces[thread];
        task.counts = counts[thread];
        task.grad = grad != nullptr ? grad + task.image * image_floats : nullptr;
        task.carry = nullptr;
        if (grad != nullptr && task.end < grid.h) {
          task.carry = carry.get() + i * row;
          std::fill(task.carry, task.carry + row, 0.0f);
        }
        f(task, first * plan.tasks + i);
      }
    });
    if (grad == nullptr) continue;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t below = (i % plan.tasks + 1) * plan.rows;
      if (below >= grid.h) continue;
      float* to = grad + (first + i / plan.tasks) * image_floats + below * grid.w;
      for (int64_t k = 0; k < grid.planes; ++k) {
        const float* from = carry.get() + i * row + k * grid.w;
        for (int64_t x = 0; x < grid.w; ++x) to[k * grid.h * grid.w + x] += from[x];
      }
    }
  }
  std::vector<int64_t> sums(static_cast<size_t>(cells), 0);
  crew.add_all(counts, cells, sums.data());
  return sums;
}

}  // namespace upsample

// values[i] /= divisor
inline void divide(float* values, int64_t n, double divisor) {
  const float by = static_cast<float>(divisor);
  parallel_for(0, n, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] /= by;
  });
}

// A float32 scalar on the device of `like`.
inline Tensor scalar(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

// Zeros of the shape of `like` if `wanted`, else no elements; float32, contiguous.
inline Tensor gradient_like(const Tensor& like, bool wanted) {
  std::vector<int64_t> size{0};
  if (wanted) {
    size.clear();
    for (int64_t d = 0; d < like.dim(); ++d) size.push_back(like.size(d));
  }
  return torch::stable::new_zeros(like, {size.data(), size.size()}, ScalarType::Float);
}

}  // namespace cisc
