// cross_similarity on a GPU: tiles of 64 x 64 cosines in float32, reduced while they are in shared memory.
//
// Work: C fused multiply-adds for each pair of pixels that is compared; for 16384 pixels against as many with
// 256 channels 69 G of them, on 132 x 128 lanes at 1.75 GHz 2.3 ms at best. Reading a tile's operands from
// shared memory, 32 bytes for 16 of them, keeps that busy for three quarters of this time beside it. "mean"
// takes no pairs but for its index: see cross_similarity_means.cuh. Where a chip has a sweep on tensor cores
// (cross_similarity_sm80.cu, cross_similarity_sm90.cu), that compares instead, "max" behind a screen by int8
// where it is asked for, and this kernel is left what labels that are no bytes share.

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "cross_similarity_finish.cuh"
#include "cross_similarity_means.cuh"
#include "cross_similarity_pairs.cuh"

namespace cisc::cross_similarity {
namespace {

constexpr int kCombineThreads = 128;
constexpr int kRows = 8, kRowsDepth = 16, kRowsThreads = 128;  // of a block that meets means

static_assert(kRows * kRowsDepth == kRowsThreads, "a thread brings one number");

// What the plain kernel compares: all; or where labels are no bytes and share a bin, those alone, as a sweep
// on tensor cores has met the rest, or all of their images.
enum class Compared { all, shared_bin, images_of_shared_bin };

struct Kernel {
  Side query, guide;
  SlotClasses classes;
  Compared compared;
  Schedule schedule;  // of the images whose sides are ready
  int64_t first_unit, units;
  float steepness;
  int64_t k;
  bool indexed, shared_winners;
  State* states;      // [units,splits,64]
  int64_t* winners;   // [units,splits,64,k] where shared_winners
  float* similarity;  // [B,S,h,w]
  int64_t* index;     // [B,S,h,w]
  int64_t* saved;     // [B,S,h,w,k] of "topk"
  float* log_totals;  // [B,S,h,w] of "softmax"

  // Whether pixels of a slot's class are compared, or in own-label mode any of the image.
  __device__ bool meets(int64_t b, int64_t wanted) const {
    if (compared == Compared::images_of_shared_bin) return meets_shared_bin(query, guide, classes, b);
    return compared == Compared::all || classes.own || class_sort::bin_of(wanted) == kBins - 1;
  }

