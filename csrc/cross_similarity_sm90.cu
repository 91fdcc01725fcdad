// Sweeps of cross_similarity on sm_90a: which shape serves which rows and reduction.

#include "cross_similarity_sm90.cuh"

#include <cstdlib>
#include <cstring>
#include <string>

namespace cisc::cross_similarity {
namespace {

using namespace sm90;

// Other shapes and reductions for float16 rows of 256 numbers, to be measured beside the usual ones:
// CISC_CROSS_VARIANT names one (benchmarks/sweeps.py).
struct Variant {
  const char* name;
  Reduction reduction;
  class_sort::Cut (*cut)();
  void (*sweep)(const Gpu&, const Sweep&);
};

template <typename S, typename Reducer>
constexpr Variant variant(const char* name, Reduction reduction) {
  return {name, reduction, cut_of_shape<S>, launch<S, Matrix::f16, Reducer>};
}

constexpr Variant kVariants[] = {
    variant<Wide, reduce::Max<2, true>>("max_bits", Reduction::max),
    variant<BlockShape<2, 128, 1, true>, reduce::Max<2, false>>("max_alone", Reduction::max),
    variant<BlockShape<2, 128, 2, true, false>, reduce::Max<2, false>>("max_no_turns", Reduction::max),
    variant<Long, reduce::Max<1, false>>("max_long", Reduction::max),
    variant<BlockShape<1, 128, 2, true, true, 4>, reduce::Max<1, false>>("max_held", Reduction::max),
    variant<BlockShape<2, 128, 1, true>, reduce::Softmax<2>>("softmax_alone", Reduction::softmax),
    variant<BlockShape<2, 128, 2, true, false>, reduce::Softmax<2>>("softmax_no_turns", Reduction::softmax),
    variant<Long, reduce::Softmax<1>>("softmax_long", Reduction::softmax),
    variant<BlockShape<1, 256, 1, true>, reduce::TopK<1>>("topk_alone", Reduction::topk),
    variant<BlockShape<1, 256, 2, true, false>, reduce::TopK<1>>("topk_no_turns", Reduction::topk),
    variant<BlockShape<1, 128, 2, true>, reduce::TopK<1>>("topk_short", Reduction::topk),
};

// What is asked for, if it is of these rows and this reduction.
const Variant* variant_of(const RowShape& shape, Matrix type, Reduction reduction) {
  const char* asked = std::getenv("CISC_CROSS_VARIANT");
  if (asked == nullptr || *asked == '\0') return nullptr;
  std::string names;
  for (const Variant& one : kVariants) {
    names += std::string(names.empty() ? "" : ", ") + one.name;
    if (std::strcmp(asked, one.name) != 0) continue;
    const bool serves =
        one.reduction == reduction && type == Matrix::f16 && !shape.split && shape.chunks == 4;
    return serves ? &one : nullptr;
  }
  fail("cross_similarity", "CISC_CROSS_VARIANT must be one of ", names, ", got ", asked);
}

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

}  // namespace

class_sort::Cut cut_sm90(const RowShape& shape, Matrix type, Reduction reduction) {
  if (const Variant* one = variant_of(shape, type, reduction)) return one->cut();
  return cut_of(shape, reduction);
}

void sweep_sm90(const Gpu& gpu, const Sweep& sweep) {
  const Variant* one =
      sweep.flags == nullptr ? variant_of(sweep.shape, sweep.type, sweep.reduction) : nullptr;
  if (one != nullptr) return one->sweep(gpu, sweep);
  with_shape(sweep.shape, sweep.reduction, sweep.flags != nullptr, [&](auto s) {
    using S = decltype(s);
    if (sweep.type == Matrix::bf16) return sweep_by<S, Matrix::bf16>(gpu, sweep);
    sweep_by<S, Matrix::f16>(gpu, sweep);
  });
}

}  // namespace cisc::cross_similarity
