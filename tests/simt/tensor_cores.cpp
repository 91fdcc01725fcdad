// What asynchronous.h declares.
//
// What it and simt.cpp grant, and hardware does not:
// - one thread runs at a time, and all see at once what it writes, in shared and global memory: no fence, no
//   cache that is behind;
// - blocks that are not of one cluster run one after the other;
// - float products and their sum with what is there are made in float64 and truncated to float32 once an
//   instruction; a GPU aligns the terms first, and cuts off bits of each;
// - dynamic shared memory starts at a multiple of 1024 bytes; a GPU warrants 16;
// - the compiler moves nothing across an instruction that is not done: `hold` does nothing.

#include "asynchronous.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {
namespace {

constexpr int kWarp = 32, kGroup = 128;   // threads of a warp, of a warp group
constexpr int kRowBytes = 128;            // of a tile
constexpr int kRows = 64;                 // of a product
constexpr int64_t kPattern = 1024;        // bytes after which the swizzle repeats
constexpr uint32_t kPoison = 0x7fedbad1;  // a NaN
constexpr uint32_t kMark = 0x711eba9;
constexpr int kRegisters = 65536;  // of a multiprocessor

struct Mode {
  bool late_copies, late_products;
};

// Bytes of a block's dynamic shared memory.
struct Range {
  int rank;
  int64_t first, end;
  bool meets(const Range& other) const {
    return rank == other.rank && first < other.end && other.first < end;
  }
};

// A tile on its way to one block.
struct TileCopy {
  TileMap map;
  int64_t column, row, barrier;  // the barrier's place in shared memory
  Range to;
};

struct SmallCopy {
  const void* from;
  bool inside;
  void* to;
};

// A barrier's 64 bits.
struct State {
  uint64_t mark : 11;
  uint64_t published : 1;  // known to copies and to the cluster
  uint64_t parity : 1;     // of the phase that is not over
  uint64_t arrivals : 12;  // of each phase
  uint64_t pending : 12;   // of this one
  int64_t bytes : 27;      // that this phase waits for
};
static_assert(sizeof(State) == sizeof(uint64_t));
constexpr uint64_t kSet = 0x2a5;

// Sums of a thread that products on their way add to.
struct Kept {
  uint32_t* sums = nullptr;
  int uses = 0;
  std::vector<uint32_t> values;
};

// A product that a warp group has begun to ask for.
struct Asked {
  Product product;
  int threads = 0;
  std::array<const uint32_t*, kGroup> registers{};
  std::array<uint32_t*, kGroup> sums{};
  std::vector<Range> reads;
};

struct Thread {
  std::vector<SmallCopy> copies;  // on their way
  std::vector<size_t> groups;     // of them, how many each group has
  size_t open = 0;                // those of no group yet
  std::vector<uint64_t*> barriers;
  int64_t products = 0, commits = 0;
  bool begun = false;
  std::vector<Kept> kept;
  int settings = 0;  // of registers
};

struct WarpGroup {
  std::deque<Asked> asked;  // not done
  int64_t done = 0, wanted = 0;
  std::vector<int64_t> ends;  // of groups that are committed
  int registers = 0, setting = 0, settings = 0, threads = 0;
  bool more = false;
};

struct Meeting {
  int threads = 0, arrived = 0;
  int64_t times = 0;
  std::array<uint32_t, kMostThreads / kWarp> who{};
};

// What lanes give each other: in turns, see next_exchange.
struct Lanes {
  bool done;
  uint64_t rows[kWarp];
  uint32_t a[kWarp][4], b[kWarp][2], loaded[kWarp][4];
  float sums[kWarp][4];
};

Mode mode;
int chip_now;
std::mt19937 chance;
std::vector<TileCopy> tiles;
std::vector<Thread> threads_beside;
std::vector<WarpGroup> groups;
std::vector<std::array<Meeting, 16>> meetings;
std::vector<std::array<Lanes, 2>> lanes;
std::vector<int> spare_registers;  // of each block

std::vector<std::vector<unsigned char>> brought;  // of each block: shared memory as copies have left it

void want_chip(int least) {
  if (chip_now < least) stop("the chip " + std::to_string(chip_now) + " does not have this instruction");
}

Thread& here() { return threads_beside[static_cast<size_t>(self())]; }

int group_number() {
  if (block_threads() % kGroup != 0) stop("the block is not of whole warp groups");
  return self() / kGroup;
}

// Of this block, with the place of its memory.
Range range_of(const void* shared, int64_t bytes) {
  const int64_t first = static_cast<const unsigned char*>(shared) - dynamic_shared();
  if (first < 0 || first + bytes > dynamic_bytes()) stop("not in the shared memory that the launch asks for");
  return {block_rank(), first, first + bytes};
}

// Found by bytes: what was there already may be written again.
void check_brought(const Range& range, const char* who) {
  const unsigned char* const memory = dynamic_shared(range.rank);
  const auto& bytes = brought[static_cast<size_t>(range.rank)];
  if (!std::equal(memory + range.first, memory + range.end, bytes.begin() + range.first)) {
    stop(std::string(who) + " where threads have written");
  }
}

// --- barriers ---

State state_of(const uint64_t* barrier) {
  State state;
  std::memcpy(&state, barrier, sizeof state);
  if (state.mark != kSet) stop("this barrier has not been set, or has been overwritten");
  return state;
}

void keep(const State& state, uint64_t* barrier) { std::memcpy(barrier, &state, sizeof state); }

void settle(State& state) {
  if (state.bytes < -(1 << 20) || state.bytes >= 1 << 20) stop("more bytes than a barrier counts");
  if (state.pending != 0) return;
  if (state.bytes < 0) stop("copies bring more bytes than the barrier has been told to expect");
  if (state.bytes > 0) return;
  state.parity ^= 1;
  state.pending = state.arrivals;
}

void arrive(uint64_t* barrier, int64_t bytes) {
  State state = state_of(barrier);
  if (state.pending == 0) stop("more arrivals than the barrier takes");
  --state.pending;
  state.bytes += bytes;
  settle(state);
  keep(state, barrier);
}

struct PhaseOver : Condition {
  const uint64_t* barrier;
  uint32_t parity;
  int64_t place;
  PhaseOver(const uint64_t* b, uint32_t p)
      : barrier(b), parity(p), place(reinterpret_cast<const unsigned char*>(b) - dynamic_shared()) {}
  bool holds() const override { return state_of(barrier).parity != parity; }
  std::string what() const override {
    const State state = state_of(barrier);
    return "parity " + std::to_string(parity) + " of the barrier at byte " + std::to_string(place) +
           " of shared memory, which lacks " + std::to_string(state.pending) + " arrivals and " +
           std::to_string(state.bytes) + " bytes";
  }
};

// The barrier at the same place in another block.
uint64_t* barrier_at(uint64_t* barrier, int rank) {
  if (rank == block_rank()) return barrier;
  if (rank < 0 || rank >= cluster_blocks()) stop("the cluster has no such block");
  if (cluster_barriers() == 0) stop("another block's barrier before the cluster has met: it may not be set");
  if (block_has_ended(rank)) stop("another block's barrier, but that block has ended");
  const Range place = range_of(barrier, sizeof *barrier);
  auto* const other = reinterpret_cast<uint64_t*>(dynamic_shared(rank) + place.first);
  if (state_of(other).published == 0) stop("barriers_set is missing: only the block knows of its barrier");
  return other;
}

// --- copies ---

// The 16 bytes at an address of a swizzled tile lie where bits 4 to 6 are exchanged with the help of bits 7
// to 9.
int64_t swizzled(int64_t address) { return address ^ ((address >> 7 & 7) << 4); }

void check_place(const TileCopy& copy) { check_brought(copy.to, "a copy goes to"); }

void carry_out(const TileCopy& copy) {
  check_place(copy);
  const TileMap& map = copy.map;
  unsigned char* const memory = dynamic_shared(copy.to.rank);
  const int columns = kRowBytes / map.element_bytes;
  unsigned char row[kRowBytes];
  for (int i = 0; i < map.box_rows; ++i) {
    std::memset(row, 0, sizeof row);
    const int64_t y = copy.row + i;
    if (y >= 0 && y < map.rows) {
      const int64_t first = std::max<int64_t>(copy.column, 0);
      const int64_t end = std::min<int64_t>(copy.column + columns, map.columns);
      if (first < end) {
        std::memcpy(row + (first - copy.column) * map.element_bytes,
                    map.data + (y * map.columns + first) * map.element_bytes,
                    static_cast<size_t>((end - first) * map.element_bytes));
      }
    }
    for (int chunk = 0; chunk < kRowBytes; chunk += 16) {
      const int64_t address = kSharedStart + copy.to.first + i * kRowBytes + chunk;
      std::memcpy(memory + swizzled(address) - kSharedStart, row + chunk, 16);
    }
  }
  std::copy(memory + copy.to.first, memory + copy.to.end,
            brought[static_cast<size_t>(copy.to.rank)].begin() + copy.to.first);
  auto* const barrier = reinterpret_cast<uint64_t*>(memory + copy.barrier);
  State state = state_of(barrier);
  state.bytes -= copy.to.end - copy.to.first;
  settle(state);
  keep(state, barrier);
}

void carry_out(const SmallCopy& copy) {
  if (copy.inside) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

// --- products ---

double half_of(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = bits_of<float>(rest << 13) * 0x1p112f;
  return sign != 0 ? -size : size;
}

double widened(Elements type, uint32_t bits) {
  return type == Elements::f16 ? half_of(bits) : bits_of<float>(bits << 16);
}

// Toward zero; NaN is one and the same.
void truncate(const double* from, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const double exact = from[i];
    const float near = static_cast<float>(exact);
    const bool beyond = std::fabs(static_cast<double>(near)) > std::fabs(exact) && std::fabs(exact) < 0x1p128;
    const uint32_t bits = bits_of<uint32_t>(near) - (beyond ? 1 : 0);
    to[i] = exact != exact ? 0x7fffffff : bits;
  }
}

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define CISC_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CISC_CLONES
#endif

// sums [rows,columns] += a [rows,depth] b [depth,columns]
CISC_CLONES void add_products(const double* a, const double* b, int rows, int depth, int columns,
                              // outputs
                              double* sums) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const double factor = a[i * depth + k];
      for (int j = 0; j < columns; ++j) sums[i * columns + j] += factor * b[k * columns + j];
    }
  }
}

