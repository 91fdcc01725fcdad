// The coroutines of simt.h.

#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

// AddressSanitizer wants to know which stack is in use. Call `leave` before going to another stack, of which
// the end of a coroutine's is the last time, and `arrive` there.
struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;

#ifdef __SANITIZE_ADDRESS__
  void leave(const Stack& to, bool last = false) {
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, to.bottom, to.bytes);
  }
  void arrive(Stack* from) { __sanitizer_finish_switch_fiber(fake, &from->bottom, &from->bytes); }
#else
  void leave(const Stack&, bool = false) {}
  void arrive(Stack*) {}
#endif
};

enum class Waits { nothing, block, warp, cluster, condition, ended };

struct Coroutine {
  std::unique_ptr<unsigned char[]> memory;
  Stack stack;
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on
  bool started;
  Waits waits;
  int exchanges;  // how many it has begun in its warp
  const Condition* condition;
};

struct Warp {
  uint64_t values[2][kWarp];  // of this exchange and of the one before, which some have not read yet
};

struct Free {
  void operator()(unsigned char* memory) const { std::free(memory); }
};

struct Static {
  const unsigned char* memory;
  int64_t bytes;
};

// All threads of a cluster, those of its first block first.
std::vector<Coroutine> coroutines(kMostThreads);
std::vector<Warp> warps(kMostThreads / kWarp);
std::unique_ptr<unsigned char, Free> dynamic[kMostCluster];
int64_t dynamic_size = 0;
std::vector<Static> statics;  // what the block has met of its own variables
const std::function<void()>* body;
jmp_buf scheduler;
Stack scheduler_stack;
int running, threads_of_block, blocks_of_cluster;
int64_t first_block, passed;
int64_t epoch = 0, declared = 0;  // number of the cluster; bytes of shared memory that it has met

void enter() {
  coroutines[running].stack.arrive(&scheduler_stack);
  (*body)();
  coroutines[running].waits = Waits::ended;
  if (beside.ended != nullptr) beside.ended(running);
  coroutines[running].stack.leave(scheduler_stack, true);
  _longjmp(scheduler, 1);
}

void wait(Waits what) {
  Coroutine& self = coroutines[running];
  self.waits = what;
  if (_setjmp(self.place) == 0) {
    self.stack.leave(scheduler_stack);
    _longjmp(scheduler, 1);
  }
  self.stack.arrive(&scheduler_stack);
}

// Run a thread up to where it waits or ends.
void resume(int number) {
  Coroutine& one = coroutines[number];
  running = number;
  thread.x = static_cast<unsigned>(number % threads_of_block);
  block.x = static_cast<unsigned>(first_block + number / threads_of_block);
  one.waits = Waits::nothing;
  if (_setjmp(scheduler) != 0) {
    Stack from;
    scheduler_stack.arrive(&from);
    return;
  }
  scheduler_stack.leave(one.stack);
  if (one.started) _longjmp(one.place, 1);
  one.started = true;
  setcontext(&one.context);
}

void prepare(int number) {
  Coroutine& one = coroutines[number];
  if (!one.memory) one.memory.reset(new unsigned char[kStackBytes]);
  one.stack = {one.memory.get(), kStackBytes, nullptr};
  one.started = false;
  one.waits = Waits::nothing;
  one.exchanges = 0;
  getcontext(&one.context);
  one.context.uc_stack.ss_sp = one.memory.get();
  one.context.uc_stack.ss_size = kStackBytes;
  one.context.uc_link = nullptr;
  makecontext(&one.context, enter, 0);
}

// Where threads wait, neighbours at the same place together.
std::string places() {
  const auto place = [](const Coroutine& one) -> std::string {
    switch (one.waits) {
      case Waits::block:
        return "the block's barrier";
      case Waits::warp:
        return "its warp's exchange";
      case Waits::cluster:
        return "the cluster's barrier";
      case Waits::condition:
        return one.condition->what();
      default:
        return "nothing, it has ended";
    }
  };
  std::string all;
  const int count = threads_of_block * blocks_of_cluster;
  for (int i = 0; i < count;) {
    const std::string here = place(coroutines[i]);
    int end = i + 1;
    while (end < count && end % threads_of_block != 0 && place(coroutines[end]) == here) ++end;
    all += "\n  block " + std::to_string(first_block + i / threads_of_block) + ", threads " +
           std::to_string(i % threads_of_block) + " to " + std::to_string((end - 1) % threads_of_block) +
           ": " + here;
    i = end;
  }
  return all;
}

void go_on(int first, int count, Waits from) {
  for (int i = first; i < first + count; ++i) {
    if (coroutines[i].waits == from) coroutines[i].waits = Waits::nothing;
  }
}

