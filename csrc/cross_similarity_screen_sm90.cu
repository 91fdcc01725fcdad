// The sweep of cross_similarity on sm_90a that screens for "max": products of int8.

#include "cross_similarity_screen.cuh"
#include "cross_similarity_sm90.cuh"

namespace cisc::cross_similarity {
namespace {

using namespace sm90;

using Screens = reduce::Screen<kGroups * kWarpGroup, 256>;
using HeldScreen = BlockShape<1, 256, 2, true, true, 0, Screens::kBytes>;       // rows of up to 512 numbers
using StreamedScreen = BlockShape<1, 256, 2, false, true, 0, Screens::kBytes>;  // any rows

static_assert(HeldScreen::kRows == StreamedScreen::kRows && HeldScreen::kColumns == StreamedScreen::kColumns,
              "one cut");

}  // namespace

class_sort::Cut cut_screen_sm90() { return cut_of_shape<HeldScreen>(); }

void screen_sm90(const Gpu& gpu, const Sweep& sweep) {
  if (fits<HeldScreen>(sweep.shape)) return launch<HeldScreen, Matrix::s8, Screens>(gpu, sweep);
  launch<StreamedScreen, Matrix::s8, Screens>(gpu, sweep);
}

}  // namespace cisc::cross_similarity
