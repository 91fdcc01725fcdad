// A warp's way down a band of cells (walk.h), the adjoint of the upsampling, and how losses are launched.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cells.cuh"
#include "walk.h"

namespace cisc::cells {

constexpr int64_t kWarps = 8;       // that keep a multiprocessor busy
constexpr int kSmallPieceSide = 2;  // kPieceSide where cells have no more pixels

// Pieces of kPixels of the longest cell of the warp, at least one.
template <int kPixels>
__device__ __forceinline__ int pieces_of_warp(const Column& column) {
  int most = column.last - column.first;
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kAll, most, distance);
    most = other > most ? other : most;
  }
  return most > kPixels ? (most + kPixels - 1) / kPixels : 1;
}

// Pixels from (y, x) on of a thread's cell in a row of cells.
template <int kPixels>
__device__ __forceinline__ Piece<kPixels> piece_of(const Walk& walk, const Column& column, int64_t row, int y,
                                                   int bottom, int x) {
  return Piece<kPixels>::of(walk.rows, walk.columns, static_cast<int>(row), column.cell, y, x, bottom,
                            column.last);
}

// One bit for each label of a warp's pixels; labels that are 32 apart share one.
template <int kPixels>
__device__ __forceinline__ unsigned labels_of_warp(const int (&code)[kPixels][kPixels]) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
#pragma unroll
    for (int j = 0; j < kPixels; ++j) bits |= code[i][j] >= 0 ? 1u << (code[i][j] & 31) : 0u;
  }
  for (int distance = kLanes / 2; distance > 0; distance /= 2) bits |= __shfl_xor_sync(kAll, bits, distance);
  return bits;
}

// What the slopes of pixels send to the corners of their cell.
template <int kPixels>
struct Adjoint {
  Square sums{0.0f, 0.0f, 0.0f, 0.0f};

  // A row of pixels.
  __device__ __forceinline__ void add(const Piece<kPixels>& piece, int i, const float (&slope)[kPixels]) {
    float west = 0.0f, east = 0.0f;
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      west = fmaf(slope[j], 1.0f - piece.fx[j], west);
      east = fmaf(slope[j], piece.fx[j], east);
    }
    add(piece, i, west, east);
  }

  // The same of its sums for the left and the right.
  __device__ __forceinline__ void add(const Piece<kPixels>& piece, int i, float west, float east) {
    sums.a = fmaf(west, 1.0f - piece.fy[i], sums.a);
    sums.b = fmaf(east, 1.0f - piece.fy[i], sums.b);
    sums.c = fmaf(west, piece.fy[i], sums.c);
    sums.d = fmaf(east, piece.fy[i], sums.d);
  }
};

// Sums of the points of a warp that cells of other pieces and rows add to, a thread's own [planes] of each;
// upper and lower points change places from row to row, or are the same where every cell is one piece.
struct Carry {
  float* memory;  // [planes,32], twice unless the walk is of whole cells
  int64_t half;   // from the one to the other

  // Floats of a warp.
  CISC_HD static int64_t floats(const Walk& walk, int64_t planes) {
    return kLanes * planes * (walk.whole ? 1 : 2);
  }

  // Of a block, which is a warp: its part of the workspace, or without one its shared memory.
  __device__ __forceinline__ static Carry of(const Walk& walk, int64_t planes, float* workspace,
                                             unsigned char* shared) {
    float* const warp = workspace != nullptr ? workspace + blockIdx.x * floats(walk, planes)
                                             : reinterpret_cast<float*>(shared);
    return {warp + threadIdx.x % kLanes, walk.whole ? 0 : kLanes * planes};
  }
};

// A piece's place in the walk, and what is done with its sums.
struct Passage {
  float *upper, *lower;  // carry of the first plane
  int plane;             // place of the one at hand
  bool before;           // there is something for the upper points
  bool first, last;      // piece of its row of cells
  bool bottom;           // no row of points below
  bool last_cell;        // one point has both corners
  bool front, second;    // the warp has cell -1; this is cell 0, behind it
  bool edge;             // any of this in the warp
  bool writes;           // the upper points
  float factor;