// Let those go on whose barrier all have reached or whose condition holds; whether there are any.
bool release_some() {
  bool any = false, all_at_cluster = true;
  for (int block = 0; block < blocks_of_cluster; ++block) {
    bool all_at_barrier = true, alive = false;
    const int start = block * threads_of_block;
    for (int first = start; first < start + threads_of_block; first += kWarp) {
      int waiting = 0;
      for (int i = first; i < first + kWarp; ++i) {
        Coroutine& one = coroutines[i];
        waiting += one.waits == Waits::warp;
        alive |= one.waits != Waits::ended;
        all_at_barrier &= one.waits == Waits::block || one.waits == Waits::ended;
        all_at_cluster &= one.waits == Waits::cluster || one.waits == Waits::ended;
        if (one.waits == Waits::condition && one.condition->holds()) {
          one.waits = Waits::nothing;
          any = true;
        }
      }
      if (waiting == kWarp) {
        go_on(first, kWarp, Waits::warp);
        any = true;
      }
    }
    if (alive && all_at_barrier) {
      go_on(start, threads_of_block, Waits::block);
      any = true;
    }
  }
  if (all_at_cluster) {
    ++passed;
    go_on(0, blocks_of_cluster * threads_of_block, Waits::cluster);
    any = true;
  }
  return any;
}

bool all_ended() {
  const auto end = coroutines.begin() + blocks_of_cluster * threads_of_block;
  return std::all_of(coroutines.begin(), end, [](const auto& one) { return one.waits == Waits::ended; });
}

// Let some go on; false if all have ended.
bool release() {
  if (all_ended()) return false;
  while (!release_some()) {
    if (beside.progress != nullptr && beside.progress()) continue;
    stop("its block cannot go on: threads wait at different barriers, or have left a warp's exchange" +
         places());
  }
  return true;
}

// Let the first warp that can go on do so; false if none can.
bool run_a_warp(const std::vector<int>& order) {
  for (size_t at = 0; at < order.size(); at += kWarp) {
    const int first = order[at] / kWarp * kWarp;
    bool goes = false;
    int waiting = 0;
    for (int i = first; i < first + kWarp; ++i) {
      Coroutine& one = coroutines[static_cast<size_t>(i)];
      if (one.waits == Waits::condition && one.condition->holds()) one.waits = Waits::nothing;
      goes |= one.waits == Waits::nothing;
      waiting += one.waits == Waits::warp;
    }
    if (waiting == kWarp) {
      go_on(first, kWarp, Waits::warp);
      goes = true;
    }
    if (!goes) continue;
    for (int i = first; i < first + kWarp; ++i) {
      if (coroutines[static_cast<size_t>(i)].waits == Waits::nothing) resume(i);
    }
    return true;
  }
  return false;
}

void run_cluster(const std::vector<int>& order, bool one_warp) {
  ++epoch;
  declared = 0;
  passed = 0;
  statics.clear();
  for (int i = 0; i < blocks_of_cluster; ++i) {
    std::memset(dynamic[i].get(), 0xff, static_cast<size_t>(dynamic_size));
  }
  for (const int i : order) prepare(i);
  if (beside.start != nullptr) beside.start();
  do {
    while (one_warp && run_a_warp(order)) {
    }
    for (const int i : order) {
      if (coroutines[i].waits == Waits::nothing) resume(i);
    }
  } while (release());
}

}  // namespace

Beside beside{};

void stop(const std::string& what) {
  std::fprintf(stderr, "simt: block %u, thread %u: %s\n", block.x, thread.x, what.c_str());
  std::abort();
}

int64_t multiprocessors() {
  const char* asked = std::getenv("CISC_SIMT_MULTIPROCESSORS");
  return asked != nullptr ? std::max(std::atoi(asked), 1) : 3;
}

int chip() {
  const char* asked = std::getenv("CISC_SIMT_CHIP");
  const int number = asked != nullptr ? std::atoi(asked) : 75;
  if (number != 75 && number != 80 && number != 89 && number != 90)
    stop("CISC_SIMT_CHIP is 75, 80, 89 or 90");
  return number;
}

int64_t shared_limit() {
  const int number = chip();
  return (number == 75 ? 64 : number == 80 ? 163 : number == 89 ? 99 : 227) << 10;
}