CISC_CLONES void add_products(const int32_t* a, const int32_t* b, int rows, int depth, int columns,
                              // outputs
                              uint32_t* sums) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const int32_t factor = a[i * depth + k];
      for (int j = 0; j < columns; ++j) {
        sums[i * columns + j] += static_cast<uint32_t>(factor * b[k * columns + j]);
      }
    }
  }
}

// A factor in shared memory, as its descriptor tells it.
struct Described {
  int64_t start, leading, stride;  // bytes

  explicit Described(uint64_t bits)
      : start(static_cast<int64_t>(bits & 0x3fff) << 4),
        leading(static_cast<int64_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<int64_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) stop("a descriptor of another layout than that of 128 swizzled bytes");
    if ((bits >> 49 & 7) != 0) stop("a descriptor with a base offset");
    if ((bits & 0x3ff1c000c000c000) != 0) stop("a descriptor with bits that mean nothing");
    if ((start >> 7 & 7) != 0) stop("a descriptor of a tile that does not start at a multiple of 1024 bytes");
    if (stride % kPattern != 0 || stride == 0) stop("a descriptor's stride is not of whole swizzled rows");
  }

  // Where 16 bytes or a part of them lie; k: of the sum. The sum goes along rows of 128 bytes, 8 to a stride.
  int64_t along(int row, int byte) const {
    return swizzled(start + row / 8 * stride + row % 8 * kRowBytes + byte);
  }
  // The result's rows or columns go along them, 64 to a leading stride, 8 terms of the sum to a stride.
  int64_t across(int column, int k) const {
    return swizzled(start + column / 64 * leading + column % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes);
  }
};

