// The kernels of class_sort.cuh in the simulator, against std::stable_sort: prints what is wrong and ends
// with 1, or prints what was sorted.

#include "class_sort.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using namespace cisc::class_sort;

struct Launcher {
  template <typename Kernel, typename... Arguments>
  void launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, Arguments... arguments) const {
    if (blocks > 0) simt::launch(blocks, threads, shared, [&] { kernel(arguments...); });
  }
};

struct Given {
  const int32_t* bins;  // [images,items]
  int64_t items;

  int32_t operator()(int64_t image, int64_t item) const {
    if (item < 0 || item >= items) simt::stop("an item that there is not");
    return bins[image * items + item];
  }
};

constexpr int32_t kUntouched = -7;

// bins: [images,items], -1 = left out
void check(int64_t images, int64_t items, const std::vector<int32_t>& bins) {
  std::vector<int32_t> counts(static_cast<size_t>(images * chunks_of(items) * kBins));
  std::vector<int32_t> order(static_cast<size_t>(images * items), kUntouched), want = order;
  std::vector<int32_t> starts(static_cast<size_t>(images * (kBins + 1)), kUntouched), want_starts = starts;
  sort_items(Launcher{}, Given{bins.data(), items}, images, items, counts.data(), order.data(),
             starts.data());
  for (int64_t image = 0; image < images; ++image) {
    const int32_t* of = bins.data() + image * items;
    std::vector<int32_t> sorted;
    for (int32_t i = 0; i < static_cast<int32_t>(items); ++i) {
      if (of[i] >= 0) sorted.push_back(i);
    }
    std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return of[a] < of[b]; });
    std::copy(sorted.begin(), sorted.end(), want.begin() + image * items);
    for (int32_t bin = 0; bin <= kBins; ++bin) {
      want_starts[static_cast<size_t>(image * (kBins + 1) + bin)] = static_cast<int32_t>(
          std::count_if(sorted.begin(), sorted.end(), [&](int32_t i) { return of[i] < bin; }));
    }
  }
  if (order == want && starts == want_starts) return;
  std::printf("wrong: %s of %lld images of %lld items\n", order == want ? "starts" : "order",
              static_cast<long long>(images), static_cast<long long>(items));
  std::exit(1);
}

}  // namespace

int main() {
  std::mt19937 random(11);
  int64_t sorted = 0;
  for (const int64_t items :
       {0, 1, 31, 1023, 1025, 8191, 8192, 8193, 9 * 1024, 17 * 1024 + 33, 70 * 1024 - 1}) {
    // Bins in regions or at random; of a few values, the last one among them, or of all.
    for (const int32_t values : {1, 5, kBins}) {
      const int64_t images = items < 20000 ? 2 : 1;
      const bool regions = random() % 2 == 0;
      std::vector<int32_t> bins;
      while (static_cast<int64_t>(bins.size()) < images * items) {
        const auto drawn = static_cast<int32_t>(random() % static_cast<uint32_t>(values + 1));
        const int32_t bin = drawn == values ? -1 : kBins - 1 - drawn;
        for (uint32_t run = regions ? random() % 700 + 1 : 1; run > 0; --run) bins.push_back(bin);
      }
      check(images, items, bins);
      sorted += images * items;
    }
  }
  std::printf("%lld items\n", static_cast<long long>(sorted));
  return 0;
}
