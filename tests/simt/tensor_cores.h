// The instructions of csrc/tensor_cores.cuh, which includes this file, simulated: asynchronous.h.
#pragma once

#include "asynchronous.h"

namespace cisc {

using TensorMap = simt::TileMap;
using Barrier = uint64_t;

inline uint32_t shared_address(const void* shared) { return simt::shared_address(shared); }

constexpr simt::Elements elements_of(Matrix type) {
  return type == Matrix::f16    ? simt::Elements::f16
         : type == Matrix::bf16 ? simt::Elements::bf16
                                : simt::Elements::s8;
}

template <Matrix type>
void multiply_16x8(const uint32_t (&a)[4], const uint32_t (&b)[2],
                   // outputs
                   float (&sums)[4]) {
  static_assert(type != Matrix::s8, "what the instruction has");
  simt::warp_multiply(elements_of(type), a, b, sums);
}

inline void load_matrices(const void* shared_row,
                          // outputs
                          uint32_t (&to)[4]) {
  simt::load_matrices(shared_row, to);
}

inline void copy_16(const void* from, bool inside,
                    // outputs
                    void* shared) {
  simt::copy_16(from, inside, shared);
}

inline void copies_commit() { simt::copies_commit(); }

template <int pending>
void copies_wait() {
  simt::copies_wait(pending);
}

inline void barrier_set(Barrier* barrier, uint32_t arrivals) { simt::barrier_set(barrier, arrivals); }
inline void barriers_set() { simt::barriers_set(); }
inline void barrier_arrive(Barrier* barrier) { simt::barrier_arrive(barrier, simt::block_rank()); }

inline void barrier_arrive_at(Barrier* barrier, uint32_t rank) {
  simt::barrier_arrive(barrier, static_cast<int>(rank));
}

inline void barrier_expect(Barrier* barrier, uint32_t bytes) { simt::barrier_expect(barrier, bytes); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) { simt::barrier_wait(barrier, parity); }

inline void copy_tile(const TensorMap* map, int32_t column, int32_t row, Barrier* barrier,
                      // outputs
                      void* shared) {
  simt::copy_tile(1u << simt::block_rank(), map, column, row, barrier, shared);
}

inline void copy_tile_to(uint16_t ranks, const TensorMap* map, int32_t column, int32_t row, Barrier* barrier,
                         // outputs
                         void* shared) {
  simt::copy_tile(ranks, map, column, row, barrier, shared);
}

inline void prefetch_map(const TensorMap* map) { simt::check_map(map); }

inline uint32_t cluster_rank() { return static_cast<uint32_t>(simt::block_rank()); }
inline void cluster_sync() { simt::cluster_barrier(); }

template <int count>
void keep_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256, "what the instruction takes");
  simt::set_registers(count, false);
}

template <int count>
void take_registers() {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256, "what the instruction takes");
  simt::set_registers(count, true);
}

inline void meet(int number, int threads) { simt::meet(number, threads, true); }
inline void meet_without_waiting(int number, int threads) { simt::meet(number, threads, false); }

inline void products_begin() { simt::products_begin(); }
inline void products_commit() { simt::products_commit(); }

template <int pending>
void products_wait() {
  simt::products_wait(pending);
}

template <typename T, int n>
void hold(T (&)[n]) {}

template <Matrix type, bool transposed, int half>
void multiply_64(float (&sums)[half], uint64_t a, uint64_t b, bool adds) {
  static_assert(type != Matrix::s8 && (half == 32 || half == 64 || half == 128), "what the instruction has");
  simt::multiply({elements_of(type), 2 * half, transposed, adds, nullptr, a, b}, sums);
}

template <Matrix type, bool transposed, int half>
void multiply_64(float (&sums)[half], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static_assert(type != Matrix::s8 && (half == 32 || half == 64 || half == 128), "what the instruction has");
  simt::multiply({elements_of(type), 2 * half, transposed, adds, a, 0, b}, sums);
}

template <int half>
void multiply_64(int32_t (&sums)[half], uint64_t a, uint64_t b, bool adds) {
  static_assert(half == 32 || half == 64 || half == 128, "what the instruction has");
  simt::multiply({simt::Elements::s8, 2 * half, false, adds, nullptr, a, b}, sums);
}

}  // namespace cisc