int depth_of(Elements type) { return type == Elements::s8 ? 32 : 16; }

void check_within(const Range& range) {
  if (range.first < 0 || range.end > dynamic_bytes()) stop("a product reads outside of shared memory");
}

// What a factor of `rows` rows, or a transposed one of so many columns, reads, in whole rows of 128 bytes.
std::vector<Range> reads_of(uint64_t descriptor, int rows, bool transposed) {
  const Described tile(descriptor);
  const int64_t start = tile.start / kPattern * kPattern - kSharedStart;
  std::vector<Range> reads;
  if (!transposed) {
    if (tile.start % kRowBytes + 32 > kRowBytes) stop("a product reads over the end of a tile's rows");
    for (int i = 0; i < rows / 8; ++i) reads.push_back({0, start + i * tile.stride, 0});
  } else {
    if (tile.start % kRowBytes != 0) stop("a transposed tile starts within a row");
    if (rows > 64 && tile.leading % kPattern != 0) stop("columns of a transposed tile start within a row");
    for (int j = 0; j < rows / 64; ++j) {
      for (int i = 0; i < 2; ++i) reads.push_back({0, start + j * tile.leading + i * tile.stride, 0});
    }
  }
  for (Range& range : reads) {
    range.rank = block_rank();
    range.end = range.first + kPattern;
    check_within(range);
  }
  return reads;
}