  // Place of a pixel in a tensor [B,S,h,w].
  __device__ int64_t place(int64_t b, int64_t slot, int64_t pixel) const {
    return (b * schedule.slots + slot) * query.pixels + pixel;
  }
};

// A block has 64 query pixels, and a part of the guide's pixels that they are compared with.
template <Reduction reduction>
__global__ void __launch_bounds__(kThreads, 2) compare_kernel(Kernel p) {
  CISC_SHARED(tile, Tile);
  CISC_SHARED(states, State[kTile]);
  CISC_DYNAMIC_SHARED(memory);
  const int64_t unit = blockIdx.x / p.schedule.splits;
  const class_sort::Job job = p.schedule.job(p.first_unit + unit, blockIdx.x % p.schedule.splits);
  const int64_t b = p.query.first + job.image, wanted = p.classes.own ? 0 : p.classes.at(b, job.slot);
  if (!p.meets(b, wanted)) return;
  const int row = static_cast<int>(threadIdx.x) % kTile, part = static_cast<int>(threadIdx.x) / kTile;
  if (part == 0) {
    const int64_t position = job.tile * kTile + row;
    // Positions of the last bin come last.
    const bool among =
        p.compared != Compared::shared_bin || !p.classes.own || position >= p.query.starts_of(b)[kBins - 1];
    tile.held.set(p.query, b, row, among && position < p.query.count(b) ? position : -1, !p.classes.own,
                  wanted);
  }
  if (p.classes.own) {
    list_bins_of_held(p.guide, b, tile);
  } else {
    const int32_t* starts = p.guide.starts_of(b) + class_sort::bin_of(wanted);
    list_range(starts[0], wanted < 0 ? starts[0] : starts[1], tile);
  }
  const bool inside = tile.held.pixel[row] >= 0;
  const float* cosines = tile.cosines + part * kColumns * kPitch + row;
  State state = State::none();
  const int64_t result = static_cast<int64_t>(blockIdx.x) * kTile + row;
  Heap heap{nullptr, p.k, 0};
  if (reduction == Reduction::topk) {
    heap.at = p.shared_winners ? reinterpret_cast<int64_t*>(memory) + row * p.k
                               : p.saved + p.place(b, job.slot, inside ? tile.held.pixel[row] : 0) * p.k;
  }
  float least = -kInfinity;  // to be a winner takes more
  const int64_t end = p.schedule.first_tile(tile.list, job.split + 1);
  for (int64_t number = p.schedule.first_tile(tile.list, job.split); number < end; ++number) {
    set_streamed(p.guide, b, number, false, 0, tile);
    __syncthreads();
    compute_cosines(p.query, p.guide, tile);
    if (reduction == Reduction::topk) {
      if (part == 0 && inside) {
        for (int i = 0; i < kTile; ++i) {
          const float value = tile.cosines[i * kPitch + row];
          if (value <= least || value == -kInfinity) continue;
          const int64_t winner = pack_winner(value, tile.streamed.pixel[i]);
          if (!heap.wants(winner)) continue;
          heap.push(winner);
          if (heap.count == heap.k) least = value_of(heap.at[0]);
        }
      }
    } else {
      if (reduction == Reduction::max || p.indexed) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          state.take_best(cosines[i * kPitch], tile.streamed.pixel[part * kColumns + i]);
        }
      }
      if (reduction == Reduction::mean) {
        float sum = 0.0f;
        int count = 0;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float value = cosines[i * kPitch];
          const bool counts = value != -kInfinity;
          sum += counts ? value : 0.0f;
          count += counts ? 1 : 0;
        }
        state.weighted += static_cast<double>(sum);
        state.total += count;
      }
      if (reduction == Reduction::softmax) {
        float most = -kInfinity;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) most = max(cosines[i * kPitch], most);
        state.raise(most, static_cast<double>(p.steepness));
        float total = 0.0f, weighted = 0.0f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float value = cosines[i * kPitch], above = value - state.top;
          const bool counts = value != -kInfinity;
          const float weight = counts ? fast_exp2(above * p.steepness) : 0.0f;
          total += weight;
          weighted = fmaf(weight, counts ? above : 0.0f, weighted);
        }
        state.total += static_cast<double>(total);
        state.weighted += static_cast<double>(weighted);
      }
    }
    __syncthreads();
  }
  if (reduction == Reduction::topk) {
    if (part != 0) return;
    state.index = static_cast<int32_t>(heap.count);
    if (p.shared_winners) {
      for (int64_t i = 0; i < heap.count; ++i) p.winners[result * p.k + i] = heap.at[i];
    }
  } else {
    for (int i = 1; i < kParts; ++i) {
      if (part == i) states[row] = state;
      __syncthreads();
      if (part == 0) state.merge(states[row], reduction, static_cast<double>(p.steepness));
      __syncthreads();
    }
    if (part != 0) return;
  }
  p.states[result] = state;
}

// A thread has a query pixel, and puts the guide's parts together, in their order.
template <Reduction reduction>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Kernel p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int64_t unit = number / kTile, row = number % kTile, splits = p.schedule.splits;
  if (unit >= p.units) return;
  const class_sort::Job job = p.schedule.job(p.first_unit + unit, 0);
  const int64_t b = p.query.first + job.image, position = job.tile * kTile + row;
  if (position >= p.query.count(b)) return;
  if (!p.meets(b, p.classes.own ? 0 : p.classes.at(b, job.slot))) return;
  const int64_t place = p.place(b, job.slot, p.query.pixel_at(b, position));
  State state = State::none();
  float value = 0.0f;
  if (reduction == Reduction::topk) {
    Heap heap{p.saved + place * p.k, p.k, 0};
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t result = (unit * splits + split) * kTile + row;
      if (!p.shared_winners) heap.count = p.states[result].index;
      for (int64_t i = 0; p.shared_winners && i < p.states[result].index; ++i) {
        const int64_t winner = p.winners[result * p.k + i];
        if (heap.wants(winner)) heap.push(winner);
      }
    }
    if (heap.count == 0) return;
    finish_winners(heap, &value, &state.index);
  } else {
    for (int64_t split = 0; split < splits; ++split) {
      state.merge(p.states[(unit * splits + split) * kTile + row], reduction,
                  static_cast<double>(p.steepness));
    }
    if (reduction == Reduction::max) {
      if (state.index < 0) return;
      value = state.best;
    } else {
      if (state.total == 0.0) return;
    }
    if (reduction == Reduction::mean) value = static_cast<float>(state.weighted / state.total);
    if (reduction == Reduction::softmax) {
      value = state.mean(1.0, static_cast<double>(p.steepness), &p.log_totals[place]);
    }
  }
  p.similarity[place] = value;
  if (p.indexed) p.index[place] = state.index;
}

