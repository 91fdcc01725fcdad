// The sweep of cross_similarity on sm_90a that screens for "max": products of int8.

#include "cross_similarity_screen.cuh"
#include "cross_similarity_sm90.cuh"

namespace cisc::cross_similarity {
namespace {

using namespace sm90;

using Screens = reduce::Screen<kGroups * kWarpGroup, 256>;
using Held = BlockShape<1, 256, 2, true, true, 0, Screens::kBytes>;       // rows of up to 512 numbers
using Streamed = BlockShape<1, 256, 2, false, true, 0, Screens::kBytes>;  // any rows

static_assert(Held::kRows == Streamed::kRows && Held::kColumns == Streamed::kColumns, "one cut");

}  // namespace

class_sort::Cut cut_screen_sm90() { return {Held::kRows * Held::kCluster, Held::kColumns, kWantedClusters}; }

void screen_sm90(const Gpu& gpu, const Sweep& sweep) {
  if (fits<Held>(sweep.shape)) return launch<Held, Matrix::s8, Screens>(gpu, sweep);
  launch<Streamed, Matrix::s8, Screens>(gpu, sweep);
}

}  // namespace cisc::cross_similarity