// The bits of the first factor [64,depth].
void first_factor(const Asked& asked, const unsigned char* memory, std::vector<uint32_t>& a) {
  const bool bytes = asked.product.type == Elements::s8;
  const int depth = depth_of(asked.product.type), size = bytes ? 1 : 2;
  a.resize(static_cast<size_t>(kRows * depth));
  if (asked.product.registers == nullptr) {
    const Described tile(asked.product.a);
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < depth; ++k) {
        const unsigned char* at = memory + tile.along(i, k * size) - kSharedStart;
        uint16_t half = *at;
        if (!bytes) std::memcpy(&half, at, 2);
        a[static_cast<size_t>(i * depth + k)] = half;
      }
    }
    return;
  }
  // Register r of a lane has two numbers of row lane / 4, or of 8 rows below if r is odd, from number
  // lane % 4 * 2 on, or 8 further on from r = 2.
  for (int t = 0; t < kGroup; ++t) {
    for (int r = 0; r < 4; ++r) {
      const int row = t / kWarp * 16 + t % kWarp / 4 + (r & 1) * 8, k = t % 4 * 2 + (r >> 1) * 8;
      const uint32_t value = asked.registers[static_cast<size_t>(t)][r];
      a[static_cast<size_t>(row * depth + k)] = value & 0xffff;
      a[static_cast<size_t>(row * depth + k + 1)] = value >> 16;
    }
  }
}

// The bits of the second factor [depth,columns].
void second_factor(const Product& product, const unsigned char* memory, std::vector<uint32_t>& b) {
  const bool bytes = product.type == Elements::s8;
  const int depth = depth_of(product.type), columns = product.columns;
  const Described tile(product.b);
  b.resize(static_cast<size_t>(depth * columns));
  for (int j = 0; j < columns; ++j) {
    for (int k = 0; k < depth; ++k) {
      const int64_t place = product.transposed ? tile.across(j, k) : tile.along(j, bytes ? k : 2 * k);
      const unsigned char* at = memory + place - kSharedStart;
      uint16_t half = *at;
      if (!bytes) std::memcpy(&half, at, 2);
      b[static_cast<size_t>(k * columns + j)] = half;
    }
  }
}

// Of thread t's numbers, number i: row t / 32 * 16 + t % 32 / 4, two neighbours, then 8 rows below, then the
// next 8 columns.
template <typename F>
void for_sums(int columns, const F& f) {
  for (int t = 0; t < kGroup; ++t) {
    const int row = t / kWarp * 16 + t % kWarp / 4, column = t % 4 * 2;
    for (int j = 0; j < columns / 8; ++j) {
      for (int i = 0; i < 4; ++i) f(t, 4 * j + i, (row + i / 2 * 8) * columns + 8 * j + column + i % 2);
    }
  }
}

Kept& kept_of(int thread, const uint32_t* sums) {
  auto& all = threads_beside[static_cast<size_t>(thread)].kept;
  const auto found = std::find_if(all.begin(), all.end(), [&](const Kept& one) { return one.sums == sums; });
  if (found != all.end()) return *found;
  const auto free = std::find_if(all.begin(), all.end(), [&](const Kept& one) { return one.uses == 0; });
  if (free != all.end()) return *free;
  return all.emplace_back();
}

void carry_out(int group, const Asked& asked) {
  static std::vector<uint32_t> a, b, sums;
  static std::vector<double> first, second, exact;
  const Product& product = asked.product;
  const int first_thread = group * kGroup, columns = product.columns, depth = depth_of(product.type);
  const unsigned char* const memory = dynamic_shared(first_thread / block_threads());
  for (const Range& range : asked.reads) check_brought(range, "a product reads");
  first_factor(asked, memory, a);
  second_factor(product, memory, b);
  sums.assign(static_cast<size_t>(kRows * columns), 0);
  std::array<Kept*, kGroup> kept;
  for (int t = 0; t < kGroup; ++t) {
    kept[static_cast<size_t>(t)] = &kept_of(first_thread + t, asked.sums[static_cast<size_t>(t)]);
  }
  if (product.adds) {
    for_sums(columns, [&](int t, int i, int place) {
      sums[static_cast<size_t>(place)] = kept[static_cast<size_t>(t)]->values[static_cast<size_t>(i)];
    });
  }
  if (product.type == Elements::s8) {
    static std::vector<int32_t> left, right;
    const auto widen = [](uint32_t bits) { return static_cast<int32_t>(static_cast<int8_t>(bits)); };
    left.resize(a.size());
    right.resize(b.size());
    std::transform(a.begin(), a.end(), left.begin(), widen);
    std::transform(b.begin(), b.end(), right.begin(), widen);
    add_products(left.data(), right.data(), kRows, depth, columns, sums.data());
  } else {
    const auto widen = [&](uint32_t bits) { return widened(product.type, bits); };
    first.resize(a.size());
    second.resize(b.size());
    exact.resize(sums.size());
    std::transform(a.begin(), a.end(), first.begin(), widen);
    std::transform(b.begin(), b.end(), second.begin(), widen);
    std::transform(sums.begin(), sums.end(), exact.begin(),
                   [](uint32_t bits) { return bits_of<float>(bits); });
    add_products(first.data(), second.data(), kRows, depth, columns, exact.data());
    truncate(exact.data(), static_cast<int64_t>(exact.size()), sums.data());
  }
  for_sums(columns, [&](int t, int i, int place) {
    kept[static_cast<size_t>(t)]->values[static_cast<size_t>(i)] = sums[static_cast<size_t>(place)];
  });
  for (Kept* one : kept) {
    if (--one->uses > 0) continue;
    if (mode.late_products &&
        std::any_of(one->sums, one->sums + columns / 2, [](uint32_t bits) { return bits != kPoison; })) {
      stop("sums were changed while products to them were on their way");
    }
    std::copy(one->values.begin(), one->values.end(), one->sums);
  }
}

