// Barriers in shared memory, of asynchronous.h.
#include <cstring>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "parts.h"
#include "simt.h"

namespace simt {
namespace {

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

std::vector<std::vector<uint64_t*>> not_published;  // of each thread

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

}  // namespace

void start_barriers(size_t threads) { not_published.assign(threads, {}); }

uint64_t* barrier_of_copies(uint64_t* barrier, int rank) {
  uint64_t* const other = barrier_at(barrier, rank);
  if (state_of(other).published == 0) stop("barriers_set is missing before a copy");
  return other;
}

void count_copied(int64_t bytes, uint64_t* barrier) {
  State state = state_of(barrier);
  state.bytes -= bytes;
  settle(state);
  keep(state, barrier);
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
  not_published[static_cast<size_t>(self())].push_back(barrier);
}

void barriers_set() {
  want_chip(90);
  auto& barriers = not_published[static_cast<size_t>(self())];
  for (uint64_t* barrier : barriers) {
    State state = state_of(barrier);
    state.published = 1;
    keep(state, barrier);
  }
  barriers.clear();
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

}  // namespace simt
