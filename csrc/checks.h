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

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), op, name, " must be on the CPU like the other arguments");
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

inline void check_labels(const char* op, const Tensor& labels, const char* name = "labels") {
  check_rank(op, name, labels, 3, "[B,H,W]");
  check_dtype(op, name, labels.scalar_type(), {ScalarType::Byte, ScalarType::Int, ScalarType::Long},
              "uint8, int32 or int64");
  check_cpu(op, name, labels);
}

inline void check_classes(const char* op, const Tensor& classes) {
  check_rank(op, "classes", classes, 2, "[B,S]");
  check_dtype(op, "classes", classes.scalar_type(), {ScalarType::Int, ScalarType::Long}, "int32 or int64");
  check_cpu(op, "classes", classes);
}

}  // namespace cisc
