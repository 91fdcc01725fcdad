// What the files behind asynchronous.h share: warps.cpp, barriers.cpp and asynchronous.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

constexpr int kWarp = 32, kGroup = 128;  // threads of a warp, of a warp group

void want_chip(int least);

// Bytes of a block's dynamic shared memory.
struct Range {
  int rank;
  int64_t first, end;
  bool meets(const Range& other) const {
    return rank == other.rank && first < other.end && other.first < end;
  }
};

// Of this block, with the place of its memory.
Range range_of(const void* shared, int64_t bytes);

// --- warps.cpp ---

void start_warps(size_t blocks, size_t threads, bool late_copies);
bool has_copies(int thread);  // of 16 bytes, on their way

// --- barriers.cpp ---

void start_barriers(size_t threads);
// The barrier at the same place in a block, for copies to it.
uint64_t* barrier_of_copies(uint64_t* barrier, int rank);
void count_copied(int64_t bytes, uint64_t* barrier);

}  // namespace simt
