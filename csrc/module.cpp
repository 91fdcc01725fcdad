// cisc_ext._build: what was built, and what workspace a shape gets, from the code that launches. No tensors
// here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "masked_average_pool.h"

namespace py = pybind11;

namespace {

py::tuple words(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(parts);
}

py::dict info() {
  py::dict built;
  built["compiler"] = CISC_COMPILER;
  built["flags"] = words(CISC_FLAGS);
  built["instruction_sets"] = words(CISC_INSTRUCTION_SETS);
  built["torch"] = CISC_TORCH;
  built["torch_target"] = CISC_TORCH_TARGET;
  built["cuda_compiler"] = CISC_CUDA_COMPILER;
  built["cuda_chips"] = words(CISC_CUDA_CHIPS);
  built["left_out"] = CISC_LEFT_OUT;
  return built;
}

int64_t masked_average_pool_bytes(int64_t channels, int64_t height, int64_t width, int64_t classes) {
  namespace op = cisc::masked_average_pool;
  if (channels < 0 || height < 0 || width < 0 || classes < 0 || classes > op::kMaxClasses) {
    throw std::invalid_argument("masked_average_pool_bytes: sizes must not be negative, and at most " +
                                std::to_string(op::kMaxClasses) + " classes");
  }
  return op::plan(channels, height, width, classes).bytes;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "What was built, and the workspace that the built operators take.";
  m.def("info", &info, "Compilers, flags, instruction sets, CUDA chips, and what was left out and why.");
  m.def(
      "masked_average_pool_bytes", &masked_average_pool_bytes, py::arg("channels"), py::arg("height"),
      py::arg("width"), py::arg("classes"),
      "Workspace in bytes of masked_average_pool on the CPU, for features [B,C,h,w] and S distinct classes.");
}
