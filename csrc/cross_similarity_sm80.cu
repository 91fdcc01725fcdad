// Sweeps of cross_similarity on sm_80 and later chips: which shape serves which rows and reduction.

#include "cross_similarity_sm80.cuh"

namespace cisc::cross_similarity {
namespace {

using namespace sm80;

template <int kRowTiles>
void sweep_by(const Gpu& gpu, const Sweep& sweep, const Layout& layout) {
  switch (sweep.reduction) {
    case Reduction::max:
      return launch<reduce::Max<kRowTiles, false>>(gpu, sweep, layout);
    case Reduction::softmax:
      if constexpr (kRowTiles == kNarrow) launch<reduce::Softmax<kRowTiles>>(gpu, sweep, layout);
      return;
    default:
      if constexpr (kRowTiles == kNarrow) launch<reduce::TopK<kRowTiles>>(gpu, sweep, layout);
  }
}

}  // namespace

class_sort::Cut cut_sm80(const RowShape&, Matrix, Reduction reduction) { return cut_of(reduction); }

void sweep_sm80(const Gpu& gpu, const Sweep& sweep) {
  const auto layout = [&](int row_tiles, bool resident) {
    return Layout::of(sweep.shape, rows_of(row_tiles), resident, gpu.shared_bytes());
  };
  const Layout narrow = layout(kNarrow, true);
  // The others keep more of a row in registers.
  if (sweep.reduction != Reduction::max) {
    return sweep_by<kNarrow>(gpu, sweep, narrow.fits() ? narrow : layout(kNarrow, false));
  }
  const Layout wide = layout(kWide, true);
  if (wide.fits() || !narrow.fits()) {
    return sweep_by<kWide>(gpu, sweep, wide.fits() ? wide : layout(kWide, false));
  }
  sweep_by<kNarrow>(gpu, sweep, narrow);
}

}  // namespace cisc::cross_similarity
