// Threads that share the items of a kernel's work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <new>

#include "work.h"

namespace cisc {

using torch::stable::parallel_for;

// n elements for each of some threads, on cache lines of their own.
template <typename T>
class PerThread {
 public:
  PerThread(int64_t threads, int64_t n)
      : stride_((n + kLine - 1) / kLine * kLine),
        data_(static_cast<T*>(
            ::operator new(static_cast<size_t>(std::max<int64_t>(threads * stride_, 1)) * sizeof(T),
                           std::align_val_t(kLineBytes)))) {}

  T* operator[](int64_t thread) const { return data_.get() + thread * stride_; }

 private:
  static constexpr int64_t kLineBytes = 128;  // with the neighbour that is fetched along
  static constexpr int64_t kLine = kLineBytes / sizeof(T);
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(kLineBytes)); }
  };
  int64_t stride_;
  std::unique_ptr<T, Free> data_;
};

// As many threads as torch has, but for what each of them holds (crew_size). Their memory is allocated before
// they start: where there is too little, that is an error like any other.
class Crew {
 public:
  // bytes: of a thread; grain: items that are worth a thread
  explicit Crew(int64_t items, int64_t bytes = 0, int64_t grain = 1, int64_t most = kCrewBytes)
      : items_(items),
        size_(crew_size(torch::stable::get_num_threads(), (items + grain - 1) / grain, bytes, most)) {}

  int64_t size() const { return size_; }

  // n elements for each thread
  template <typename T>
  PerThread<T> each(int64_t n) const {
    return PerThread<T>(size_, n);
  }

  // n zeros for each thread
  template <typename T>
  PerThread<T> zeros(int64_t n) const {
    PerThread<T> all(size_, n);
    for (int64_t thread = 0; thread < size_; ++thread) std::fill(all[thread], all[thread] + n, T{});
    return all;
  }

  // to[i] += what the threads hold at i < n
  template <typename T>
  void add_all(const PerThread<T>& all, int64_t n, T* to) const {
    for (int64_t thread = 0; thread < size_; ++thread) {
      for (int64_t i = 0; i < n; ++i) to[i] += all[thread][i];
    }
  }

  // f(thread, begin, end) for `items`, each thread with a number of its own and once
  template <typename Function>
  void run(int64_t items, const Function& f) const {
    std::atomic<int64_t> next{0};
    parallel_for(0, items, std::max<int64_t>((items + size_ - 1) / size_, 1),
                 [&](int64_t begin, int64_t end) { f(next.fetch_add(1), begin, end); });
  }

  // The same for all items.
  template <typename Function>
  void run(const Function& f) const {
    run(items_, f);
  }

  // f(thread, item) for `items`, each of which the next free thread takes.
  template <typename Function>
  void share(int64_t items, const Function& f) const {
    std::atomic<int64_t> next{0};
    run(std::min(size_, items), [&](int64_t thread, int64_t, int64_t) {
      for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) f(thread, item);
    });
  }

 private:
  int64_t items_, size_;
};

}  // namespace cisc
