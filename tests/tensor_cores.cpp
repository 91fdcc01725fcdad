// The program of test_tensor_cores.py: kernels on the simulated tensor cores, right ones and broken ones.

#include "tensor_cores.cuh"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace cisc {
namespace {

using Numbers = std::vector<int>;  // a matrix of small whole numbers, exact in every type

Numbers numbers(int64_t count, unsigned seed) {
  Numbers result(static_cast<size_t>(count));
  for (int& value : result) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<int>(seed >> 24) % 9 - 4;
  }
  return result;
}

// The same as the type's elements, at a multiple of 16 bytes.
class Elements {
 public:
  Elements(Matrix type, const Numbers& from) : memory_(from.size() / 8 + 1) {
    auto* const bytes = reinterpret_cast<unsigned char*>(memory_.data());
    for (size_t i = 0; i < from.size(); ++i) {
      const auto value = static_cast<float>(from[i]);
      if (type == Matrix::s8) {
        bytes[i] = static_cast<unsigned char>(from[i]);
      } else {
        const uint16_t bits =
            type == Matrix::f16 ? Float16::narrow(value).bits : BFloat16::narrow(value).bits;
        std::memcpy(bytes + 2 * i, &bits, 2);
      }
    }
  }
  const uint16_t* data() const { return reinterpret_cast<const uint16_t*>(memory_.data()); }

 private:
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };
  std::vector<Chunk> memory_;
};

int count_wrong = 0;

template <typename T>
void compare(const std::vector<T>& got, const Numbers& want) {
  for (size_t i = 0; i < want.size(); ++i) count_wrong += !(got[i] == static_cast<T>(want[i]));
}

// start [rows,columns] + a [rows,depth] times b, which is [columns,depth], or [depth,columns] if transposed
Numbers product(const Numbers& a, const Numbers& b, int rows, int columns, int depth, bool transposed) {
  Numbers c(static_cast<size_t>(rows * columns));
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      int sum = 0;
      for (int k = 0; k < depth; ++k) {
        sum += a[static_cast<size_t>(i * depth + k)] *
               b[static_cast<size_t>(transposed ? k * columns + j : j * depth + k)];
      }
      c[static_cast<size_t>(i * columns + j)] = sum;
    }
  }
  return c;
}

// --- one tile, multiplied by a warp group ---

struct Tile {
  TensorMap a, b;
  bool from_registers, adds;
  void* to;  // [64,columns]
};

template <Matrix type, bool transposed, int half, typename T>
__global__ void one_tile(const __grid_constant__ Tile p) {
  constexpr int kColumns = 2 * half;
  CISC_DYNAMIC_SHARED(memory);
  unsigned char* const b = memory + 64 * kChunkBytes;
  auto* const barrier = reinterpret_cast<Barrier*>(b + kColumns * kChunkBytes);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) {
    barrier_set(barrier, 1);
    barriers_set();
    prefetch_map(&p.a);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(barrier, (64 + kColumns) * kChunkBytes);
    copy_tile(&p.a, 0, 0, barrier, memory);
    if (transposed) {
      for (int i = 0; i < kColumns / 64; ++i) {
        copy_tile(&p.b, i * 64, 0, barrier, b + i * 64 * kChunkBytes);
      }
    } else {
      copy_tile(&p.b, 0, 0, barrier, b);
    }
  }
  barrier_wait(barrier, 0);
  T sums[half];
  for (int i = 0; i < half; ++i) {
    sums[i] =
        static_cast<T>(fragments::first_row(warp) + fragments::row(lane, i) - 2 * fragments::column(lane, i));
  }
  uint32_t rows[4][4];
  for (int k = 0; k < 4; ++k) {
    const int row = fragments::first_row(warp) + lane % 16;
    load_matrices(memory + fragments::swizzled(row, 32 * k + lane / 16 * 16), rows[k]);
  }
  products_begin();
  for (int k = 0; k < 4; ++k) {
    const uint64_t second = transposed ? fragments::transposed_descriptor(
                                             shared_address(b + 2 * k * kSwizzleBytes), 64 * kChunkBytes)
                                       : fragments::descriptor(shared_address(b + 32 * k));
    const uint64_t first = fragments::descriptor(shared_address(memory + 32 * k));
    const bool adds = k > 0 || p.adds;
    if constexpr (type == Matrix::s8) {
      multiply_64(sums, first, second, adds);
    } else {
      if (p.from_registers) {
        multiply_64<type, transposed>(sums, rows[k], second, adds);
      } else {
        multiply_64<type, transposed>(sums, first, second, adds);
      }
    }
  }
  products_commit();
  products_wait<0>();
  hold(sums);
  for (int i = 0; i < half; ++i) {
    const int row = fragments::first_row(warp) + fragments::row(lane, i);
    static_cast<T*>(p.to)[row * kColumns + fragments::column(lane, i)] = sums[i];
  }
}