bool is_ready(const WarpGroup& group) {
  return !group.asked.empty() && group.asked.front().threads == kGroup &&
         (!mode.late_products || group.done < group.wanted);
}

void carry_out(int number) {
  WarpGroup& group = groups[static_cast<size_t>(number)];
  while (is_ready(group)) {
    carry_out(number, group.asked.front());
    group.asked.pop_front();
    ++group.done;
  }
}

struct ProductsDone : Condition {
  const WarpGroup& group;
  int64_t wanted;
  ProductsDone(const WarpGroup& g, int64_t w) : group(g), wanted(w) {}
  bool holds() const override { return group.done >= wanted; }
  std::string what() const override {
    return "products that " + std::to_string(group.asked.front().threads) + " of a warp group's 128 threads" +
           " have asked for";
  }
};

// --- what goes on beside ---

void start() {
  const char* asked = std::getenv("CISC_SIMT_ASYNC");
  const std::string wanted = asked != nullptr ? asked : "late";
  if (wanted != "late" && wanted != "early" && wanted != "mixed") stop("CISC_SIMT_ASYNC: late, early, mixed");
  mode = {wanted == "late", wanted != "early"};
  chip_now = chip();
  const auto blocks = static_cast<size_t>(cluster_blocks()), threads = static_cast<size_t>(block_threads());
  tiles.clear();
  threads_beside.assign(blocks * threads, {});
  groups.assign(blocks * threads / kGroup, {});
  meetings.assign(blocks, {});
  lanes.resize(blocks * threads / kWarp);
  const int each = std::min(kRegisters / block_threads() / 8 * 8, 248);
  for (WarpGroup& group : groups) group.registers = each;
  brought.resize(blocks);
  for (auto& bytes : brought) bytes.assign(static_cast<size_t>(dynamic_bytes()), 0xff);
  // A group gets what another one has let go, no more: a block has the registers of its launch.
  spare_registers.assign(blocks, 0);
}

bool progress() {
  std::vector<int> ready;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (is_ready(groups[i])) ready.push_back(static_cast<int>(i));
  }
  const size_t choices = tiles.size() + ready.size();
  if (choices == 0) return false;
  const size_t chosen = chance() % choices;
  if (chosen >= tiles.size()) {
    carry_out(ready[chosen - tiles.size()]);
  } else {
    const TileCopy copy = tiles[chosen];
    tiles.erase(tiles.begin() + static_cast<int64_t>(chosen));
    carry_out(copy);
  }
  return true;
}

void ended(int number) {
  const Thread& thread = threads_beside[static_cast<size_t>(number)];
  if (!thread.copies.empty()) stop("the thread ends while its copies are on their way");
  if (thread.products != 0 && groups[static_cast<size_t>(number / kGroup)].done < thread.products) {
    stop("the thread ends while its products are on their way");
  }
  const int rank = block_rank();
  const bool open =
      std::any_of(tiles.begin(), tiles.end(), [&](const TileCopy& c) { return c.to.rank == rank; });
  if (open && block_has_ended(rank)) stop("the block ends while copies to it are on their way");
}

const bool installed = [] {
  beside = {start, progress, ended};
  return true;
}();

}  // namespace

