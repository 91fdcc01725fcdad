// The GPU of an operator's call; launches, and the values that CISC_CHECK=1 looks at.

#include "device.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "tensor_cores.cuh"
#include "tensors.h"

#ifndef CISC_SIMT
#include <dlfcn.h>

#include <array>
#include <mutex>
#include <set>
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

namespace {

constexpr int kSpoilThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSpoilThreads) spoil_kernel(Classes classes, int64_t count,
                                                              // outputs
                                                              T* values) {
  if (!any_below_none<kSpoilThreads>(classes)) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSpoilThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSpoilThreads + threadIdx.x; i < count; i += stride) {
    values[i] = T::narrow(NAN);
  }
}

}  // namespace

void spoil(const Gpu& gpu, const Tensor& classes, Tensor& values) {
  const int64_t count = values.numel();
  const int64_t blocks = std::min(ceil_div(count, kSpoilThreads), gpu.multiprocessors());
  with_float(float_kind(values.scalar_type()), [&](auto type) {
    using T = decltype(type);
    gpu.launch(spoil_kernel<T>, blocks, kSpoilThreads, 0, classes_of(classes), count, data_of<T>(values));
  });
}

namespace {

void check_map(const Gpu& gpu, Matrix type, const void* data, int64_t rows, int64_t columns, int box_rows) {
  const int64_t row_bytes = columns * (type == Matrix::s8 ? 1 : 2);
  check(rows > 0 && columns > 0 && rows <= INT32_MAX && row_bytes <= INT32_MAX, gpu.op(),
        "a tensor map needs 1 to 2^31 - 1 rows of 1 to 2^31 - 1 bytes, got ", rows, " of ", row_bytes);
  check(row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0, gpu.op(),
        "a tensor map needs rows of multiples of 16 bytes that start at one, got ", row_bytes,
        " bytes at address ", reinterpret_cast<uintptr_t>(data));
  check(box_rows > 0 && box_rows <= 256, gpu.op(), "a tensor map needs tiles of 1 to 256 rows, got ",
        box_rows);
}

}  // namespace

#ifdef CISC_SIMT

TensorMap tensor_map(const Gpu& gpu, Matrix type, const void* data, int64_t rows, int64_t columns,
                     int box_rows) {
  check_map(gpu, type, data, rows, columns, box_rows);
  return simt::tile_map(elements_of(type), data, rows, columns, box_rows);
}

Gpu::Gpu(const char* op, const char* name, const Tensor& tensor)
    : op_(op),
      multiprocessors_(simt::multiprocessors()),
      shared_bytes_(simt::shared_limit()),
      capability_(simt::chip()) {
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

// Lets a kernel ask for all the shared memory that there is, once on each GPU: set to what one launch asks
// for, it would fall short of what another thread's asks for. The kernel's own variables count too.
void allow_shared(const char* op, const void* kernel, int device, int64_t most) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;
  cudaFuncAttributes attributes{};
  check_cuda(op, cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
  const int rest = static_cast<int>(most) - static_cast<int>(attributes.sharedSizeBytes);
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, rest),
             "asking for shared memory");
  allowed.insert({kernel, device});
}

// The driver's function, looked for once: the library asks for none of the driver's by name.
decltype(&cuTensorMapEncodeTiled) map_encoder(const char* op) {
  static std::mutex mutex;
  static void* function = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (function == nullptr) {
    constexpr unsigned kVersion = 12000;  // of the driver's interface, the first that has it
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void* entry = nullptr;
    check_cuda(op,
               cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kVersion, cudaEnableDefault,
                                                &found),
               "asking the driver for cuTensorMapEncodeTiled");
    check(found == cudaDriverEntryPointSuccess && entry != nullptr, op,
          "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    function = entry;
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

int device_of(const char* op, const char* name, const Tensor& tensor) {
  check_place(op, name, tensor, kHere);
  return tensor.get_device_index();
}

}  // namespace

Gpu::Gpu(const char* op, const char* name, const Tensor& tensor)
    : op_(op), device_(device_of(op, name, tensor)), guard_(device_) {
  const Properties& p = properties_of(op, device_);
  check(p.major > kMajor || (p.major == kMajor && p.minor >= kMinor), op, "needs compute capability ", kMajor,
        ".", kMinor, " or newer, GPU ", device_, " has ", p.major, ".", p.minor);
  multiprocessors_ = p.multiprocessors;
  shared_bytes_ = p.shared_bytes;
  capability_ = p.major * 10 + p.minor;
  stream_ = current_stream(op, device_);
}

TensorMap tensor_map(const Gpu& gpu, Matrix type, const void* data, int64_t rows, int64_t columns,
                     int box_rows) {
  check_map(gpu, type, data, rows, columns, box_rows);
  const auto bytes = static_cast<cuuint64_t>(type == Matrix::s8 ? 1 : 2);
  const CUtensorMapDataType element = type == Matrix::f16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : type == Matrix::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {size[0] * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kChunkBytes / bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[] = {1, 1};
  TensorMap map;
  const CUresult result = map_encoder(gpu.op())(
      &map, element, 2, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, gpu.op(), "the driver refused a tensor map of ", rows, " rows of ", columns,
        " elements: error ", static_cast<int>(result));
  return map;
}

bool Gpu::checks_values() {
  const char* asked = std::getenv("CISC_CHECK");
  return asked != nullptr && std::string(asked) == "1";
}

void Gpu::launch_raw(const void* kernel, int64_t blocks, int threads, int64_t shared, void** pointers) const {
  if (shared > 0) allow_shared(op_, kernel, device_, shared_bytes_);
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  check_cuda(op_, cudaLaunchKernel(kernel, grid, block, pointers, static_cast<size_t>(shared), stream_),
             "a launch");
}

#endif

}  // namespace cisc
