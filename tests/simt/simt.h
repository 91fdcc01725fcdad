// CUDA's threads as coroutines of the CPU, so that CUDA sources compile as C++ and run without a GPU.
//
// The blocks of a launch run one after the other, those of a cluster together. Of a block, one thread runs up
// to a barrier or an exchange in its warp, then the next one; in which order CISC_SIMT_ORDER says (forward,
// reverse or shuffle; warps or warps_reverse: a warp goes on as far as it can before another one does): a
// kernel that lacks a barrier gives other results in another order. Shared memory holds NaN when a block
// starts. Threads that wait at different barriers end the process, as does a warp's exchange in which some do
// not take part. CISC_SIMT_CHIP (75, 80, 89 or 90) is the chip: what shared memory it has, and which of the
// instructions in asynchronous.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict

namespace simt {

constexpr int64_t kSharedStart = 1024;  // address of the dynamic shared memory; what is below, no block has
constexpr int kMostThreads = 1024, kMostCluster = 4;

struct Index {
  unsigned x;
};

// Of the thread that runs.
extern Index thread, block, block_size, grid_size;

int64_t multiprocessors();  // CISC_SIMT_MULTIPROCESSORS, default 3
int chip();                 // CISC_SIMT_CHIP, default 75
int64_t shared_limit();     // bytes that a block may have
void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& body, int cluster = 1);
void block_barrier();
void warp_barrier();
void cluster_barrier();

// End the process with a message that names the thread.
[[noreturn]] void stop(const std::string& what);

// Something that a thread waits for.
struct Condition {
  virtual ~Condition() = default;
  virtual bool holds() const = 0;
  virtual std::string what() const = 0;
};
void wait_until(const Condition& condition);

// The thread that runs, among those of its cluster; how many there are in a block, and how many blocks.
int self();
int block_threads();
int cluster_blocks();
int block_rank();
bool block_has_ended(int rank);
int64_t cluster_barriers();  // how many the cluster has passed

// Number of this exchange of the warp, 0 or 1 by turns: where threads leave what others read after
// warp_barrier.
int next_exchange();

// What goes on beside the threads: `start` with a cluster; `progress`, when no thread can go on, does some of
// it or returns false; `ended` with a thread.
struct Beside {
  void (*start)();
  bool (*progress)();
  void (*ended)(int thread);
};
extern Beside beside;

// Of the block that runs, or of one of its cluster.
unsigned char* dynamic_shared();
unsigned char* dynamic_shared(int rank);
int64_t dynamic_bytes();
// Whether bytes are the block's shared memory.
bool is_shared(const void* first, int64_t bytes);

// Memory of `bytes` that is the block's; filled with 0xff when a block meets it first.
unsigned char* shared_bytes(unsigned char* memory, int64_t* filled_for, size_t bytes);

template <typename T, int number>
T& shared() {
  alignas(16) static unsigned char memory[sizeof(T)];
  static int64_t filled_for = -1;
  return *reinterpret_cast<T*>(shared_bytes(memory, &filled_for, sizeof(T)));
}

// Give `value` to the warp; the value of thread `from` of it comes back.
uint64_t exchange(uint64_t value, int from);
// One bit of each thread of the warp.
uint32_t ballot(bool value);
// Threads of the warp that give the same bits.
uint32_t match(uint64_t value);
int lane();

template <typename T>
T exchanged(T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void want_all(unsigned mask);

template <typename To, typename From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// What a fast instruction makes of an exact result: off by up to 2^-22 of it, the same for the same, and 0
// below the normal range. Powers of two stay.
inline float rough(float exact) {
  const auto bits = bits_of<uint32_t>(exact);
  if ((bits & 0x7f800000) == 0x7f800000 || (bits & 0x007fffff) == 0) return exact;
  if ((bits & 0x7f800000) == 0) return 0.0f;
  const uint32_t hash = bits * 2654435761u;
  const double share = static_cast<double>(hash) / 2147483648.0 - 1.0;  // in [-1,1)
  return static_cast<float>(exact * (1.0 + share * 0x1p-22));
}

}  // namespace simt

#define threadIdx ::simt::thread
#define blockIdx ::simt::block
#define blockDim ::simt::block_size
#define gridDim ::simt::grid_size

inline void __syncthreads() { simt::block_barrier(); }

inline void __syncwarp(unsigned mask = ~0u) {
  simt::want_all(mask);
  simt::warp_barrier();
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  simt::want_all(mask);
  return simt::exchanged(value, from & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  simt::want_all(mask);
  return simt::exchanged(value, simt::lane() ^ bits);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  simt::want_all(mask);
  const int from = simt::lane() - static_cast<int>(distance);
  return simt::exchanged(value, from < 0 ? simt::lane() : from);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  simt::want_all(mask);
  const int from = simt::lane() + static_cast<int>(distance);
  return simt::exchanged(value, from > 31 ? simt::lane() : from);
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  simt::want_all(mask);
  return simt::ballot(value);
}

// match.any.sync: which threads have the same bits.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  simt::want_all(mask);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::match(bits);
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }

// One thread runs at a time.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

template <typename T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}

inline float __uint_as_float(unsigned bits) { return simt::bits_of<float>(bits); }
inline unsigned __float_as_uint(float value) { return simt::bits_of<unsigned>(value); }
inline float __int_as_float(int bits) { return simt::bits_of<float>(bits); }
inline int __float_as_int(float value) { return simt::bits_of<int>(value); }
inline int __vimax3_s32(int a, int b, int c) {
  const int most = a > b ? a : b;
  return most > c ? most : c;
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
using std::exp2f;

using std::fma;
using std::fmaf;
using std::isfinite;
using std::isnan;
using std::log2;