template <Matrix type, bool transposed, int half>
void check_tile() {
  using T = std::conditional_t<type == Matrix::s8, int32_t, float>;
  constexpr int kColumns = 2 * half, kDepth = type == Matrix::s8 ? 128 : 64;
  for (int variant = 0; variant < 4; ++variant) {
    if (type == Matrix::s8 && variant % 2 == 1) continue;  // registers are for 16 bits
    const Numbers a = numbers(64 * kDepth, 1 + variant), b = numbers(kColumns * kDepth, 9 + variant);
    const Elements left(type, a), right(type, b);
    std::vector<T> to(64 * kColumns);
    const simt::Elements elements = elements_of(type);
    const Tile p{simt::tile_map(elements, left.data(), 64, kDepth, 64),
                 transposed ? simt::tile_map(elements, right.data(), kDepth, kColumns, kDepth)
                            : simt::tile_map(elements, right.data(), kColumns, kDepth, kColumns),
                 variant % 2 == 1, variant >= 2, to.data()};
    simt::launch(1, kWarpGroup, (64 + kColumns) * kChunkBytes + 8,
                 [&] { one_tile<type, transposed, half, T>(p); });
    Numbers want = product(a, b, 64, kColumns, kDepth, transposed);
    for (int i = 0; p.adds && i < 64 * kColumns; ++i) {
      want[static_cast<size_t>(i)] += i / kColumns - 2 * (i % kColumns);
    }
    compare(to, want);
  }
}

// --- the tile's rows and columns that do not exist are zeros ---

__global__ void edges(const __grid_constant__ Tile p) {
  CISC_DYNAMIC_SHARED(memory);
  auto* const barrier = reinterpret_cast<Barrier*>(memory + 16 * kChunkBytes);
  if (threadIdx.x == 0) {
    barrier_set(barrier, 1);
    barriers_set();
    barrier_expect(barrier, 16 * kChunkBytes);
    copy_tile(&p.a, -5, -3, barrier, memory);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 16 * 64; i += kWarp) {
    const unsigned char* at = memory + fragments::swizzled(i / 64, i % 64 * 2);
    static_cast<float*>(p.to)[i] = reinterpret_cast<const Float16*>(at)->widen();
  }
}

void check_edges() {
  const Numbers a = numbers(10 * 40, 3);
  const Elements left(Matrix::f16, a);
  std::vector<float> to(16 * 64);
  const TensorMap map = simt::tile_map(simt::Elements::f16, left.data(), 10, 40, 16);
  const Tile p{map, map, false, false, to.data()};
  simt::launch(1, kWarp, 16 * kChunkBytes + 8, [&] { edges(p); });
  Numbers want(16 * 64);
  for (int i = 0; i < 16 * 64; ++i) {
    const int y = i / 64 - 3, x = i % 64 - 5;
    if (y >= 0 && y < 10 && x >= 0 && x < 40)
      want[static_cast<size_t>(i)] = a[static_cast<size_t>(y * 40 + x)];
  }
  compare(to, want);
}

// --- a warp's products ---

// to [16,16] = a [16,16] times b, of which the rows [16,16] go along the sum
template <Matrix type, bool plain>
__global__ void warp_tile(const uint16_t* a, const uint16_t* b, const std::string& broken, float* to) {
  CISC_DYNAMIC_SHARED(memory);
  constexpr int kPitch = 48, kOffset = plain ? 0 : 64;  // bytes
  const auto place = [&](int row, int byte) {
    return memory + (plain ? row * kPitch + byte : fragments::swizzled(row, kOffset + byte));
  };
  const int lane = threadIdx.x;
  copy_16(b + lane * 8, true, place(lane / 2, lane % 2 * 16));
  copies_commit();
  if (broken == "too_few_copies_waited") copies_wait<1>();
  if (broken.empty()) copies_wait<0>();
  __syncwarp();
  uint32_t first[4], second[4];
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = a[fragments::row(lane, i) * 16 + fragments::column(lane, i)];
    first[i / 2] = i % 2 == 0 ? bits : first[i / 2] | bits << 16;
  }
  const int row = lane % 8, matrix = lane / 8;
  load_matrices(place(matrix / 2 * 8 + row, matrix % 2 * 16), second);
  if (broken == "waits_after_reading") copies_wait<0>();
  float sums[2][4] = {};
  for (int j = 0; j < 2; ++j) {
    multiply_16x8<type>(first, {second[2 * j], second[2 * j + 1]}, sums[j]);
    for (int i = 0; i < 4; ++i) {
      to[fragments::row(lane, i) * 16 + 8 * j + fragments::column(lane, i)] = sums[j][i];
    }
  }
}