TileMap tile_map(Elements type, const void* data, int64_t rows, int64_t columns, int box_rows) {
  return {
      static_cast<const unsigned char*>(data), rows, columns, type == Elements::s8 ? 1 : 2, box_rows, kMark};
}

uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(kSharedStart + range_of(shared, 0).first);
}

void warp_multiply(Elements type, const uint32_t* a, const uint32_t* b, float* sums) {
  want_chip(80);
  const int lane = self() % kWarp;
  Lanes& all = lanes[static_cast<size_t>(self() / kWarp)][static_cast<size_t>(next_exchange())];
  std::copy(a, a + 4, all.a[lane]);
  std::copy(b, b + 2, all.b[lane]);
  std::copy(sums, sums + 4, all.sums[lane]);
  all.done = false;
  warp_barrier();
  if (!all.done) {
    constexpr int kRows = 16, kColumns = 8, kDepth = 16;
    double first[kRows * kDepth], second[kDepth * kColumns], exact[kRows * kColumns];
    uint32_t bits[kRows * kColumns];
    for (int t = 0; t < kWarp; ++t) {
      const int g = t / 4, q = t % 4 * 2;
      for (int i = 0; i < 8; ++i) {
        const int row = g + (i / 2 % 2) * 8, k = q + i % 2 + i / 4 * 8;
        first[row * kDepth + k] = widened(type, all.a[t][i / 2] >> (i % 2 * 16) & 0xffff);
      }
      for (int i = 0; i < 4; ++i) {
        second[(q + i % 2 + i / 2 * 8) * kColumns + g] =
            widened(type, all.b[t][i / 2] >> (i % 2 * 16) & 0xffff);
        exact[(g + i / 2 * 8) * kColumns + q + i % 2] = all.sums[t][i];
      }
    }
    add_products(first, second, kRows, kDepth, kColumns, exact);
    truncate(exact, kRows * kColumns, bits);
    for (int t = 0; t < kWarp; ++t) {
      for (int i = 0; i < 4; ++i) {
        all.sums[t][i] = bits_of<float>(bits[(t / 4 + i / 2 * 8) * kColumns + t % 4 * 2 + i % 2]);
      }
    }
    all.done = true;
  }
  std::copy(all.sums[lane], all.sums[lane] + 4, sums);
}

void load_matrices(const void* row, uint32_t* to) {
  want_chip(75);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) stop("a matrix's row is not at a multiple of 16 bytes");
  if (!is_shared(row, 16)) stop("a matrix's row is not in shared memory");
  const int lane = self() % kWarp;
  Lanes& all = lanes[static_cast<size_t>(self() / kWarp)][static_cast<size_t>(next_exchange())];
  all.rows[lane] = reinterpret_cast<uint64_t>(row);
  all.done = false;
  warp_barrier();
  if (!all.done) {
    for (int number = 0; number < 4; ++number) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i) {
        std::memcpy(matrix[i], reinterpret_cast<const void*>(all.rows[8 * number + i]), 16);
      }
      for (int t = 0; t < kWarp; ++t) {
        const int i = t / 4, j = t % 4 * 2;
        all.loaded[t][number] = matrix[i][j] | uint32_t{matrix[i][j + 1]} << 16;
      }
    }
    all.done = true;
  }
  std::copy(all.loaded[lane], all.loaded[lane] + 4, to);
}

void copy_16(const void* from, bool inside, void* shared) {
  want_chip(80);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || reinterpret_cast<uintptr_t>(shared) % 16 != 0) {
    stop("a copy of 16 bytes that are not aligned to them");
  }
  if (!is_shared(shared, 16)) stop("a copy to what is not shared memory");
  const SmallCopy copy{from, inside, shared};
  if (mode.late_copies) {
    here().copies.push_back(copy);
    ++here().open;
    std::memset(shared, 0xff, 16);
  } else {
    carry_out(copy);
  }
}

void copies_commit() {
  want_chip(80);
  here().groups.push_back(here().open);
  here().open = 0;
}

void copies_wait(int pending) {
  want_chip(80);
  Thread& thread = here();
  while (thread.groups.size() > static_cast<size_t>(pending)) {
    const auto end = thread.copies.begin() + static_cast<int64_t>(thread.groups.front());
    for (auto copy = thread.copies.begin(); copy != end; ++copy) carry_out(*copy);
    thread.copies.erase(thread.copies.begin(), end);
    thread.groups.erase(thread.groups.begin());
  }
}

