// What warps and single threads do, of asynchronous.h: products of a warp, matrices loaded from shared
// memory, copies of 16 bytes, and barriers of warps.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "asynchronous.h"
#include "parts.h"
#include "simt.h"

namespace simt {
namespace {

// What lanes give each other: in turns, see next_exchange.
struct Lanes {
  bool done;
  uint64_t rows[kWarp];
  uint32_t a[kWarp][4], b[kWarp][2], loaded[kWarp][4];
  float sums[kWarp][4];
};

struct SmallCopy {
  const void* from;
  bool inside;
  void* to;
};

struct Copies {
  std::vector<SmallCopy> copies;  // on their way
  std::vector<size_t> groups;     // of them, how many each group has
  size_t open = 0;                // those of no group yet
};

struct Meeting {
  int threads = 0, arrived = 0;
  int64_t times = 0;
  std::array<uint32_t, kMostThreads / kWarp> who{};
};

bool late;
std::vector<std::array<Lanes, 2>> lanes;  // of each warp, in turns: next_exchange
std::vector<Copies> copies_of_threads;
std::vector<std::array<Meeting, 16>> meetings;  // of each block

Copies& here() { return copies_of_threads[static_cast<size_t>(self())]; }

void carry_out(const SmallCopy& copy) {
  if (copy.inside) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

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

void start_warps(size_t blocks, size_t threads, bool late_copies) {
  late = late_copies;
  lanes.resize(blocks * threads / kWarp);
  copies_of_threads.assign(blocks * threads, {});
  meetings.assign(blocks, {});
}

bool has_copies(int thread) { return !copies_of_threads[static_cast<size_t>(thread)].copies.empty(); }

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
  if (late) {
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
  Copies& thread = here();
  while (thread.groups.size() > static_cast<size_t>(pending)) {
    const auto end = thread.copies.begin() + static_cast<int64_t>(thread.groups.front());
    for (auto copy = thread.copies.begin(); copy != end; ++copy) carry_out(*copy);
    thread.copies.erase(thread.copies.begin(), end);
    thread.groups.erase(thread.groups.begin());
  }
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

}  // namespace simt