template <Matrix type, bool plain>
void check_warp(const std::string& broken = "") {
  const Numbers a = numbers(256, 5), b = numbers(256, 6);
  const Elements left(type, a), right(type, b);
  std::vector<float> to(256);
  simt::launch(1, kWarp, 16 * kChunkBytes,
               [&] { warp_tile<type, plain>(left.data(), right.data(), broken, to.data()); });
  compare(to, product(a, b, 16, 16, 16, false));
}

// --- a pipeline of two blocks ---

constexpr int kStages = 3, kSteps = 8, kBlocks = 2, kGroups = 2, kColumns = 64;
constexpr int kChunk = kChunkBytes / 2;  // numbers of 16 bits
constexpr int kRows = kGroups * 64, kDepth = kSteps * kChunk;
constexpr int kTileBytes = (kRows + kColumns) * kChunkBytes;
constexpr int kPipelineShared = kStages * kTileBytes + 2 * kStages * 8;

struct Pipeline {
  TensorMap a, b;
  float* to;  // [2 kRows,kColumns]
};

// Each block has rows of a, and brings half of the rows of b to both.
__global__ void __cluster_dims__(kBlocks, 1, 1)
    pipeline(const __grid_constant__ Pipeline p, const std::string& broken) {
  CISC_DYNAMIC_SHARED(memory);
  auto* const full = reinterpret_cast<Barrier*>(memory + kStages * kTileBytes);
  Barrier* const empty = full + kStages;
  const uint32_t rank = cluster_rank();
  const int thread = threadIdx.x % kWarpGroup, group = static_cast<int>(threadIdx.x) / kWarpGroup - 1;
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0 && broken != "no_barriers") {
    for (int i = 0; i < kStages; ++i) {
      barrier_set(full + i, 1);
      barrier_set(empty + i, kGroups * kBlocks);
    }
    if (broken != "no_barriers_set") barriers_set();
  }
  if (broken != "no_first_cluster_sync") cluster_sync();
  if (broken == "no_first_cluster_sync") __syncthreads();
  if (group < 0) {
    keep_registers<40>();
    if (thread == 0) {
      for (int step = 0; step < kSteps; ++step) {
        const int stage = step % kStages, turn = step / kStages % 2;
        unsigned char* const tile = memory + stage * kTileBytes + (broken == "misaligned" ? 128 : 0);
        if (broken != "no_wait_for_empty") barrier_wait(empty + stage, turn ^ 1);
        const int more = broken == "too_many_bytes"     ? 16
                         : broken == "part_of_a_copy"   ? -16
                         : broken == "all_but_one_copy" ? -kColumns / 2 * kChunkBytes
                                                        : 0;
        barrier_expect(full + stage, kTileBytes + more);
        if (broken == "arrives_twice") barrier_arrive(full + stage);
        const int row = static_cast<int>(blockIdx.x) * kRows, half = static_cast<int>(rank) * kColumns / 2;
        copy_tile(&p.a, step * kChunk, row, full + stage, tile);
        copy_tile_to(3, &p.b, step * kChunk, half, full + stage, tile + (kRows + half) * kChunkBytes);
      }
    }
  } else {
    take_registers<232>();
    float sums[kColumns / 2];
    const auto release = [&](int step) {
      if (thread < kBlocks && broken != "never_released") {
        barrier_arrive_at(empty + step % kStages, static_cast<uint32_t>(thread));
      }
    };
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages, turn = step / kStages % 2;
      if (broken != "no_wait_for_full") barrier_wait(full + stage, turn);
      const uint32_t tile = shared_address(memory + stage * kTileBytes);
      if (broken != "no_products_begin") products_begin();
      for (int k = 0; k < 4; ++k) {
        const uint32_t other = broken == "different_products" && thread >= 96 ? 32 : 0;
        multiply_64<Matrix::f16, false>(
            sums, fragments::descriptor(tile + group * 64 * kChunkBytes + 32 * k + (k < 3 ? other : 0)),
            fragments::descriptor(tile + kRows * kChunkBytes + 32 * k), step > 0 || k > 0);
      }
      products_commit();
      if (broken == "released_early") release(step);
      if (broken == "sums_changed" && step == 0) sums[0] = 0.0f;
      products_wait<1>();
      hold(sums);
      if (step > 0 && broken != "released_early") release(step - 1);
    }
    if (broken != "no_products_wait" && broken != "sums_read_early") products_wait<0>();
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = static_cast<int>(blockIdx.x) * kRows + group * 64 +
                      fragments::first_row(thread / kWarp) + fragments::row(lane, i);
      p.to[row * kColumns + fragments::column(lane, i)] = sums[i];
    }
    if (broken == "sums_read_early") products_wait<0>();
    if (broken != "released_early") release(kSteps - 1);
  }
  if (broken != "no_last_cluster_sync") cluster_sync();
}