void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& what, int cluster) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads % kWarp != 0 || threads < kWarp || threads > kMostThreads)
    stop("blocks are of whole warps, up to 1024");
  if (shared > shared_limit()) stop("more shared memory than the chip has");
  if (cluster < 1 || cluster > kMostCluster || blocks % cluster != 0)
    stop("a launch is of whole clusters, of up to 4 blocks");
  if (cluster > 1 && chip() < 90) stop("the chip has no clusters");
  const char* asked = std::getenv("CISC_SIMT_ORDER");
  const std::string wanted = asked != nullptr ? asked : "forward";
  const bool reverse = wanted == "reverse" || wanted == "warps_reverse";
  const bool one_warp = wanted == "warps" || wanted == "warps_reverse";
  if (!reverse && !one_warp && wanted != "forward" && wanted != "shuffle") {
    stop("CISC_SIMT_ORDER: forward, reverse, shuffle, warps, warps_reverse");
  }
  const int count = threads * cluster;
  std::vector<int> order(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) order[static_cast<size_t>(i)] = reverse ? count - 1 - i : i;
  std::mt19937 random(7);
  body = &what;
  threads_of_block = threads;
  blocks_of_cluster = cluster;
  if (coroutines.size() < order.size()) {
    coroutines.resize(order.size());
    warps.resize(order.size() / kWarp);
  }
  dynamic_size = std::max<int64_t>(shared, 1);
  for (int i = 0; i < cluster; ++i) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kSharedStart, static_cast<size_t>(dynamic_size)) != 0) stop("no memory");
    dynamic[i].reset(static_cast<unsigned char*>(memory));
  }
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; i += cluster) {
    first_block = reverse ? blocks - cluster - i : i;
    if (wanted == "shuffle") std::shuffle(order.begin(), order.end(), random);
    run_cluster(order, one_warp);
  }
}

void block_barrier() { wait(Waits::block); }
void warp_barrier() { wait(Waits::warp); }
void cluster_barrier() { wait(Waits::cluster); }
int lane() { return running % kWarp; }
int self() { return running; }
int block_threads() { return threads_of_block; }
int cluster_blocks() { return blocks_of_cluster; }
int block_rank() { return running / threads_of_block; }
int64_t cluster_barriers() { return passed; }

bool block_has_ended(int rank) {
  const auto first = coroutines.begin() + rank * threads_of_block;
  return std::all_of(first, first + threads_of_block,
                     [](const auto& one) { return one.waits == Waits::ended; });
}

void wait_until(const Condition& condition) {
  if (condition.holds()) return;
  coroutines[running].condition = &condition;
  wait(Waits::condition);
}

int next_exchange() { return coroutines[running].exchanges++ % 2; }

void want_all(unsigned mask) {
  if (mask != ~0u) stop("whole warps only take part in an exchange");
}

uint64_t exchange(uint64_t value, int from) {
  const int turn = next_exchange(), self = running;
  warps[self / kWarp].values[turn][self % kWarp] = value;
  wait(Waits::warp);
  return warps[self / kWarp].values[turn][from];
}

uint32_t ballot(bool value) {
  const int turn = next_exchange(), self = running;
  warps[self / kWarp].values[turn][self % kWarp] = value ? 1 : 0;
  wait(Waits::warp);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(warps[self / kWarp].values[turn][i]) << i;
  return bits;
}

uint32_t match(uint64_t value) {
  const int turn = next_exchange(), self = running;
  warps[self / kWarp].values[turn][self % kWarp] = value;
  wait(Waits::warp);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) {
    bits |= static_cast<uint32_t>(warps[self / kWarp].values[turn][i] == value) << i;
  }
  return bits;
}

unsigned char* dynamic_shared() { return dynamic[block_rank()].get(); }
unsigned char* dynamic_shared(int rank) { return dynamic[rank].get(); }
int64_t dynamic_bytes() { return dynamic_size; }

bool is_shared(const void* first, int64_t bytes) {
  const auto* const at = static_cast<const unsigned char*>(first);
  const auto within = [&](const unsigned char* memory, int64_t size) {
    return at >= memory && at + bytes <= memory + size;
  };
  return within(dynamic_shared(), dynamic_size) ||
         std::any_of(statics.begin(), statics.end(),
                     [&](const Static& one) { return within(one.memory, one.bytes); });
}

unsigned char* shared_bytes(unsigned char* memory, int64_t* filled_for, size_t bytes) {
  if (*filled_for != epoch) {
    if (blocks_of_cluster > 1) stop("in a cluster, shared memory is what the launch asks for");
    *filled_for = epoch;
    declared += static_cast<int64_t>(bytes);
    if (declared + dynamic_size > shared_limit()) stop("more shared memory than the chip has");
    statics.push_back({memory, static_cast<int64_t>(bytes)});
    std::memset(memory, 0xff, bytes);
  }
  return memory;
}

}  // namespace simt
