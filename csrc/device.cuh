// What CUDA sources (*.cu) are written with: element types, shared memory, warps, launches.
//
// The same sources compile as C++ (CISC_SIMT, tests/simt/simt.h), where threads of a block run one after the
// other up to each barrier: that is how they are tested without a GPU. So they launch by Gpu::launch, declare
// shared memory by the macros below, and use of CUDA only what simt.h has too.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

#ifdef CISC_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "checks.h"
#include "convert.h"
#include "labels.h"

#ifdef CISC_SIMT
// name: a variable of the type behind it that all threads of a block share; it holds NaN at first.
#define CISC_SHARED(name, ...)       \
  using name##_shared = __VA_ARGS__; \
  name##_shared& name = ::simt::shared<name##_shared, __COUNTER__>()
// name: the shared memory that the launch has asked for, aligned to 16 bytes; to 1024 if it is all there is.
#define CISC_DYNAMIC_SHARED(name) unsigned char* name = ::simt::dynamic_shared()
// Defines the schemas of a file's operators, which in the usual library the C++ kernels' files do.
#define CISC_DEFINE(...)                                    \
  STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {              \
    for (const char* schema : {__VA_ARGS__}) m.def(schema); \
  }
#define CISC_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m)
#else
#define CISC_SHARED(name, ...)       \
  using name##_shared = __VA_ARGS__; \
  __shared__ name##_shared name
#define CISC_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define CISC_DEFINE(...)
#define CISC_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CUDA, m)
#endif

namespace cisc {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;  // threads of a warp

#ifdef CISC_SIMT
constexpr Place kHere = Place::cpu;
#else
constexpr Place kHere = Place::cuda;
#endif

// Elements of features and logits.
struct Float32 {
  float value;
  __device__ float widen() const { return value; }
  __device__ static Float32 narrow(float v) { return {v}; }
};

struct BFloat16 {
  uint16_t bits;
  __device__ float widen() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static BFloat16 narrow(float v) {
#ifdef CISC_SIMT
    return {BF16::narrow(v).bits};
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#endif
  }
};

struct Float16 {
  uint16_t bits;
#ifdef CISC_SIMT
  float widen() const { return F16{bits}.widen(); }
  static Float16 narrow(float v) { return {F16::narrow(v).bits}; }
#else
  __device__ float widen() const { return __half2float(__ushort_as_half(bits)); }
  __device__ static Float16 narrow(float v) { return {__half_as_ushort(__float2half_rn(v))}; }
#endif
};

// f(element type's value) for the type that `kind` names.
template <typename Function>
void with_float(Float kind, const Function& f) {
  switch (kind) {
    case Float::f32:
      return f(Float32{});
    case Float::bf16:
      return f(BFloat16{});
    case Float::f16:
      return f(Float16{});
  }
}

// f(pointer to the elements of the type that `kind` names), in a kernel
template <typename Function>
__device__ __forceinline__ auto with_elements(Float kind, const void* data, const Function& f) {
  switch (kind) {
    case Float::f32:
      return f(static_cast<const Float32*>(data));
    case Float::bf16:
      return f(static_cast<const BFloat16*>(data));
    default:
      return f(static_cast<const Float16*>(data));
  }
}

template <typename Function>
__device__ __forceinline__ auto with_elements(Float kind, void* data, const Function& f) {
  switch (kind) {
    case Float::f32:
      return f(static_cast<Float32*>(data));
    case Float::bf16:
      return f(static_cast<BFloat16*>(data));
    default:
      return f(static_cast<Float16*>(data));
  }
}

// n neighbours, read or written at once: 16 bytes at most; aligned to all of them.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

template <int n, typename T>
__device__ __forceinline__ Pack<T, n> read_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <int n, typename T>
__device__ __forceinline__ void write_pack(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// Of one float what pixel_loss.h asks for.
__device__ __forceinline__ float select(bool condition, float a, float b) { return condition ? a : b; }
__device__ __forceinline__ bool less(float a, float b) { return a < b; }
__device__ __forceinline__ bool at_most(float a, float b) { return a <= b; }
__device__ __forceinline__ float log(float a) { return logf(a); }
// NaN where b is NaN
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ float min(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float max(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#else
__device__ __forceinline__ float min(float a, float b) { return a < b ? a : b; }
__device__ __forceinline__ float max(float a, float b) { return a > b ? a : b; }
#endif

// 2^a to 2^-22 of it; what lies below the normal range is 0.
__device__ __forceinline__ float fast_exp2(float a) {
#ifdef CISC_SIMT
  return simt::rough(std::exp2(a));
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#endif
}

// a / b to 2 units in the last place, for b up to 2^126.
__device__ __forceinline__ float fast_quotient(float a, float b) {
#ifdef CISC_SIMT
  return simt::rough(a / b);
#else
  return __fdividef(a, b);
#endif
}

// The quotient of pixel_loss.h.
__device__ __forceinline__ float quotient(float a, float b) { return fast_quotient(a, b); }

// a / b all but rounded to nearest: what the fast quotient has missed is added.
__device__ __forceinline__ float close_quotient(float a, float b) {
  const float quotient = fast_quotient(a, b);
  return quotient + fast_quotient(fmaf(-quotient, b, a), b);
}

// The same number, of which the compiler knows nothing: so it adds a 32-bit offset to pointers where they are
// read, in one instruction, and does not carry each of them on, in two or more.
template <typename T>
__device__ __forceinline__ T opaque(T value) {
#ifndef CISC_SIMT
  if constexpr (sizeof(T) == 4) asm("" : "+r"(value));
#endif
  return value;
}

// The same pointer, which the compiler keeps in a register instead of computing it where it is used.
template <typename T>
__device__ __forceinline__ T* held(T* pointer) {
#ifndef CISC_SIMT
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// Sum over a warp, the same to all of its threads, in a fixed order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance);
  }
  return value;
}

// Sum over a block of kThreads, to its first thread, in a fixed order. All threads take part.
template <int kThreads, typename T>
__device__ T block_sum(T value) {
  CISC_SHARED(of_warp, T[kThreads / kWarp]);
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) value += of_warp[i];
  }
  return value;
}

// Whether any class is below -1, which is none. All threads of a block take part.
template <int kThreads>
__device__ bool any_below_none(const Classes& classes) {
  CISC_SHARED(found, int);
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const int64_t count = classes.batch * classes.slots;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (classes.at(i / classes.slots, i % classes.slots) < -1) found = 1;  // whoever writes, the same
  }
  __syncthreads();
  return found != 0;
}

