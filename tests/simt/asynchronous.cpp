// What asynchronous.h declares, but for what warps.cpp and barriers.cpp have: tiles and products on their
// way.
//
// What these files and simt.cpp grant, and hardware does not:
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

#include "arithmetic.h"
#include "parts.h"
#include "simt.h"

namespace simt {
namespace {

constexpr int kRowBytes = 128;            // of a tile
constexpr int kRows = 64;                 // of a product
constexpr int64_t kPattern = 1024;        // bytes after which the swizzle repeats
constexpr uint32_t kPoison = 0x7fedbad1;  // a NaN
constexpr uint32_t kMark = 0x711eba9;
constexpr int kRegisters = 65536;  // of a multiprocessor

struct Mode {
  bool late_copies, late_products;
};

// A tile on its way to one block.
struct TileCopy {
  TileMap map;
  int64_t column, row, barrier;  // the barrier's place in shared memory
  Range to;
};

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

Mode mode;
int chip_now;
std::mt19937 chance;
std::vector<TileCopy> tiles;
std::vector<Thread> threads_beside;
std::vector<WarpGroup> groups;
std::vector<int> spare_registers;                 // of each block
std::vector<std::vector<unsigned char>> brought;  // of each block: shared memory as copies have left it

Thread& here() { return threads_beside[static_cast<size_t>(self())]; }

int group_number() {
  if (block_threads() % kGroup != 0) stop("the block is not of whole warp groups");
  return self() / kGroup;
}

// Found by bytes: what was there already may be written again.
void check_brought(const Range& range, const char* who) {
  const unsigned char* const memory = dynamic_shared(range.rank);
  const auto& bytes = brought[static_cast<size_t>(range.rank)];
  if (!std::equal(memory + range.first, memory + range.end, bytes.begin() + range.first)) {
    stop(std::string(who) + " where threads have written");
  }
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
  count_copied(copy.to.end - copy.to.first, reinterpret_cast<uint64_t*>(memory + copy.barrier));
}

// --- products ---

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
  start_warps(blocks, threads, mode.late_copies);
  start_barriers(blocks * threads);
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
  if (has_copies(number)) stop("the thread ends while its copies are on their way");
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

void want_chip(int least) {
  if (chip_now < least) stop("the chip " + std::to_string(chip_now) + " does not have this instruction");
}

Range range_of(const void* shared, int64_t bytes) {
  const int64_t first = static_cast<const unsigned char*>(shared) - dynamic_shared();
  if (first < 0 || first + bytes > dynamic_bytes()) stop("not in the shared memory that the launch asks for");
  return {block_rank(), first, first + bytes};
}

TileMap tile_map(Elements type, const void* data, int64_t rows, int64_t columns, int box_rows) {
  return {
      static_cast<const unsigned char*>(data), rows, columns, type == Elements::s8 ? 1 : 2, box_rows, kMark};
}

uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(kSharedStart + range_of(shared, 0).first);
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
    barrier_of_copies(barrier, rank);
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
