// cells.h and walk.h against brute force: prints what is wrong and ends with 1, or prints what was checked.
//
// Of an axis, each output pixel must lie in one cell, whose input and fraction are those of bilinear_tap. Of
// a walk, each pixel must be counted by one thread of one warp, each low-resolution point be written by one,
// which sees all cells that the point is a corner of, and each row of cells belong to one sum of the loss.

#include "walk.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

using namespace cisc;
using namespace cisc::cells;

int64_t checked_axes = 0, checked_walks = 0;

void require(bool holds, const char* what, int64_t a, int64_t b, int64_t c) {
  if (holds) return;
  std::printf("wrong: %s (%lld, %lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b),
              static_cast<long long>(c));
  std::exit(1);
}

void check_axis(int64_t n, int64_t m, bool align_corners) {
  const Axis axis = Axis::of(n, m, align_corners);
  const int64_t longest = longest_cell(axis, align_corners);
  int64_t pixel = 0;
  for (int64_t cell = 0; cell < n; ++cell) {
    require(axis.first(cell) == pixel, "a cell begins where the one before it ends", n, m, cell);
    const int64_t end = axis.first(cell + 1);
    require(end - pixel <= longest, "no cell is longer than the longest", n, m, cell);
    for (; pixel < end; ++pixel) {
      const Tap tap = bilinear_tap(pixel, n, m, align_corners);
      require(tap.low == cell && axis.cell_of(pixel) == cell, "a pixel's cell", n, m, pixel);
      require(tap.high == axis.next(cell), "the input on the other side", n, m, pixel);
      const double fraction = tap.weight_high<double>();
      require(std::fabs(fraction - axis.fraction(pixel, cell)) <= 6e-8 * fraction, "a fraction", n, m, pixel);
    }
  }
  require(pixel == m, "all pixels are in a cell", n, m, pixel);
  ++checked_axes;
}

// Who counts and who writes along the columns, and which rows of cells belong to which sum.
void check_walk(int64_t h, int64_t w, int64_t height, int64_t width, int64_t batch, bool align_corners,
                bool gradient, int64_t multiprocessors) {
  const Axis rows = Axis::of(h, height, align_corners), columns = Axis::of(w, width, align_corners);
  const Walk walk = walk_of(rows, columns, align_corners, batch, gradient, kPieceSide, multiprocessors, 8);
  require(walk.partials() <= std::max(kPartials, batch * walk.tiles), "few sums", h, w, walk.partials());
  require(walk.band % walk.unit == 0 && walk.bands * walk.band >= h, "bands are of whole sums", h, w,
          walk.band);
  // Tasks of one image: the others are alike.
  std::vector<int> counted(static_cast<size_t>(width), 0), written(static_cast<size_t>(w), 0);
  std::vector<int> row_counted(static_cast<size_t>(h), 0);
  std::vector<int64_t> sum_of_row(static_cast<size_t>(h), -1);
  for (int64_t number = 0; number < walk.tiles * walk.bands; ++number) {
    const Task task = Task::of(walk, number);
    require(task.image == 0 && task.begin < task.end && task.end <= h, "a task's rows", h, w, number);
    if (task.tile == 0) {
      for (int64_t at = task.begin; at < task.end; ++at) {
        ++row_counted[static_cast<size_t>(at)];
        sum_of_row[static_cast<size_t>(at)] = task.partial(walk, at);
        require(task.ends(walk, at) == (at + 1 == task.end || (at + 1) % walk.unit == 0), "where a sum ends",
                h, w, at);
      }
    }
    if (task.begin > 0) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Column one = Column::of(walk, task, lane);
      for (int x = one.first; one.counts && x < one.last; ++x) {
        ++counted[static_cast<size_t>(x)];
        const Tap tap = bilinear_tap(x, w, width, align_corners);
        // In front of the first input the two corners change places, with fraction 1.
        const int64_t low = one.cell < 0 ? one.right : one.left;
        require(tap.low == low, "a column's left input", w, width, x);
      }
      if (!one.writes) continue;
      require(gradient || one.cell == one.left, "who writes", w, width, one.cell);
      ++written[static_cast<size_t>(one.left)];
      if (!gradient) continue;
      // The cell on the left has this point as its right corner: the lane before has it.
      require(lane > 0 && Column::of(walk, task, lane - 1).cell == one.cell - 1, "the cell on the left", w,
              width, one.cell);
    }
  }
  for (int64_t x = 0; x < width; ++x)
    require(counted[static_cast<size_t>(x)] == 1, "counted once", w, width, x);
  for (int64_t x = 0; x < w && gradient; ++x) {
    require(written[static_cast<size_t>(x)] == 1, "written once", w, width, x);
  }
  for (int64_t y = 0; y < h; ++y) {
    require(row_counted[static_cast<size_t>(y)] == 1, "a row of cells in one band", h, height, y);
    require(sum_of_row[static_cast<size_t>(y)] == y / walk.unit, "a row's sum depends on shapes alone", h,
            height, y);
  }
  ++checked_walks;
}

}  // namespace

int main() {
  const int64_t sizes[] = {1, 2, 3, 5, 8, 31, 32, 33, 62, 63, 64, 129, 181, 721, 1024, 2049};
  for (const bool align_corners : {false, true}) {
    for (const int64_t n : sizes) {
      for (const int64_t m : sizes) check_axis(n, m, align_corners);
    }
    check_axis(131072, 131072, align_corners);
    check_axis(32768, 131072, align_corners);
    check_axis(131072, 7, align_corners);
    check_axis(2, 131072, align_corners);
    for (const bool gradient : {false, true}) {
      for (const int64_t multiprocessors : {1, 20, 132}) {
        for (const int64_t w : sizes) {
          for (const int64_t width : sizes)
            check_walk(33, w, 129, width, 3, align_corners, gradient, multiprocessors);
        }
        check_walk(131072, 40, 131072, 160, 2, align_corners, gradient, multiprocessors);
        check_walk(3, 131072, 9, 131072, 1, align_corners, gradient, multiprocessors);
      }
    }
  }
  std::printf("%lld axes, %lld walks\n", static_cast<long long>(checked_axes),
              static_cast<long long>(checked_walks));
}