// The GPU that a tensor is on, for the length of an operator's host function: it is the current one, and
// launches go to its current stream. Nothing here waits for it.
class Gpu {
 public:
  // Refuses a tensor elsewhere, and a GPU that the kernels do not run on.
  Gpu(const char* op, const char* name, const Tensor& tensor);

  const char* op() const { return op_; }
  int64_t multiprocessors() const { return multiprocessors_; }

  // 75 is compute capability 7.5.
  int capability() const { return capability_; }

  // Most shared memory that a block may ask for.
  int64_t shared_bytes() const { return shared_bytes_; }

  // Whether wrong values of labels and classes raise at once, though that waits for the GPU: CISC_CHECK=1.
  static bool checks_values();

  // Threads along x only, `blocks` of them as the grid; none is no launch.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              Arguments... arguments) const {
    launch_clusters(kernel, 1, blocks, threads, shared, arguments...);
  }

  // The same of a kernel that declares clusters of `cluster` blocks by __cluster_dims__.
  template <typename... Parameters, typename... Arguments>
  void launch_clusters(void (*kernel)(Parameters...), [[maybe_unused]] int cluster, int64_t blocks,
                       int threads, int64_t shared, Arguments... arguments) const {
    if (blocks == 0) return;
    check(blocks <= INT32_MAX, op_, "this shape needs ", blocks, " blocks, more than a GPU takes");
#ifdef CISC_SIMT
    simt::launch(blocks, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); }, cluster);
#else
    std::tuple<Parameters...> values{static_cast<Parameters>(arguments)...};
    std::apply(
        [&](Parameters&... value) {
          void* pointers[] = {static_cast<void*>(&value)..., nullptr};
          launch_raw(reinterpret_cast<const void*>(kernel), blocks, threads, shared, pointers);
        },
        values);
#endif
  }

 private:
  void launch_raw(const void* kernel, int64_t blocks, int threads, int64_t shared, void** pointers) const;

  const char* op_;
  int64_t multiprocessors_ = 0, shared_bytes_ = 0;
  int capability_ = 0;
#ifndef CISC_SIMT
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

// Contiguous memory on the GPU of `like`, not filled.
inline Tensor device_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

inline Tensor device_zeros(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_zeros(like, {size.data(), size.size()}, dtype);
}

// A gradient of the shape of `like` if `wanted`, else no elements; float32, not filled.
inline Tensor device_gradient(const Tensor& like, bool wanted) {
  const auto shape = like.sizes();
  return device_empty(like,
                      wanted ? std::vector<int64_t>(shape.begin(), shape.end()) : std::vector<int64_t>{0},
                      ScalarType::Float);
}

template <typename T>
T* data_of(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A copy on the CPU, for what CISC_CHECK=1 looks at: waits for the GPU.
Tensor on_cpu(const Tensor& tensor);

// NaN in all `values`, contiguous, if any class is below -1.
// classes: [B,S] int32 or int64
// values: float32, bfloat16 or float16
void spoil(const Gpu& gpu, const Tensor& classes,
           // outputs
           Tensor& values);

// Where Gpu::checks_values(): raise for a label that is neither in [0, num_classes) nor ignore_index.
void check_label_values(const char* op, const Tensor& labels, int64_t num_classes, int64_t ignore_index);

// The same for a class that is neither -1 nor in [0, limit).
void check_class_values(const char* op, const Tensor& classes, int64_t limit = INT64_MAX);

}  // namespace cisc
