// Tensor cores and what feeds them: fragments, swizzled tiles, asynchronous copies, barriers, clusters.
//
// mma.sync and cp.async from sm_80 on; wgmma, TMA, mbarriers and clusters on sm_90a. Where elements lie is in
// `fragments`, functions for host and device; what the instructions do with them is simulated in
// tests/simt/tensor_cores.h, written from the description of the instructions and not from these functions.
// Source: PTX ISA 9.0, "Matrix multiply-accumulate" and "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cstdint>

#include "device.cuh"
#include "fragments.h"

#ifndef CISC_SIMT
#include <cuda.h>
#endif

#if defined(CISC_SIMT) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CISC_HOPPER 1  // this pass of the compiler makes code of sm_90a
#endif

namespace cisc {

enum class Matrix { f16, bf16, s8 };  // elements of tiles

#ifdef CISC_SIMT
}  // namespace cisc
#include "tensor_cores.h"
namespace cisc {
#else

using TensorMap = CUtensorMap;
using Barrier = uint64_t;  // in shared memory

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Barriers 1 to 15 of some warps: `threads` of them, of which those that only arrive do not wait.
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void meet_without_waiting(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- sm_80: a warp multiplies ---

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// sums [16,8] += a [16,16] times b [16,8]
template <Matrix type>
__device__ __forceinline__ void multiply_16x8(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                              // outputs
                                              float (&sums)[4]) {
  if constexpr (type == Matrix::bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four matrices [8,8] of 16 bits; lanes 8 i to 8 i + 7 name the rows of number i, 16 bytes each.
__device__ __forceinline__ void load_matrices(const void* shared_row,
                                              // outputs
                                              uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// 16 bytes, on their way until copies_wait; zeros unless `inside`.
__device__ __forceinline__ void copy_16(const void* from, bool inside,
                                        // outputs
                                        void* shared) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the `pending` last groups of this thread's copies are on their way.
template <int pending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

// --- sm_90a ---

#ifdef CISC_HOPPER

// A barrier that takes `arrivals` and the bytes that copies to it have been expected to bring.
__device__ __forceinline__ void barrier_set(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// Barriers that were set become known to copies and to the cluster.
__device__ __forceinline__ void barriers_set() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive at the barrier that block `rank` of the cluster has at the same place. It orders products, which are
// made once they have been waited for, and copies; for what threads have written themselves it would need
// .release.cluster, a fence of the whole GPU each time.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrive, and expect bytes.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of this parity is over: the first phase has 0. Of a new barrier, that of 1 is. What copies
// have brought is there then; .acquire.cluster would throw L1 away each time.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A tile of the map's box from (column, row) on, swizzled; its bytes arrive at the barrier. Threads must not
// have written where it goes, nor to what products read: that takes fence.proxy.async, which is not here.
__device__ __forceinline__ void copy_tile(const TensorMap* map, int32_t column, int32_t row, Barrier* barrier,
                                          // outputs
                                          void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same to the same place in each block of the cluster that has a bit, and to its barrier.
__device__ __forceinline__ void copy_tile_to(uint16_t ranks, const TensorMap* map, int32_t column,
                                             int32_t row, Barrier* barrier,
                                             // outputs
                                             void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "h"(ranks), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers of each thread of the warp group from here on, fewer or more than now.
template <int count>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// What registers hold is ready for products.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most the `pending` last groups of products are being made.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// The compiler may not move what it does with these registers across.
template <typename T, int n>
__device__ __forceinline__ void hold(T (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 4 && static_cast<T>(0.5) != T{}) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

#endif  // CISC_HOPPER
#endif  // CISC_SIMT

// Of a matrix [rows,columns] whose rows follow each other, what copy_tile is told: tiles of box_rows rows and
// 128 bytes of columns, with zeros outside. data: aligned to 16 bytes, as are the rows.
TensorMap tensor_map(const Gpu& gpu, Matrix type, const void* data, int64_t rows, int64_t columns,
                     int box_rows);

}  // namespace cisc

#if defined(CISC_HOPPER) && !defined(CISC_SIMT)
#include "wgmma.cuh"
#endif
