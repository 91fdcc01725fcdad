// Where elements lie that tensor cores multiply. Shared by host and device code; needs no torch header.
#pragma once

#include <cstdint>

#include "bilinear.h"

namespace cisc {

constexpr int kWarpGroup = 128;                 // threads that multiply together on sm_90a
constexpr int kChunkBytes = 128;                // of a row, that lie together in a tile in shared memory
constexpr int kSwizzleBytes = 8 * kChunkBytes;  // tiles start at multiples of it

namespace fragments {

// An accumulator of m16n8, or of 16 rows of a warp and n columns: a thread has n / 8 times four numbers,
// number `i` of which is at (row, column). lane: of the warp.
CISC_HD constexpr int row(int lane, int i) { return lane / 4 + i % 4 / 2 * 8; }
CISC_HD constexpr int column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Rows of m64 that a warp of a warp group has: 16 from this one on.
CISC_HD constexpr int first_row(int warp) { return warp % 4 * 16; }

// Where TMA puts byte `byte` < 128 of row `row` of a tile, and wgmma looks for it.
CISC_HD constexpr int swizzled(int row, int byte) { return row * kChunkBytes + (byte ^ row % 8 * 16); }

// What wgmma is told of a tile in shared memory that starts at `address`, 1024 bytes to each 8 rows.
// Rows of 128 bytes along the products' sum; an instruction further on in a row adds its bytes to the
// address.
CISC_HD constexpr uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | uint64_t{1} << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | uint64_t{1} << 62;
}

// The same tile from `bytes` further on: addresses leave the upper half as it is.
CISC_HD constexpr uint64_t further(uint64_t descriptor, int bytes) {
  const auto low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}

// The same, where the sum goes along the rows: the next 64 columns of the result are `pitch` bytes further
// on.
CISC_HD constexpr uint64_t transposed_descriptor(uint32_t address, uint32_t pitch) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(pitch >> 4) << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace fragments

}  // namespace cisc