  __device__ __forceinline__ static Passage of(const Walk& walk, const Carry& carry, const Column& column,
                                               int64_t row, bool writes, float factor) {
    Passage p{};
    p.upper = held(carry.memory + row % 2 * carry.half);
    p.lower = held(carry.memory + (row + 1) % 2 * carry.half);
    p.bottom = row + 1 == walk.rows.n;
    p.last_cell = column.cell + 1 == walk.columns.n;
    p.front = walk.front > 0 && column.tile == 0;
    p.second = column.cell == 0;
    p.edge = __any_sync(kAll, p.front || p.last_cell || p.bottom);
    p.writes = writes && column.writes;
    p.factor = factor;
    return p;
  }

  // Add the sums of a piece to those before it, and write what is complete; then go on to the next plane. A
  // whole warp.
  __device__ __forceinline__ void pass(Square sums, float* gradient) {
    float above, beneath;
    if (edge) {
      if (front) {
        // Cell -1 sends its share 0 of what is not finite, NaN, to its left input, which is cell 0's right
        // one.
        const float upper_nan = __shfl_up_sync(kAll, sums.a, 1), lower_nan = __shfl_up_sync(kAll, sums.c, 1);
        if (second) {
          sums.b += upper_nan;
          sums.d += lower_nan;
        }
      }
      above = sums.a + __shfl_up_sync(kAll, sums.b, 1);
      beneath = sums.c + __shfl_up_sync(kAll, sums.d, 1);
      if (last_cell) {
        above += sums.b;
        beneath += sums.d;
      }
      if (bottom) above += beneath;
    } else {
      above = sums.a + __shfl_up_sync(kAll, sums.b, 1);
      beneath = sums.c + __shfl_up_sync(kAll, sums.d, 1);
    }
    if (before) above += upper[plane];
    if (!first) beneath += lower[plane];
    if (!last) upper[plane] = above;
    lower[plane] = beneath;
    if (writes && last) *gradient = above * factor;
    plane = opaque(plane + kLanes);
  }
};

// Numbers that the launches of a loss share.
struct State {
  unsigned long long counted;  // pixels that are not ignored
  unsigned long long kept;     // of these, those that OHEM keeps
  unsigned long long wrong;    // not 0: a label or class is neither allowed nor ignored
};
constexpr int64_t kStateWords = 3;

// What a walk is for; a histogram is of what OHEM chooses by.
enum class Mode { loss, gradient, histogram };

// What the kernels of a loss have in common.
struct LossKernel {
  Walk walk;
  int64_t planes;
  Labels labels;
  int64_t ignore_index;
  Classes classes;
  float* carry;  // [blocks, of a warp], or null where it is in shared memory
  State* state;
  double* partial;  // [partials]
  float* grad;      // [B,planes,h,w]
};

// Go through the pieces of a task: f(corners, piece, counts, passage, gradient) returns the loss of a
// thread's pixels, which is summed where it counts. The sums, multiplied by `share`, go to p.partial; what
// `passage` writes is multiplied by `factor`. A whole warp.
template <Mode kMode, int kPixels, typename T, typename Function>
__device__ __forceinline__ void walk_pieces(const LossKernel& p, const Task& task, const Maps<T>& maps,
                                            const Carry& carry, float factor, double share,
                                            const Function& f) {
  const Walk& walk = p.walk;
  const Column column = Column::of(walk, task, static_cast<int>(threadIdx.x));
  const int pieces_x = pieces_of_warp<kPixels>(column);
  double total = 0.0;
  bool before = false;
  for (int64_t at = task.begin > 0 ? task.begin - walk.shared : 0; at < task.end; ++at) {
    const int top = static_cast<int>(walk.rows.first(at)), bottom = static_cast<int>(walk.rows.first(at + 1));
    const int pieces_y = bottom - top > kPixels ? (bottom - top + kPixels - 1) / kPixels : 1;
    const Corners corners = Corners::of_points(maps, at, walk.rows.next(at), column.left, column.right);
    const bool counts = column.counts && at >= task.begin;
    Passage passage = Passage::of(walk, carry, column, at, at >= task.begin, factor);
    float* gradient = nullptr;
    if (kMode == Mode::gradient) {
      gradient = held(p.grad + ((task.image * p.planes * walk.rows.n + at) * walk.columns.n + column.cell));
    }
    for (int piece_y = 0; piece_y < pieces_y; ++piece_y) {
      for (int piece_x = 0; piece_x < pieces_x; ++piece_x) {
        passage.before = before;
        passage.first = piece_y == 0 && piece_x == 0;
        passage.last = piece_y + 1 == pieces_y && piece_x + 1 == pieces_x;
        const float loss = f(corners,
                             piece_of<kPixels>(walk, column, at, top + piece_y * kPixels, bottom,
                                               column.first + piece_x * kPixels),
                             counts, passage, gradient);
        total += counts ? static_cast<double>(loss) : 0.0;
        before = true;
      }
    }
    if (kMode != Mode::histogram && at >= task.begin && task.ends(walk, at)) {
      total = warp_sum(total);
      if (threadIdx.x == 0) p.partial[task.partial(walk, at)] = total * share;
      total = 0.0;
    }
  }
}