void check_pipeline(const std::string& broken) {
  constexpr int kClusters = 2;
  const Numbers a = numbers(kClusters * kBlocks * kRows * kDepth, 7), b = numbers(kColumns * kDepth, 8);
  const Elements left(Matrix::f16, a), right(Matrix::f16, b);
  std::vector<float> to(kClusters * kBlocks * kRows * kColumns);
  const Pipeline p{
      simt::tile_map(simt::Elements::f16, left.data(), kClusters * kBlocks * kRows, kDepth, kRows),
      simt::tile_map(simt::Elements::f16, right.data(), kColumns, kDepth, kColumns / 2), to.data()};
  simt::launch(
      kClusters * kBlocks, (kGroups + 1) * kWarpGroup, kPipelineShared, [&] { pipeline(p, broken); },
      kBlocks);
  compare(to, product(a, b, kClusters * kBlocks * kRows, kColumns, kDepth, false));
}

// --- single instructions ---

// The first factor in registers, which stay as they are until the products are done; the second one as a copy
// has brought it.
__global__ void registers(const __grid_constant__ TensorMap map, const uint16_t* halves,
                          const std::string& broken, float* to) {
  CISC_DYNAMIC_SHARED(memory);
  auto* const barrier = reinterpret_cast<Barrier*>(memory + 64 * kChunkBytes);
  const auto write = [&] { memory[threadIdx.x * 64 + 37] = 7; };
  const bool one = threadIdx.x == 77;
  if (threadIdx.x == 0) {
    barrier_set(barrier, 1);
    barriers_set();
  }
  if (broken == "written_before" && one) write();
  __syncthreads();
  if (threadIdx.x == 0 && broken != "written" && broken != "copied_by_threads") {
    barrier_expect(barrier, 64 * kChunkBytes);
    copy_tile(&map, 0, 0, barrier, memory);
  }
  if (broken == "written_on_its_way" && one) write();
  if (broken == "written") {
    for (int i = threadIdx.x; i < 64 * 64; i += kWarpGroup) {
      reinterpret_cast<uint16_t*>(memory)[i] = halves[i];
    }
  } else if (broken == "copied_by_threads") {
    for (int i = threadIdx.x * 8; i < 64 * 64; i += kWarpGroup * 8) copy_16(halves + i, true, memory + 2 * i);
    copies_commit();
    copies_wait<0>();
  } else {
    barrier_wait(barrier, 0);
  }
  if (broken == "written_by_all") write();
  if (broken == "written_by_one" && one) write();
  __syncthreads();
  const uint32_t ones = 0x3c003c00;
  uint32_t a[4] = {ones, ones, ones, ones};
  float sums[32];
  products_begin();
  multiply_64<Matrix::f16, false>(sums, a, fragments::descriptor(shared_address(memory)), false);
  products_commit();
  if (broken == "factor_changed") a[1] = 0;
  if (broken == "written_behind") write();
  products_wait<0>();
  for (int i = 0; i < 32; ++i) to[threadIdx.x * 32 + i] = sums[i];
}

void check_registers(const std::string& broken) {
  const Elements ones(Matrix::f16, Numbers(64 * 64, 1));
  const TensorMap map = simt::tile_map(simt::Elements::f16, ones.data(), 64, 64, 64);
  std::vector<float> to(128 * 32);
  simt::launch(1, 128, 64 * kChunkBytes + 8, [&] { registers(map, ones.data(), broken, to.data()); });
  compare(to, Numbers(128 * 32, 16));
}

