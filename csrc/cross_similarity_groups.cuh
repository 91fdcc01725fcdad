// What kernels of cross_similarity on sm_90a have in common: two warp groups that multiply and a third one
// that brings tiles.
#pragma once

#include "cross_similarity_cuts.h"
#include "tensor_cores.cuh"

namespace cisc::cross_similarity::sm90 {

constexpr int kThreads = (kGroups + 1) * kWarpGroup;
constexpr int kWarps = kGroups * kWarpGroup / kWarp;  // that multiply
constexpr int kBringsRegisters = 56, kMultipliesRegisters = 224;
constexpr int kTurn = 1;                       // the first of the named barriers that give the groups turns
constexpr uint64_t kSixteenColumns = 32 >> 4;  // of a chunk, as descriptors count
constexpr uint64_t kSixteenRows = 16 * kChunkBytes >> 4;

__device__ __forceinline__ unsigned char* tiles_in(unsigned char* memory) {
  return memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
}

}  // namespace cisc::cross_similarity::sm90
