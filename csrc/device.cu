// The GPU of an operator's call; launches, and the values that CISC_CHECK=1 looks at.

#include "device.cuh"

#include <cstdlib>

#include "tensors.h"

#ifndef CISC_SIMT
#include <dlfcn.h>

#include <array>
#include <mutex>
#endif

namespace cisc {

Tensor on_cpu(const Tensor& tensor) {
#ifdef CISC_SIMT
  return tensor;
#else
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
#endif
}

void check_label_values(const char* op, const Tensor& labels, int64_t num_classes, int64_t ignore_index) {
  if (!Gpu::checks_values()) return;
  const Tensor copy = on_cpu(labels);
  const Labels view = read_labels(copy);
  for (int64_t b = 0; b < copy.size(0); ++b) {
    for (int64_t y = 0; y < copy.size(1); ++y) {
      for (int64_t x = 0; x < copy.size(2); ++x) {
        const int64_t label = view.at(b, y, x);
        if (label != ignore_index && (label < 0 || label >= num_classes)) {
          fail_labels(op, copy, num_classes, ignore_index);
        }
      }
    }
  }
}

void check_class_values(const char* op, const Tensor& classes, int64_t limit) {
  if (!Gpu::checks_values()) return;
  const Tensor copy = on_cpu(classes);
  for (int64_t b = 0; b < copy.size(0); ++b) read_classes(op, copy, b, limit);
}

#ifdef CISC_SIMT

Gpu::Gpu(const char* op, const char* name, const Tensor& tensor)
    : op_(op), multiprocessors_(simt::multiprocessors()), shared_bytes_(simt::kSharedBytes) {
  check_place(op, name, tensor, kHere);
}

bool Gpu::checks_values() {
  const char* asked = std::getenv("CISC_CHECK");
  return asked == nullptr || std::string(asked) != "0";
}

#else

namespace {

constexpr int kMostDevices = 64, kMajor = 7, kMinor = 5;

void check_cuda(const char* op, cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here
  check(error != cudaErrorNoKernelImageForDevice, op, "this build has no code for this GPU, only for ",
        CISC_CUDA_CHIPS, ": set CISC_CUDA_ARCHS and build again");
  fail(op, what, " failed: ", cudaGetErrorString(error));
}

struct Properties {
  int major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;
};

// Asked for once a GPU.
const Properties& properties_of(const char* op, int device) {
  static std::array<Properties, kMostDevices> known;
  static std::array<std::once_flag, kMostDevices> asked;
  check(device >= 0 && device < kMostDevices, op, "GPUs are numbered up to ", kMostDevices - 1, ", got ",
        device);
  std::call_once(asked[static_cast<size_t>(device)], [&] {
    Properties p;
    const auto ask = [&](int* to, cudaDeviceAttr attribute) {
      check_cuda(op, cudaDeviceGetAttribute(to, attribute, device), "asking for the GPU's properties");
    };
    ask(&p.major, cudaDevAttrComputeCapabilityMajor);
    ask(&p.minor, cudaDevAttrComputeCapabilityMinor);
    ask(&p.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&p.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    known[static_cast<size_t>(device)] = p;
  });
  return known[static_cast<size_t>(device)];
}

// torch's stream of this thread. Its function lies in a library that torch without CUDA does not have.
cudaStream_t current_stream(const char* op, int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(found);
  }();
  check(function != nullptr, op, "this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  check(function(device, &stream) == AOTI_TORCH_SUCCESS, op, "torch gave no stream of GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

int device_of(const char* op, const char* name, const Tensor& tensor) {
  check_place(op, name, tensor, kHere);
  return tensor.get_device_index();
}

}  // namespace

Gpu::Gpu(const char* op, const char* name, const Tensor& tensor)
    : op_(op), guard_(device_of(op, name, tensor)) {
  const int device = tensor.get_device_index();
  const Properties& p = properties_of(op, device);
  check(p.major > kMajor || (p.major == kMajor && p.minor >= kMinor), op, "needs compute capability ", kMajor,
        ".", kMinor, " or newer, GPU ", device, " has ", p.major, ".", p.minor);
  multiprocessors_ = p.multiprocessors;
  shared_bytes_ = p.shared_bytes;
  stream_ = current_stream(op, device);
}

bool Gpu::checks_values() {
  const char* asked = std::getenv("CISC_CHECK");
  return asked != nullptr && std::string(asked) == "1";
}

void Gpu::launch_raw(const void* kernel, int64_t blocks, int threads, int64_t shared, void** pointers) const {
  // What a kernel declares counts too: with it, even less than the usual limit may have to be asked for.
  if (shared > 0) {
    check_cuda(
        op_,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "asking for shared memory");
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  check_cuda(op_, cudaLaunchKernel(kernel, grid, block, pointers, static_cast<size_t>(shared), stream_),
             "a launch");
}

#endif

}  // namespace cisc
