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
constexpr int kWarp = 32, kMostThreads = 1024;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "simt: block %u, thread %u: %s\n", block.x, thread.x, what);
  std::abort();
}

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

enum class Waits { nothing, block, warp, ended };

struct Coroutine {
  std::unique_ptr<unsigned char[]> memory;
  Stack stack;
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on
  bool started;
  Waits waits;
  int exchanges;  // how many it has begun in its warp
};

struct Warp {
  uint64_t values[2][kWarp];  // of this exchange and of the one before, which some have not read yet
};

std::vector<Coroutine> coroutines(kMostThreads);
std::vector<Warp> warps(kMostThreads / kWarp);
std::vector<unsigned char> dynamic;
const std::function<void()>* body;
jmp_buf scheduler;
Stack scheduler_stack;
int running;
int64_t epoch = 0, declared = 0;  // number of the block; bytes of shared memory that it has met

void enter() {
  coroutines[running].stack.arrive(&scheduler_stack);
  (*body)();
  coroutines[running].waits = Waits::ended;
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
  thread.x = static_cast<unsigned>(number);
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

// Let those go on whose barrier all have reached; whether there are any.
bool release(int threads) {
  bool all_at_barrier = true, alive = false, any = false;
  for (int first = 0; first < threads; first += kWarp) {
    int waiting = 0, ended = 0;
    for (int i = first; i < first + kWarp; ++i) {
      waiting += coroutines[i].waits == Waits::warp;
      ended += coroutines[i].waits == Waits::ended;
      all_at_barrier &= coroutines[i].waits == Waits::block || coroutines[i].waits == Waits::ended;
    }
    alive |= ended < kWarp;
    if (waiting == kWarp) {
      for (int i = first; i < first + kWarp; ++i) coroutines[i].waits = Waits::nothing;
      any = true;
    }
  }
  if (!alive) return false;
  if (all_at_barrier) {
    for (int i = 0; i < threads; ++i) {
      if (coroutines[i].waits == Waits::block) coroutines[i].waits = Waits::nothing;
    }
    any = true;
  }
  if (!any)
    stop("its block cannot go on: threads wait at different barriers, or have left a warp's exchange");
  return true;
}

void run_block(const std::vector<int>& order, int threads) {
  ++epoch;
  declared = 0;
  std::fill(dynamic.begin(), dynamic.end(), 0xff);
  for (int i = 0; i < threads; ++i) prepare(i);
  do {
    for (const int i : order) {
      if (coroutines[i].waits == Waits::nothing) resume(i);
    }
  } while (release(threads));
}

}  // namespace

int64_t multiprocessors() {
  const char* asked = std::getenv("CISC_SIMT_MULTIPROCESSORS");
  return asked != nullptr ? std::max(std::atoi(asked), 1) : 3;
}

void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& what) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads % kWarp != 0 || threads < kWarp || threads > kMostThreads)
    stop("blocks are of whole warps, up to 1024");
  if (shared > kSharedBytes) stop("more shared memory than the smallest chip has");
  const char* asked = std::getenv("CISC_SIMT_ORDER");
  const std::string wanted = asked != nullptr ? asked : "forward";
  std::vector<int> order(static_cast<size_t>(threads));
  for (int i = 0; i < threads; ++i) order[static_cast<size_t>(i)] = wanted == "reverse" ? threads - 1 - i : i;
  std::mt19937 random(7);
  body = &what;
  dynamic.resize(static_cast<size_t>(std::max<int64_t>(shared, 1)));
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t number = wanted == "reverse" ? blocks - 1 - i : i;
    if (wanted == "shuffle") std::shuffle(order.begin(), order.end(), random);
    block.x = static_cast<unsigned>(number);
    run_block(order, threads);
  }
}

void block_barrier() { wait(Waits::block); }
void warp_barrier() { wait(Waits::warp); }
int lane() { return running % kWarp; }

void want_all(unsigned mask) {
  if (mask != ~0u) stop("whole warps only take part in an exchange");
}

uint64_t exchange(uint64_t value, int from) {
  const int turn = coroutines[running].exchanges++ % 2, self = running;
  warps[self / kWarp].values[turn][self % kWarp] = value;
  wait(Waits::warp);
  return warps[self / kWarp].values[turn][from];
}

uint32_t ballot(bool value) {
  const int turn = coroutines[running].exchanges++ % 2, self = running;
  warps[self / kWarp].values[turn][self % kWarp] = value ? 1 : 0;
  wait(Waits::warp);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(warps[self / kWarp].values[turn][i]) << i;
  return bits;
}

unsigned char* dynamic_shared() { return dynamic.data(); }

unsigned char* shared_bytes(unsigned char* memory, int64_t* filled_for, size_t bytes) {
  if (*filled_for != epoch) {
    *filled_for = epoch;
    declared += static_cast<int64_t>(bytes);
    if (declared + static_cast<int64_t>(dynamic.size()) > kSharedBytes) {
      stop("more shared memory than the smallest chip has");
    }
    std::memset(memory, 0xff, bytes);
  }
  return memory;
}

}  // namespace simt