// Whether this thread's share of an image's classes, of a warp's, has one that is neither -1 nor in [0,
// limit).
__device__ __forceinline__ bool any_wrong(const Classes& classes, int64_t image, int64_t limit) {
  bool found = false;
  for (int64_t s = threadIdx.x % kLanes; s < classes.slots; s += kLanes) {
    const int64_t one = classes.at(image, s);
    found = found || one < -1 || one >= limit;
  }
  return found;
}

// The same for the first task of an image; false for the others.
__device__ __forceinline__ bool any_wrong(const Classes& classes, const Task& task, int64_t limit) {
  return task.tile == 0 && task.begin == 0 && any_wrong(classes, task.image, limit);
}

// What the loss and its gradient are divided by.
enum class Divisor : int32_t { given, counted, kept };

namespace {

constexpr int kFinishThreads = 512, kCountThreads = 256;
constexpr int kCountPack = 16;

// Wrong classes, where there are no pixels in whose walk they would be found.
__global__ void __launch_bounds__(kLanes) classes_kernel(Classes classes, int64_t limit, State* state) {
  for (int64_t image = blockIdx.x; image < classes.batch; image += gridDim.x) {
    if (any_wrong(classes, image, limit)) state->wrong = 1;  // whoever writes, the same
  }
}

// Pixels that are not ignored. packed: [ceil(B H W / 16)] where labels are contiguous bytes, else null.
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(Labels labels, const uint8_t* packed, int64_t batch, int64_t height, int64_t width,
                 int64_t ignore_index, State* state) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kCountThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kCountThreads;
  int64_t counted = 0;
  if (packed != nullptr) {
    const int64_t pixels = batch * height * width, packs = pixels / kCountPack;
    for (int64_t i = thread; i < packs; i += threads) {
      const auto pack = read_pack<kCountPack>(packed + i * kCountPack);
      int here = 0;
#pragma unroll
      for (int j = 0; j < kCountPack; ++j) here += pack.at[j] != ignore_index;
      counted += here;
    }
    for (int64_t i = packs * kCountPack + thread; i < pixels; i += threads)
      counted += packed[i] != ignore_index;
  } else {
    for (int64_t line = thread / kLanes; line < batch * height; line += threads / kLanes) {
      const int64_t image = line / height, y = line % height;
      for (int64_t x = thread % kLanes; x < width; x += kLanes)
        counted += labels.at(image, y, x) != ignore_index;
    }
  }
  const int64_t all = block_sum<kCountThreads>(counted);
  if (threadIdx.x == 0 && all > 0) atomicAdd(&state->counted, static_cast<unsigned long long>(all));
}

__device__ __forceinline__ double divisor_of(const State* state, Divisor by, double given) {
  if (by == Divisor::given) return given;
  const unsigned long long count = by == Divisor::counted ? state->counted : state->kept;
  return static_cast<double>(count > 0 ? count : 1);
}

// Add up the loss in a fixed order and divide it; where anything is wrong, all is NaN.
// partial: [partials]
// values: [n], a gradient that still has to be divided (`divides`), or losses of pixels
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partial, int64_t partials, const State* state, Divisor by, double given,
                  bool divides,
                  // outputs
                  float* loss, float* values, int64_t n) {
  const bool wrong = state->wrong != 0;
  const double divisor = divisor_of(state, by, given);
  if (wrong || divides) {
    const float factor = wrong ? NAN : 1.0f / static_cast<float>(divisor);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kFinishThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x; i < n; i += threads) {
      values[i] = wrong ? factor : values[i] * factor;
    }
  }
  if (blockIdx.x > 0 || loss == nullptr) return;
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < partials; i += kFinishThreads) total += partial[i];
  total = block_sum<kFinishThreads>(total);
  if (threadIdx.x == 0) *loss = wrong ? NAN : static_cast<float>(total / divisor);
}

}  // namespace

