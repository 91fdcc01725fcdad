// fma_peak: how many operations a second this machine's multiply-add units do, on all threads at once.

#include "fma_peak.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>

#include "checks.h"
#include "fma_peak_kernel.h"
#include "isa.h"
#include "tensors.h"

namespace cisc::fma_peak {

extern const Kernel kPortable = &run;

namespace {

// like: any CPU tensor; bfloat16 asks for products of pairs of bfloat16, which are float32's where the
//     instruction set has none
// outputs
// FLOP/s, the best of `repeats`
double measure(const Tensor& like, int64_t repeats) {
  check_cpu("fma_peak", "like", like);
  check(repeats > 0, "fma_peak", "repeats must be above 0, got ", repeats);
  constexpr int64_t kRounds = 1 << 20;
  const Kernel kernel = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const bool pairs = like.scalar_type() == ScalarType::BFloat16;
  const int64_t threads = torch::stable::get_num_threads();
  double best = 0.0;
  for (int64_t i = 0; i < repeats; ++i) {
    std::vector<int64_t> flops(static_cast<size_t>(threads), 0);
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      float sink[kMostChains] = {};
      for (int64_t t = first; t < last; ++t) flops[t] = kernel(pairs, kRounds, sink);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    int64_t all = 0;
    for (const int64_t n : flops) all += n;
    best = std::max(best, static_cast<double>(all) / seconds.count());
  }
  return best;
}

}  // namespace
}  // namespace cisc::fma_peak

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) { m.def("fma_peak(Tensor like, int repeats) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) { m.impl("fma_peak", TORCH_BOX(&cisc::fma_peak::measure)); }
