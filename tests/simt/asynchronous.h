// What runs beside a block's threads, as coroutines of simt.h meet it: copies, barriers in shared memory, and
// products of tensor cores. tensor_cores.h gives it the names that kernels use.
//
// CISC_SIMT_ASYNC says when it happens: late (the default: a copy of a tile or a product only when no thread
// can go on without one, in any order; copies of 16 bytes and what products write when they are waited for),
// early (all as soon as it is asked for) or mixed (copies early, products late). What is on its way is spoilt
// meanwhile: a late copy's place in shared memory, the sums of late products. Wrong uses end the process, and
// so do copies and products that would race, whichever comes first here. There is no fence.proxy.async: where
// a thread has changed a byte of shared memory, a product must not read, nor a copy of a tile go.
//
// Written from the description of the instructions (PTX ISA, chapters on mma, cp.async, mbarrier and wgmma),
// not from what kernels compute addresses with, so that each checks the other.
#pragma once

#include <cstdint>

namespace simt {

enum class Elements { f16, bf16, s8 };

// Rows of a matrix in memory, and the tile of it that a copy brings: box_rows rows of 128 bytes.
struct alignas(64) TileMap {
  const unsigned char* data;
  int64_t rows, columns;
  int element_bytes, box_rows;
  uint32_t mark;
};

TileMap tile_map(Elements type, const void* data, int64_t rows, int64_t columns, int box_rows);

uint32_t shared_address(const void* shared);

// --- sm_80 ---

void warp_multiply(Elements type, const uint32_t* a, const uint32_t* b,
                   // outputs
                   float* sums);
void load_matrices(const void* row,
                   // outputs
                   uint32_t* to);
void copy_16(const void* from, bool inside,
             // outputs
             void* shared);
void copies_commit();
void copies_wait(int pending);

// --- sm_90a ---

void barrier_set(uint64_t* barrier, uint32_t arrivals);
void barriers_set();
void barrier_arrive(uint64_t* barrier, int rank);  // of the block of the cluster that has it
void barrier_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(const uint64_t* barrier, uint32_t parity);

// To each block of the cluster that has a bit.
void copy_tile(uint32_t ranks, const TileMap* map, int64_t column, int64_t row, uint64_t* barrier,
               // outputs
               void* shared);
void check_map(const TileMap* map);

void set_registers(int count, bool more);

void meet(int number, int threads, bool waits);

// One instruction of a warp group: sums of 64 rows.
struct Product {
  Elements type;
  int columns;
  bool transposed, adds;
  const uint32_t* registers;  // the first factor, of 16 bits each, or none
  uint64_t a, b;              // descriptors
};

void products_begin();
void multiply(const Product& product,
              // outputs
              void* sums);
void products_commit();
void products_wait(int pending);

}  // namespace simt
