// Sweeps of cross_similarity on sm_90a: which shape serves which rows and reduction.

#include "cross_similarity_sm90.cuh"

namespace cisc::cross_similarity {
namespace {

using namespace sm90;

using Wide = BlockShape<2, 128, 2, true>;       // 256 query rows of up to 256 numbers
using Long = BlockShape<1, 256, 2, true>;       // 128 query rows of up to 512 numbers
using Streamed = BlockShape<1, 256, 2, false>;  // any rows

template <typename S, Matrix type>
void sweep_by(const Gpu& gpu, const Sweep& sweep) {
  switch (sweep.reduction) {
    case Reduction::max:
      return launch<S, type, reduce::Max<S::kRowTiles, false>>(gpu, sweep);
    case Reduction::softmax:
      return launch<S, type, reduce::Softmax<S::kRowTiles>>(gpu, sweep);
    default:
      if constexpr (S::kRowTiles == 1) launch<S, type, reduce::TopK<1>>(gpu, sweep);
  }
}

// f(shape) for rows and a reduction; flagged: as what has set the flags
template <typename Function>
auto with_shape(const RowShape& shape, Reduction reduction, bool flagged, const Function& f) {
  if (reduction != Reduction::topk && !flagged && fits<Wide>(shape)) return f(Wide{});
  if (fits<Long>(shape)) return f(Long{});
  return f(Streamed{});
}

}  // namespace

class_sort::Cut cut_sm90(const RowShape& shape, Reduction reduction) {
  return with_shape(shape, reduction, false, [](auto s) {
    using S = decltype(s);
    return class_sort::Cut{S::kRows * S::kCluster, S::kColumns, kWantedClusters};
  });
}

void sweep_sm90(const Gpu& gpu, const Sweep& sweep) {
  with_shape(sweep.shape, sweep.reduction, sweep.flags != nullptr, [&](auto s) {
    using S = decltype(s);
    if (sweep.type == Matrix::bf16) return sweep_by<S, Matrix::bf16>(gpu, sweep);
    sweep_by<S, Matrix::f16>(gpu, sweep);
  });
}

}  // namespace cisc::cross_similarity