// labels: [B,H,W] uint8, int32 or int64, any strides
inline void launch_count(const Gpu& gpu, const Tensor& tensor, const Labels& labels, int64_t ignore_index,
                         State* state) {
  const int64_t height = tensor.size(1), width = tensor.size(2), pixels = tensor.numel();
  const bool flat = labels.kind == Integer::u8 && tensor.is_contiguous() &&
                    reinterpret_cast<uintptr_t>(labels.data) % kCountPack == 0;
  const int64_t most = gpu.multiprocessors() * 8, wanted = pixels / (kCountThreads * kCountPack) + 1;
  gpu.launch(count_kernel, std::min(most, wanted), kCountThreads, 0, labels,
             flat ? static_cast<const uint8_t*>(labels.data) : nullptr, tensor.size(0), height, width,
             ignore_index, state);
}

// As finish_kernel; n is 0 where nothing is to be divided or spoilt.
inline void launch_finish(const Gpu& gpu, const double* partial, int64_t partials, const State* state,
                          Divisor by, double given, bool divides, float* loss, float* values, int64_t n) {
  const int64_t wanted = n / (kFinishThreads * 4) + 1;
  gpu.launch(finish_kernel, std::min(gpu.multiprocessors() * 2, wanted), kFinishThreads, 0, partial, partials,
             state, by, given, divides, loss, values, n);
}

// The loss of no pixels, and its gradient of zeros; both NaN where a class is wrong.
inline void launch_empty(const Gpu& gpu, const Classes& classes, int64_t limit, State* state,
                         // outputs
                         Tensor* loss, Tensor* grad) {
  gpu.launch(classes_kernel, std::min<int64_t>(classes.batch, 1024), kLanes, 0, classes, limit, state);
  launch_finish(gpu, nullptr, 0, state, Divisor::given, 1.0, false, data_of<float>(*loss),
                data_of<float>(*grad), grad->numel());
}

// How a loss is launched. The carry of a gradient is in shared memory where it leaves room for enough warps
// beside each other, else in a workspace, which holds it for all blocks that run at a time.
struct WalkPlan {
  Walk walk;
  bool small;      // pieces of kSmallPieceSide
  int64_t shared;  // bytes of a block
  int64_t blocks;  // of a launch, each a warp
  Tensor carry;    // of all blocks, float32, or [0]
  Tensor partial;  // [partials] float64; of a histogram, [0]

  // maps: [B,planes,h,w]
  static WalkPlan of(const Gpu& gpu, const Tensor& maps, const Axis& rows, const Axis& columns,
                     bool align_corners, Mode mode) {
    constexpr int64_t most = int64_t{32} << 20, grid = 1 << 20;
    const bool small = !exceeds(rows, columns, kSmallPieceSide), gradient = mode == Mode::gradient;
    const Walk walk = walk_of(rows, columns, align_corners, maps.size(0), gradient,
                              small ? kSmallPieceSide : kPieceSide, gpu.multiprocessors(), kWarps);
    const int64_t floats = gradient ? Carry::floats(walk, maps.size(1)) : 0, bytes = 4 * floats;
    const bool fits = bytes <= gpu.shared_bytes() / kWarps;
    int64_t blocks = std::min(walk.tasks(), grid);
    if (!fits) blocks = std::min(blocks, std::max<int64_t>(most / bytes, 1));
    return {walk,
            small,
            fits ? bytes : 0,
            blocks,
            device_empty(maps, {fits ? 0 : blocks * floats}, ScalarType::Float),
            device_empty(maps, {mode == Mode::histogram ? 0 : walk.partials()}, ScalarType::Double)};
  }

  float* workspace() { return carry.numel() > 0 ? data_of<float>(carry) : nullptr; }

  // f(integral constant of the side of a piece)
  template <typename Function>
  void with_side(const Function& f) const {
    if (small) return f(std::integral_constant<int, kSmallPieceSide>{});
    return f(std::integral_constant<int, kPieceSide>{});
  }
};

}  // namespace cisc::cells
