// Argument checks of every operator: one line that names operator and argument, what was expected and what
// came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace cisc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throw std::invalid_argument, which Python sees as ValueError, with the parts joined.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

// `shape` is what the message shows, such as "[B,C,h,w]".
inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank,
                       const char* shape) {
  check(tensor.dim() == rank, op, name, " must be ", shape, ", got rank ", tensor.dim());
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, int64_t dim, int64_t expected,
                       const char* shape) {
  check(tensor.size(dim) == expected, op, name, " must be ", shape, " with size ", expected, " in dimension ",
        dim, ", got ", tensor.size(dim));
}

// Where a kernel runs, and its tensors are.
enum class Place { cpu, cuda };

inline void check_place(const char* op, const char* name, const Tensor& tensor, Place place) {
  if (place == Place::cpu) {
    check(tensor.is_cpu(), op, name, " must be on the CPU like the other arguments");
  } else {
    check(tensor.is_cuda(), op, name, " must be on the GPU like the other arguments");
  }
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  check_place(op, name, tensor, Place::cpu);
}

// Two GPUs are no one place.
inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& other) {
  check(tensor.get_device_index() == other.get_device_index(), op, name, " must be on the GPU ",
        other.get_device_index(), " like the other arguments, got ", tensor.get_device_index());
}

// Maps [B,K,h,w] that are brought to labels of height x width.
inline void check_sides(const char* op, const Tensor& maps, int64_t height, int64_t width) {
  constexpr int64_t most = 1LL << 30;
  const int64_t h = maps.size(2), w = maps.size(3);
  check(h > 0 && w > 0, op, "maps must have at least one pixel, got ", h, " x ", w);
  check(h <= most && w <= most && height <= most && width <= most, op, "no side may be longer than ", most,
        " pixels, got ", h, " x ", w, " and ", height, " x ", width);
}

// `names` is what the message shows, such as "uint8, int32 or int64".
inline void check_dtype(const char* op, const char* name, ScalarType dtype,
                        std::initializer_list<ScalarType> allowed, const char* names) {
  for (const ScalarType one : allowed) {
    if (dtype == one) return;
  }
  fail(op, name, " must be ", names, ", got ", torch::headeronly::toString(dtype));
}

inline void check_features(const char* op, const char* name, ScalarType dtype) {
  check_dtype(op, name, dtype, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half},
              "float32, bfloat16 or float16");
}

// What comes back to a result of float32 and this size.
inline void check_grad(const char* op, const Tensor& grad, std::initializer_list<int64_t> size,
                       const char* shape, Place place) {
  check_rank(op, "grad", grad, static_cast<int64_t>(size.size()), shape);
  check_dtype(op, "grad", grad.scalar_type(), {ScalarType::Float}, "float32");
  check_place(op, "grad", grad, place);
  int64_t dim = 0;
  for (const int64_t expected : size) check_size(op, "grad", grad, dim++, expected, shape);
}

inline void check_labels(const char* op, const Tensor& labels, const char* name = "labels",
                         Place place = Place::cpu) {
  check_rank(op, name, labels, 3, "[B,H,W]");
  check_dtype(op, name, labels.scalar_type(), {ScalarType::Byte, ScalarType::Int, ScalarType::Long},
              "uint8, int32 or int64");
  check_place(op, name, labels, place);
}

inline void check_classes(const char* op, const Tensor& classes, Place place = Place::cpu) {
  check_rank(op, "classes", classes, 2, "[B,S]");
  check_dtype(op, "classes", classes.scalar_type(), {ScalarType::Int, ScalarType::Long}, "int32 or int64");
  check_place(op, "classes", classes, place);
}

}  // namespace cisc