// Some channels of the means that a block meets.
struct MeanRows {
  alignas(16) float at[kRowsDepth * kRows];
};

// A block has 128 query pixels and up to 8 classes of "mean".
__global__ void __launch_bounds__(kRowsThreads) meet_means_kernel(Means p, bool begins,
                                                                  // outputs
                                                                  float* similarity /* [B,S,h,w] */) {
  CISC_SHARED(means, MeanRows);  // [channel,row]
  const Side& query = p.query;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t groups = ceil_div(p.rows, kRows), tiles = ceil_div(query.pixels, kRowsThreads);
  const int64_t first_row = blockIdx.x % groups * kRows, number = blockIdx.x / groups;
  const int64_t image = number / tiles, b = p.image + image;
  const int64_t pixel = number % tiles * kRowsThreads + thread;
  const bool inside = pixel < query.pixels;
  const int64_t of = inside ? (b - query.first) * query.pixels + pixel : 0;
  const int64_t offset = inside ? query.offset(b, pixel) : 0;
  const float scale = query.scale[of], rest = query.rest[of], low = query.low[of];
  const int64_t brought = first_row + thread / kRowsDepth, channel = thread % kRowsDepth;
  const bool brings = brought < p.rows && p.counts[image * p.rows + brought] > 0;
  const float* from = p.table + (image * p.rows + brought) * p.channels + channel;
  float sums[kRows] = {};
  for (int64_t first = 0; first < p.channels; first += kRowsDepth) {
    means.at[channel * kRows + thread / kRowsDepth] =
        brings && first + channel < p.channels ? from[first] : 0.0f;
    float values[kRowsDepth];
    read_channels(query.image, offset + (p.first_channel + first) * query.image.stride_c, 1,
                  inside ? p.channels - first : 0, values);
    __syncthreads();
    float piece[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRowsDepth; ++i) {
      const float unit = unit_of(values[i], scale, rest, low);
      const auto left = read_pack<4>(means.at + i * kRows), right = read_pack<4>(means.at + i * kRows + 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        piece[j] = fmaf(unit, left.at[j], piece[j]);
        piece[4 + j] = fmaf(unit, right.at[j], piece[4 + j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) sums[j] += piece[j];
    __syncthreads();
  }
  if (!inside) return;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int64_t row = first_row + j;
    if (row >= p.rows || p.counts[image * p.rows + row] == 0) continue;
    float& to = similarity[(b * p.rows + row) * query.pixels + pixel];
    to = begins ? sums[j] : to + sums[j];
  }
}

// A thread has a query pixel, and the mean of its own label.
__global__ void __launch_bounds__(kRowsThreads) meet_own_mean_kernel(Means p, bool begins,
                                                                     // outputs
                                                                     float* similarity /* [B,1,h,w] */) {
  const Side& query = p.query;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kRowsThreads + threadIdx.x;
  if (number >= p.images * query.pixels) return;
  const int64_t image = number / query.pixels, pixel = number % query.pixels, b = p.image + image;
  const int64_t row = p.row_of(query.label(b, pixel), true), of = (b - query.first) * query.pixels + pixel;
  if (row < 0 || p.counts[image * p.rows + row] == 0) return;
  const float scale = query.scale[of], rest = query.rest[of], low = query.low[of];
  const int64_t offset = query.offset(b, pixel) + p.first_channel * query.image.stride_c;
  const float* mean = p.table + (image * p.rows + row) * p.channels;
  float sum = 0.0f;
  for (int64_t first = 0; first < p.channels; first += kRowsDepth) {
    float values[kRowsDepth], piece = 0.0f;
    read_channels(query.image, offset + first * query.image.stride_c, 1, p.channels - first, values);
#pragma unroll
    for (int i = 0; i < kRowsDepth; ++i) {
      if (first + i < p.channels) {
        piece = fmaf(unit_of(values[i], scale, rest, low), mean[first + i], piece);
      }
    }
    sum += piece;
  }
  float& to = similarity[b * query.pixels + pixel];
  to = begins ? sum : to + sum;
}

template <Reduction reduction>
void run_compare(const Gpu& gpu, Pairs& pairs, const Inputs& in, Kernel p) {
  const auto sizes = ResultSizes::of_plain(reduction, p.k);
  // As int64, so that all is aligned to 8 bytes.
  Tensor workspace = device_empty(in.query, {sizes.bytes(p.schedule) / 8}, ScalarType::Long);
  p.states = reinterpret_cast<State*>(data_of<int64_t>(workspace));
  p.winners = data_of<int64_t>(workspace) + sizes.rows(p.schedule) * static_cast<int64_t>(sizeof(State)) / 8;
  const int64_t shared = p.shared_winners ? 8 * p.k * kTile : 0;
  pairs.each([&](int64_t images) {
    p.query = pairs.query();
    p.guide = pairs.guide();
    p.schedule.images = images;
    const int64_t step = sizes.units(p.schedule);
    for (p.first_unit = 0; p.first_unit < p.schedule.units(); p.first_unit += step) {
      p.units = std::min(step, p.schedule.units() - p.first_unit);
      gpu.launch(compare_kernel<reduction>, p.units * p.schedule.splits, kThreads, shared, p);
      gpu.launch(combine_kernel<reduction>, ceil_div(p.units * kTile, kCombineThreads), kCombineThreads, 0,
                 p);
    }
  });
}

// The functions of a chip's tensor cores.
struct SweepsOfChip {
  class_sort::Cut (*cut)(const RowShape&, Matrix, Reduction) = nullptr;
  void (*sweep)(const Gpu&, const Sweep&) = nullptr;
  class_sort::Cut (*screen_cut)() = nullptr;
  void (*screen)(const Gpu&, const Sweep&) = nullptr;

  // Of this GPU, as far as the library has code for it.
  static SweepsOfChip of(const Gpu& gpu) {
#if defined(CISC_HAS_SM90) || defined(CISC_SIMT)
    if (gpu.capability() == 90) return {cut_sm90, sweep_sm90, cut_screen_sm90, screen_sm90};
#endif
#if defined(CISC_HAS_SM80) || defined(CISC_SIMT)
    if (gpu.capability() >= 80) return {cut_sm80, sweep_sm80};
#endif
    return {};
  }

  bool there() const { return sweep != nullptr; }
};

// Sweeps on tensor cores, of "max", "topk" or "softmax".
class Sweeps {
 public:
  Sweeps(const Gpu& gpu, const Inputs& in, const Packing& packing, Reduction reduction)
      : gpu_(gpu),
        in_(in),
        chip_(SweepsOfChip::of(gpu)),
        packing_(packing),
        reduction_(reduction),
        screens_(packing.bytes && reduction == Reduction::max),
        schedule_(Schedule::of(
            in.batch(), in.slots(), in.query_pixels(), in.guide_pixels(),
            screens_ ? chip_.screen_cut() : chip_.cut(packing.shape, packing.matrix(), reduction))),
        sizes_(ResultSizes::of_sweep(reduction, screens_)),
        results_(sizes_.rows(schedule_)) {}

  int64_t result_bytes() const { return results_ * sizes_.row_bytes; }

  // memory: result_bytes(), aligned to 8; finish: outputs; of the images whose sides are packed
  void run(const Pairs& pairs, int64_t images, int64_t* memory, Finish finish) {
    schedule_.images = images;
    Sweep sweep{};
    sweep.type = packing_.matrix();
    sweep.shape = packing_.shape;
    sweep.query_rows = pairs.query_rows().data;
    sweep.guide_rows = pairs.guide_rows().data;
    sweep.query_scale = pairs.query_rows().scale;
    sweep.guide_scale = pairs.guide_rows().scale;
    // Of float16 rows whose rest is left out, two lengths are off by 2^-11.
    const float error = packing_.form == Form::rounded ? 0x1.1p-10f : 0.0f;
    sweep.packed = {
        sweep.type,        sweep.shape, pairs.query_rows().data, pairs.guide_rows().data, sweep.query_scale,
        sweep.guide_scale, error};
    sweep.images = static_cast<int32_t>(images);
    sweep.query_pixels = static_cast<int32_t>(in_.query_pixels());
    sweep.guide_pixels = static_cast<int32_t>(in_.guide_pixels());
    sweep.query_starts = pairs.query().starts;
    sweep.guide_starts = pairs.guide().starts;
    sweep.first_image = pairs.query().first;
    sweep.classes = pairs.classes();
    sweep.bins = bins_of(in_);
    sweep.slots = static_cast<int32_t>(schedule_.slots);
    sweep.tiles = static_cast<int32_t>(schedule_.tiles);
    sweep.rows = static_cast<int32_t>(schedule_.rows);
    sweep.splits = static_cast<int32_t>(schedule_.splits);
    sweep.reduction = reduction_;
    sweep.steepness = in_.settings.steepness();
    sweep.states = reinterpret_cast<State*>(memory);
    sweep.winners = memory + results_ * static_cast<int64_t>(sizeof(State)) / 8;
    sweep.candidates = reinterpret_cast<int32_t*>(sweep.winners);
    auto* const flags = sweep.candidates + results_ * kCandidates;
    finish.bounds = sweep.winners + results_ * kFoundAtOnce;
    finish.query = pairs.query();
    finish.guide = pairs.guide();
    check(schedule_.units() <= INT32_MAX, kForward, "these shapes have too many classes and pixels");
    const int64_t step = sizes_.units(schedule_);
    for (int64_t first = 0; first < schedule_.units(); first += step) {
      sweep.first_unit = static_cast<int32_t>(first);
      sweep.units = static_cast<int32_t>(std::min(step, schedule_.units() - first));
      if (screens_) {
        screen(pairs, sweep, finish, flags);
        sweep.flags = flags;
      }
      for (finish.found_before = 0; finish.found_before < finish.k; finish.found_before += kFoundAtOnce) {
        sweep.bounds = finish.found_before > 0 ? finish.bounds : nullptr;
        finish.last = finish.found_before + kFoundAtOnce >= finish.k;
        chip_.sweep(gpu_, sweep);
        finish.sweep = sweep;
        const auto kernel = with_form(packing_.form, [&](auto form) {
          return finish_kernel<decltype(form)::value>(reduction_, finish.k);
        });
        const int lanes = reduction_ == Reduction::softmax ? 1 : kRowLanes;
        gpu_.launch(kernel, finish_blocks(sweep, lanes), kFinishThreads, 0, finish);
      }
    }
  }

  // Whether "max" screens: CISC_CROSS_SCREEN=1, where the chip can and sums of products are no more than
  // int32.
  static bool screens(const Gpu& gpu, const Inputs& in) {
    const char* asked = std::getenv("CISC_CROSS_SCREEN");
    return SweepsOfChip::of(gpu).screen != nullptr && in.channels() <= kMostScreened && asked != nullptr &&
           std::string(asked) == "1";
  }

  // Bins of one label each.
  static int32_t bins_of(const Inputs& in) { return wide_labels(in) ? kBins - 1 : kBins; }

 private:
  // The best of units whose candidates are all there; the others have a flag.
  void screen(const Pairs& pairs, const Sweep& sweep, Finish finish, int32_t* flags) const {
    Sweep screen = sweep;
    screen.flags = nullptr;  // those of the units before, where there are more
    screen.type = Matrix::s8;
    screen.shape = {packing_.byte_chunks(), false};
    screen.query_rows = pairs.query_bytes().data;
    screen.guide_rows = pairs.guide_bytes().data;
    screen.query_steps = pairs.query_bytes().steps;
    screen.guide_steps = pairs.guide_bytes().steps;
    screen.slack = Bounds::slack(in_.channels());
    chip_.screen(gpu_, screen);
    gpu_.launch(flag_kernel, screen.units, kFinishThreads, 0, screen, flags);
    finish.sweep = sweep;
    finish.sweep.flags = flags;
    const auto kernel =
        with_form(packing_.form, [](auto form) { return finish_screen_kernel<decltype(form)::value>; });
    gpu_.launch(kernel, finish_blocks(screen, kRowLanes), kFinishThreads, 0, finish, screen);
  }

  const Gpu& gpu_;
  const Inputs& in_;
  SweepsOfChip chip_;
  Packing packing_;
  Reduction reduction_;
  bool screens_;
  Schedule schedule_;
  ResultSizes sizes_;
  int64_t results_;  // rows of a launch, with each split
};

// All by sweeps, with packed rows of their own, which are given back; of "mean" the index.
void run_sweeps(const Gpu& gpu, const Inputs& in, bool indexed,
                // outputs
                Tensor& similarity, Tensor& index, Tensor& saved) {
  const Reduction reduction = in.settings.reduction;
  const bool max = reduction == Reduction::max, topk = reduction == Reduction::topk;
  const bool softmax = reduction == Reduction::softmax;
  auto packing = Packing::of(in);
  packing.bytes = max && Sweeps::screens(gpu, in);
  Pairs pairs(gpu, in, packing);
  Finish finish{};
  finish.k = topk ? in.winners() : 1;
  finish.similarity = data_of<float>(similarity);
  finish.index = indexed ? data_of<int64_t>(index) : nullptr;
  finish.saved = topk ? data_of<int64_t>(saved) : nullptr;
  finish.log_totals = softmax ? data_of<float>(saved) : nullptr;
  finish.values = max;
  std::vector<Sweeps> in_turn;  // by the same memory
  if (max || (indexed && !topk)) in_turn.emplace_back(gpu, in, packing, Reduction::max);
  if (topk || softmax) in_turn.emplace_back(gpu, in, packing, reduction);
  int64_t bytes = 0;
  for (const Sweeps& one : in_turn) bytes = std::max(bytes, one.result_bytes());
  Tensor results = device_empty(in.query, {bytes / 8}, ScalarType::Long);
  pairs.each([&](int64_t images) {
    for (Sweeps& one : in_turn) one.run(pairs, images, data_of<int64_t>(results), finish);
  });
}

void run_means(const Gpu& gpu, Pairs& pairs, const Inputs& in, float* similarity) {
  MeanTables tables(gpu, in);
  pairs.each([&](int64_t images) {
    const Side& query = pairs.query();
    tables.each(
        query, pairs.guide(), pairs.classes(), images, 1, Alike{}, [&](const Means& p, bool begins, bool) {
          if (p.classes.own) {
            const int64_t blocks = ceil_div(p.images * query.pixels, kRowsThreads);
            gpu.launch(meet_own_mean_kernel, blocks, kRowsThreads, 0, p, begins, similarity);
          } else {
            const int64_t blocks = p.images * ceil_div(query.pixels, kRowsThreads) * ceil_div(p.rows, kRows);
            gpu.launch(meet_means_kernel, blocks, kRowsThreads, 0, p, begins, similarity);
          }
        });
  });
}

// The plain kernel.
void run_plain(const Gpu& gpu, Pairs& pairs, const Inputs& in, Compared compared, bool indexed,
               // outputs
               Tensor& similarity, Tensor& index, Tensor& saved) {
  const Settings& settings = in.settings;
  const bool topk = settings.reduction == Reduction::topk, softmax = settings.reduction == Reduction::softmax;
  Kernel p{};
  p.classes = pairs.classes();
  p.schedule =
      Schedule::of(in.batch(), in.slots(), in.query_pixels(), in.guide_pixels(), class_sort::kPlainCut);
  p.steepness = settings.steepness();
  p.k = in.winners();
  p.indexed = indexed;
  p.compared = compared;
  p.shared_winners = topk && p.k <= kSharedWinners;
  if (topk && !p.shared_winners) p.schedule.splits = 1;  // the winners' own memory serves one block
  p.similarity = data_of<float>(similarity);
  p.index = indexed ? data_of<int64_t>(index) : nullptr;
  p.saved = topk ? data_of<int64_t>(saved) : nullptr;
  p.log_totals = softmax ? data_of<float>(saved) : nullptr;
  switch (settings.reduction) {
    case Reduction::max:
      return run_compare<Reduction::max>(gpu, pairs, in, p);
    case Reduction::topk:
      return run_compare<Reduction::topk>(gpu, pairs, in, p);
    case Reduction::softmax:
      return run_compare<Reduction::softmax>(gpu, pairs, in, p);
    case Reduction::mean:
      if (!MeanTables::serve(in)) return run_compare<Reduction::mean>(gpu, pairs, in, p);
      // All pairs are met for the index alone; the mean then replaces the best cosine.
      if (indexed) run_compare<Reduction::max>(gpu, pairs, in, p);
  }
}

}  // namespace

void softmax_by_plain(const Gpu& gpu, const Inputs& in, bool of_shared_bins,
                      // outputs
                      Tensor& similarity, Tensor& log_totals) {
  Tensor index = device_empty(in.query, {0}, ScalarType::Long);
  Pairs pairs(gpu, in);
  run_plain(gpu, pairs, in, of_shared_bins ? Compared::images_of_shared_bin : Compared::all, false,
            similarity, index, log_totals);
}

bool by_sweep(const Gpu& gpu, const Inputs& in) {
  return SweepsOfChip::of(gpu).there() && is_swept(in.settings.reduction, in.winners(), in.guide_pixels());
}

namespace {

// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// guide: [B,C,h',w'] float32, bfloat16 or float16, any strides
// guide_labels, query_labels: [B,H,W] uint8, int32 or int64, any strides
// classes: [B,S] int32 or int64
// outputs
// similarity: [B,S,h,w] float32
// index: [B,S,h,w] int64, or [0]
// saved: winners [B,S,h,w,k] int64 of "topk"; of "softmax" [B,S,h,w] float32, log2 of the sum over j of
//     exp((cosine_j - similarity) / temperature); else [0]
std::tuple<Tensor, Tensor, Tensor> cuda_forward(const Tensor& query, const Tensor& guide,
                                                const Tensor& guide_labels, const MaybeTensor& classes,
                                                const MaybeTensor& query_labels, const std::string& reduction,
                                                int64_t k, double temperature, int64_t ignore_index,
                                                double eps, bool rounded, bool return_index) {
  const Settings settings{reduction_of(kForward, reduction), k, temperature, ignore_index, eps, rounded};
  const Inputs in{query, guide, guide_labels, classes, query_labels, settings, kForward};
  check_inputs(in, kHere);
  const Gpu gpu(kForward, "query", query);
  check_devices(in);
  if (classes) check_class_values(kForward, *classes);
  auto [similarity, index, saved, indexed] = Results::of(in, return_index);
  if (similarity.numel() == 0) return {similarity, index, saved};
  const bool mean = settings.reduction == Reduction::mean, means = mean && MeanTables::serve(in);
  // Of "mean" by tables all pairs are met for the index alone.
  const bool sweeps = by_sweep(gpu, in) && (!mean || (means && indexed));
  if (sweeps) run_sweeps(gpu, in, indexed, similarity, index, saved);
  const bool plain = !sweeps || wide_labels(in);
  if (plain || means) {
    Pairs pairs(gpu, in);
    const Compared compared = sweeps ? Compared::shared_bin : Compared::all;
    if (plain) run_plain(gpu, pairs, in, compared, indexed, similarity, index, saved);
    if (means) run_means(gpu, pairs, in, data_of<float>(similarity));
  }
  if (classes) spoil(gpu, *classes, similarity);
  return {similarity, index, saved};
}

}  // namespace
}  // namespace cisc::cross_similarity

CISC_DEFINE(cisc::cross_similarity::kSchema)

CISC_REGISTER(m) { m.impl("cross_similarity", TORCH_BOX(&cisc::cross_similarity::cuda_forward)); }
