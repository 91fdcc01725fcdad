// Backward sweeps of cross_similarity on sm_90a: which kernel serves which rows.

#include "cross_similarity_backward_sm90.cuh"

namespace cisc::cross_similarity {
namespace {

using namespace sm90;

// Split rows are multiplied three times, and their sums kept twice: fewer channels.
constexpr int kShortSlice = 2, kLongSlice = 4;

template <bool to_query, Matrix type>
void run_rows(const Gpu& gpu, const BackwardSweep& sweep) {
  if (sweep.shape.chunks <= kShortSlice) {
    return launch_backward<to_query, type, false, kShortSlice>(gpu, sweep);
  }
  launch_backward<to_query, type, false, kLongSlice>(gpu, sweep);
}

template <bool to_query>
void run_sweep(const Gpu& gpu, const BackwardSweep& sweep) {
  if (sweep.shape.split) return launch_backward<to_query, Matrix::f16, true, kShortSlice>(gpu, sweep);
  if (sweep.type == Matrix::bf16) return run_rows<to_query, Matrix::bf16>(gpu, sweep);
  run_rows<to_query, Matrix::f16>(gpu, sweep);
}

}  // namespace

void backward_sm90(const Gpu& gpu, const BackwardSweep& sweep) {
  if (sweep.to_query) return run_sweep<true>(gpu, sweep);
  run_sweep<false>(gpu, sweep);
}

}  // namespace cisc::cross_similarity