void barrier_set(uint64_t* barrier, uint32_t arrivals) {
  want_chip(90);
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) stop("a barrier that is not aligned to 8 bytes");
  if (!is_shared(barrier, sizeof *barrier)) stop("a barrier that is not in shared memory");
  if (arrivals < 1 || arrivals > 4095) stop("a barrier of no arrivals, or of more than 4095");
  State state{};
  std::memcpy(&state, barrier, sizeof state);
  if (state.mark == kSet) stop("a barrier is set twice");
  state = {kSet, 0, 0, arrivals, arrivals, 0};
  keep(state, barrier);
  here().barriers.push_back(barrier);
}

void barriers_set() {
  want_chip(90);
  for (uint64_t* barrier : here().barriers) {
    State state = state_of(barrier);
    state.published = 1;
    keep(state, barrier);
  }
  here().barriers.clear();
}

void barrier_arrive(uint64_t* barrier, int rank) {
  want_chip(90);
  arrive(barrier_at(barrier, rank), 0);
}

void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  want_chip(90);
  arrive(barrier, bytes);
}

void barrier_wait(const uint64_t* barrier, uint32_t parity) {
  want_chip(90);
  if (parity > 1) stop("a parity is 0 or 1");
  wait_until(PhaseOver(barrier, parity));
}

void check_map(const TileMap* map) {
  want_chip(90);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) stop("a tensor map that is not aligned to 64 bytes");
  if (map->mark != kMark) stop("this is no tensor map");
}