// Warps hand numbers over.
__global__ void handed(const std::string& broken, float* to) {
  CISC_DYNAMIC_SHARED(memory);
  auto* const values = reinterpret_cast<float*>(memory);
  const bool gives = threadIdx.x >= 2 * kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int turn = 0; turn < 5; ++turn) {
    if (gives) {
      if (turn > 0 && broken != "no_meeting_back") meet(2, 3 * kWarp);
      values[lane] = static_cast<float>(turn * kWarp + lane);
      meet_without_waiting(1, broken == "another_count" ? 2 * kWarp : 3 * kWarp);
    } else {
      if (broken != "no_meeting") meet(1, 3 * kWarp);
      to[turn * 2 * kWarp + threadIdx.x] = values[(lane + 1) % kWarp];
      if (turn < 4 && broken != "never_back") meet_without_waiting(2, 3 * kWarp);
    }
  }
}

void check_handed(const std::string& broken) {
  std::vector<float> to(5 * 2 * kWarp);
  simt::launch(1, 3 * kWarp, kWarp * 4, [&] { handed(broken, to.data()); });
  Numbers want(to.size());
  for (int i = 0; i < static_cast<int>(want.size()); ++i) {
    want[static_cast<size_t>(i)] = i / (2 * kWarp) * kWarp + (i + 1) % kWarp;
  }
  compare(to, want);
}

__global__ void more_registers(const std::string& broken) {
  if (threadIdx.x < kWarpGroup) {
    if (broken == "part_of_a_group" && threadIdx.x >= 64) return;
    if (broken != "none_given") keep_registers<24>();
  } else {
    take_registers<240>();
  }
}

// What the sums lose: toward zero, once an instruction.
__global__ void truncated(const uint32_t* a, const uint32_t* b, float start, float* to) {
  float sums[4] = {start, start, start, start};
  const uint32_t first[4] = {a[threadIdx.x], 0, 0, 0}, second[2] = {b[threadIdx.x], 0};
  multiply_16x8<Matrix::bf16>(first, second, sums);
  if (threadIdx.x == 0) *to = sums[0];
}

void check_truncated() {
  const auto bits = [](float value) { return static_cast<uint32_t>(BFloat16::narrow(value).bits); };
  const auto sum = [&](float start, float x, float y) {
    uint32_t a[kWarp] = {}, b[kWarp] = {};
    a[0] = bits(x) | bits(y) << 16;
    b[0] = bits(1.0f) | bits(1.0f) << 16;
    float to = 0.0f;
    simt::launch(1, kWarp, 0, [&] { truncated(a, b, start, &to); });
    return to;
  };
  count_wrong += sum(1.0f, 0x1p-24f, 0x1p-24f) != 1.0f + 0x1p-23f;  // the terms together reach the last place
  count_wrong += sum(1.0f, 0x1.fp-24f, 0.0f) != 1.0f;
  count_wrong += sum(-1.0f, -0x1.fp-24f, 0.0f) != -1.0f;
  count_wrong += sum(1.0f, -0x1p-30f, 0.0f) != 1.0f - 0x1p-24f;
  count_wrong += __float_as_uint(sum(INFINITY, -INFINITY, 0.0f)) != 0x7fffffff;
  count_wrong += sum(INFINITY, 1.0f, 0.0f) != INFINITY;
}

void run(const std::string& what, const std::string& broken) {
  if (what == "tiles") {
    check_tile<Matrix::f16, false, 32>();
    check_tile<Matrix::f16, true, 32>();
    check_tile<Matrix::f16, true, 64>();
    check_tile<Matrix::f16, false, 128>();
    check_tile<Matrix::bf16, true, 32>();
    check_tile<Matrix::bf16, false, 64>();
    check_tile<Matrix::bf16, true, 128>();
    check_tile<Matrix::s8, false, 32>();
    check_tile<Matrix::s8, false, 64>();
    check_tile<Matrix::s8, false, 128>();
    check_edges();
  } else if (what == "warps") {
    check_warp<Matrix::f16, false>();
    check_warp<Matrix::f16, true>();
    check_warp<Matrix::bf16, false>();
    check_warp<Matrix::bf16, true>();
    check_truncated();
  } else if (what == "copies") {
    check_warp<Matrix::f16, false>(broken);
  } else if (what == "pipeline") {
    check_pipeline(broken);
  } else if (what == "registers") {
    check_registers(broken);
  } else if (what == "handed") {
    check_handed(broken);
  } else if (what == "more_registers") {
    simt::launch(1, 3 * kWarpGroup, 0, [&] { more_registers(broken); });
  } else {
    std::printf("unknown ");
  }
}

}  // namespace
}  // namespace cisc

int main(int count, char** words) {
  cisc::run(words[1], count > 2 ? words[2] : "");
  std::printf("%d", cisc::count_wrong);
}