void copy_tile(uint32_t ranks, const TileMap* map, int64_t column, int64_t row, uint64_t* barrier,
               void* shared) {
  check_map(map);
  const Range own = range_of(shared, static_cast<int64_t>(map->box_rows) * kRowBytes);
  if (own.first % kPattern != 0) stop("a tile that does not start at a multiple of 1024 bytes");
  if (ranks == 0 || ranks >> cluster_blocks() != 0) stop("a copy to a block that the cluster does not have");
  const int64_t place = range_of(barrier, sizeof *barrier).first;
  for (int rank = 0; rank < cluster_blocks(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    if (state_of(barrier_at(barrier, rank)).published == 0) stop("barriers_set is missing before a copy");
    const TileCopy copy{*map, column, row, place, {rank, own.first, own.end}};
    const auto meets = [&](const Range& range) { return range.meets(copy.to); };
    for (const TileCopy& other : tiles) {
      if (meets(other.to)) stop("a copy to where another copy is on its way");
    }
    for (const WarpGroup& group : groups) {
      for (const Asked& asked : group.asked) {
        if (std::any_of(asked.reads.begin(), asked.reads.end(), meets)) {
          stop("a copy to what products on their way read");
        }
      }
    }
    if (mode.late_copies) {
      check_place(copy);
      tiles.push_back(copy);
      std::fill(dynamic_shared(rank) + own.first, dynamic_shared(rank) + own.end, 0xff);
      auto& bytes = brought[static_cast<size_t>(rank)];
      std::fill(bytes.begin() + own.first, bytes.begin() + own.end, 0xff);
    } else {
      carry_out(copy);
    }
  }
}

namespace {

struct RegistersSet : Condition {
  WarpGroup& group;
  int& spare;
  int number;
  RegistersSet(WarpGroup& g, int& s, int n) : group(g), spare(s), number(n) {}
  bool holds() const override {
    if (group.settings > number) return true;
    if (group.threads < kGroup) return false;
    const int needs = (group.setting - group.registers) * kGroup;
    if (needs > spare) return false;
    spare -= needs;
    group.registers = group.setting;
    group.threads = 0;
    ++group.settings;
    return true;
  }
  std::string what() const override {
    return std::to_string(group.setting) + " registers each, which " + std::to_string(group.threads) +
           " of a warp group's 128 threads have asked for; the block has " + std::to_string(spare) +
           " to spare";
  }
};

struct Met : Condition {
  const Meeting& meeting;
  int number;
  int64_t times;
  Met(const Meeting& m, int n) : meeting(m), number(n), times(m.times) {}
  bool holds() const override { return meeting.times != times; }
  std::string what() const override {
    return "barrier " + std::to_string(number) + ", where " + std::to_string(meeting.arrived) + " of " +
           std::to_string(meeting.threads) + " threads are";
  }
};

}  // namespace

void set_registers(int count, bool more) {
  want_chip(90);
  WarpGroup& group = groups[static_cast<size_t>(group_number())];
  if (more ? count < group.registers : count > group.registers) {
    stop("the warp group has " + std::to_string(group.registers) + " registers each, which are not " +
         (more ? "fewer than " : "more than ") + std::to_string(count));
  }
  const int number = here().settings++;
  if (group.threads > 0 && (group.setting != count || group.more != more)) {
    stop("threads of a warp group ask for different numbers of registers");
  }
  group.setting = count;
  group.more = more;
  ++group.threads;
  wait_until(RegistersSet(group, spare_registers[static_cast<size_t>(block_rank())], number));
}

void meet(int number, int threads, bool waits) {
  if (number < 1 || number > 15) stop("barriers of warps are numbered from 1 to 15");
  if (threads < kWarp || threads % kWarp != 0 || threads > block_threads()) stop("a barrier of whole warps");
  Meeting& meeting = meetings[static_cast<size_t>(block_rank())][static_cast<size_t>(number)];
  if (meeting.arrived > 0 && meeting.threads != threads) {
    stop("a barrier of " + std::to_string(meeting.threads) + " threads and of " + std::to_string(threads));
  }
  const int place = self() % block_threads();
  uint32_t& who = meeting.who[static_cast<size_t>(place / kWarp)];
  if ((who >> place % kWarp & 1) != 0) stop("a thread arrives twice at barrier " + std::to_string(number));
  who |= 1u << place % kWarp;
  meeting.threads = threads;
  const Met met(meeting, number);
  if (++meeting.arrived == threads) {
    if (std::any_of(meeting.who.begin(), meeting.who.end(), [](uint32_t w) { return w != 0 && ~w != 0; })) {
      stop("parts of warps at barrier " + std::to_string(number));
    }
    ++meeting.times;
    meeting.arrived = 0;
    meeting.who = {};
  }
  if (waits) wait_until(met);
}

void products_begin() {
  want_chip(90);
  here().begun = true;
}

void multiply(const Product& product, void* sums) {
  want_chip(90);
  const int number = group_number(), t = self() % kGroup;
  WarpGroup& group = groups[static_cast<size_t>(number)];
  Thread& thread = here();
  if (!thread.begun) stop("products_begin is missing before a product");
  const int64_t place = thread.products++ - group.done;
  if (place < 0) stop("threads of a warp group ask for different products");
  if (place == static_cast<int64_t>(group.asked.size())) {
    Asked asked;
    asked.product = product;
    if (product.registers == nullptr) asked.reads = reads_of(product.a, kRows, false);
    const auto second = reads_of(product.b, product.columns, product.transposed);
    asked.reads.insert(asked.reads.end(), second.begin(), second.end());
    for (const TileCopy& copy : tiles) {
      if (std::any_of(asked.reads.begin(), asked.reads.end(), [&](auto& r) { return r.meets(copy.to); })) {
        stop("a product of what a copy on its way brings");
      }
    }
    group.asked.push_back(std::move(asked));
  }
  Asked& asked = group.asked[static_cast<size_t>(place)];
  const Product& other = asked.product;
  if (other.type != product.type || other.columns != product.columns || other.adds != product.adds ||
      other.transposed != product.transposed || other.a != product.a || other.b != product.b ||
      (other.registers == nullptr) != (product.registers == nullptr)) {
    stop("threads of a warp group ask for different products");
  }
  auto* const bits = static_cast<uint32_t*>(sums);
  const int count = product.columns / 2;
  Kept& kept = kept_of(self(), bits);
  if (kept.uses++ == 0) {
    kept.sums = bits;
    kept.values.assign(bits, bits + count);
    if (mode.late_products) std::fill_n(bits, count, kPoison);
  }
  if (kept.values.size() != static_cast<size_t>(count)) stop("products of different sizes to the same sums");
  asked.registers[static_cast<size_t>(t)] = product.registers;
  asked.sums[static_cast<size_t>(t)] = bits;
  ++asked.threads;
  if (!mode.late_products) carry_out(number);
}

void products_commit() {
  want_chip(90);
  WarpGroup& group = groups[static_cast<size_t>(group_number())];
  Thread& thread = here();
  const auto place = static_cast<size_t>(thread.commits++);
  if (place == group.ends.size()) group.ends.push_back(thread.products);
  if (group.ends[place] != thread.products) stop("threads of a warp group commit different products");
}

void products_wait(int pending) {
  want_chip(90);
  WarpGroup& group = groups[static_cast<size_t>(group_number())];
  Thread& thread = here();
  thread.begun = false;
  if (thread.commits <= pending) return;
  const int64_t wanted = group.ends[static_cast<size_t>(thread.commits - pending - 1)];
  group.wanted = std::max(group.wanted, wanted);
  wait_until(ProductsDone(group, wanted));
}

}  // namespace simt
