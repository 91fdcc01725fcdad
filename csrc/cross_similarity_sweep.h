// Two images whose pixels are compared, and the way in which panels of the one pass tiles of the other.
#pragma once

#include <memory>
#include <vector>

#include "by_class.h"
#include "cross_similarity.h"
#include "tensors.h"

namespace cisc::cross_similarity {

// Memory that nobody reads before writing.
template <typename T>
std::unique_ptr<T[]> unfilled(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(std::max<int64_t>(n, 1))]);
}

// Pixels of a piece of a cut side.
inline Positions positions_of(const ByClass& sorted, const Cut& cut, int64_t piece) {
  const int64_t group = cut.group(piece), first = (piece - cut.first(group)) * cut.unit();
  const Group& of = sorted.groups[static_cast<size_t>(group)];
  return {sorted.data(), of.begin + first, std::min(cut.unit(), of.count - first)};
}

// One image of a pair.
struct Side {
  std::unique_ptr<float[]> lengths;  // [3,pixels], what `pixels` points to
  Pixels pixels;
  ByClass sorted;

  // features: [B,C,h,w]
  Side(const Tensor& features, int64_t b, double eps, const Kernels& kernels)
      : lengths(unfilled<float>(3 * features.size(2) * features.size(3))) {
    const int64_t n = features.size(2) * features.size(3);
    pixels = {image_of(read_image(features), b),
              features.size(1),
              features.size(3),
              n,
              {lengths.get(), lengths.get() + n, lengths.get() + 2 * n}};
    Crew(ceil_div(n, kMeasured)).run([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t first = begin * kMeasured; first < std::min(end * kMeasured, n); first += kMeasured) {
        kernels.measure(pixels, eps, first, std::min(kMeasured, n - first));
      }
    });
  }

  // Image b of a batch alone.
  template <typename Pointer>
  static Image<Pointer> image_of(Image<Pointer> image, int64_t b) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    const int64_t size = image.kind == Float::f32 ? 4 : 2;
    image.data = static_cast<Byte*>(image.data) + b * image.stride_b * size;
    return image;
  }

  bool spoilt(int64_t pixel) const { return pixels.lengths.rest[pixel] != pixels.lengths.rest[pixel]; }
  float inverse_norm(int64_t pixel) const { return pixels.lengths.scale[pixel] * pixels.lengths.rest[pixel]; }
};

// One run of panels past one tile.
struct Visit {
  int64_t thread, tile;
  const Group* group;  // of the streamed side
  Positions held;      // the tile's pixels
  int64_t panel, row;  // of the run's first panel within the piece, of its first pixel within the group
  bool ends;           // the last of the group
  Run run;
};

class Sweep {
 public:
  Sweep(const Side& held, const Side& streamed, const Plan& plan, bool pairs, const Kernels& kernels)
      : held_(held),
        streamed_(streamed),
        plan_(plan),
        pairs_(pairs),
        kernels_(kernels),
        tiles_(held.sorted, plan.shape.tile),
        panels_(streamed.sorted, plan.shape.panel),
        data_(unfilled<float>(plan.panels * panel_words())),
        rest_(unfilled<float>(plan.panels * plan.shape.panel)),
        rows_(unfilled<float>(plan.panels * plan.row_words)),
        crew_(std::min(tiles_.count(), plan.held_tiles), plan.thread_bytes, 1, kThreadsBytes),
        workspaces_(crew_.each<float>(plan.thread_bytes / 4)) {}

  int64_t tiles() const { return tiles_.count(); }

  // Pixels of a tile.
  Positions tile(int64_t number) const { return positions_of(held_.sorted, tiles_, number); }

  // Behind a thread's packed tiles.
  float* workspace(int64_t thread) const {
    return workspaces_[thread] + plan_.tiles * plan_.shape.tile * (plan_.depth + 1);
  }

  // Let all panels pass the tiles [begin, end): visit(Visit) for each class that a tile meets. Before that,
  // for each piece, prepare(group, first panel, panels); by_group: for each of the tiles' groups in turn.
  template <typename Prepare, typename Act>
  void run(int64_t begin, int64_t end, bool by_group, const Prepare& prepare, const Act& visit) {
    for (int64_t first = 0; first < panels_.count(); first += plan_.panels) {
      const int64_t last = std::min(first + plan_.panels, panels_.count());
      pack(first, last);
      for (int64_t from = begin; from < end;) {
        const int64_t group = tiles_.group(from);
        const int64_t to = by_group ? std::min(tiles_.first(group + 1), end) : end;
        prepare(group, first, last);
        // Some tasks for each thread, however few the tiles.
        const int64_t step = std::clamp<int64_t>((to - from) / (8 * crew_.size()), 1, plan_.tiles);
        crew_.share(ceil_div(to - from, step), [&](int64_t thread, int64_t item) {
          const int64_t tile = from + item * step;
          pass(thread, tile, std::min(tile + step, to), first, last, visit);
        });
        from = to;
      }
    }
  }

  const Group& streamed_group(int64_t panel) const {
    return streamed_.sorted.groups[static_cast<size_t>(panels_.group(panel))];
  }

  // Pixels of a panel.
  Positions panel(int64_t number) const { return positions_of(streamed_.sorted, panels_, number); }

 private:
  int64_t panel_words() const { return plan_.depth * plan_.shape.panel; }

  void pack(int64_t first, int64_t last) {
    if (first == packed_first_ && last == packed_last_) return;
    parallel_for(first, last, 4, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        float* to = data_.get() + (number - first) * panel_words();
        kernels_.pack_panel(streamed_.pixels, panel(number), pairs_, to,
                            rest_.get() + (number - first) * plan_.shape.panel);
        if (plan_.row_words == 0) continue;
        kernels_.pair_rows(to, streamed_.pixels.channels, rows_.get() + (number - first) * plan_.row_words);
      }
    });
    packed_first_ = first;
    packed_last_ = last;
  }

  template <typename Act>
  void pass(int64_t thread, int64_t begin, int64_t end, int64_t first, int64_t last, const Act& visit) {
    const int64_t tile_words = plan_.depth * plan_.shape.tile, width = plan_.shape.panel;
    float* packed = workspaces_[thread];
    float* rest = packed + plan_.tiles * tile_words;
    bool ready = false;
    for (int64_t from = first; from < last; from += plan_.block) {
      const int64_t to = std::min(from + plan_.block, last);
      for (int64_t number = begin; number < end; ++number) {
        const int32_t slot = held_.sorted.groups[static_cast<size_t>(tiles_.group(number))].slot;
        auto [group, behind] = streamed_.sorted.partners(slot);
        if (group < behind) group = std::max(group, panels_.group(from));
        for (; group < behind && panels_.first(group) < to; ++group) {
          const int64_t a = std::max(panels_.first(group), from), e = std::min(panels_.first(group + 1), to);
          if (a >= e) continue;
          if (!ready) {
            for (int64_t i = begin; i < end; ++i) {
              kernels_.pack_tile(held_.pixels, tile(i), pairs_, packed + (i - begin) * tile_words,
                                 rest + (i - begin) * plan_.shape.tile);
            }
            ready = true;
          }
          const Group& of = streamed_.sorted.groups[static_cast<size_t>(group)];
          Visit v{};
          v.thread = thread;
          v.tile = number;
          v.group = &of;
          v.held = tile(number);
          v.panel = a - first;
          v.row = (a - panels_.first(group)) * width;
          v.ends = e == panels_.first(group + 1);
          v.run.held = packed + (number - begin) * tile_words;
          v.run.held_rest = rest + (number - begin) * plan_.shape.tile;
          v.run.streamed = data_.get() + v.panel * panel_words();
          v.run.streamed_rest = rest_.get() + v.panel * width;
          v.run.streamed_rows = rows_.get() + v.panel * plan_.row_words;
          v.run.depth = plan_.depth;
          v.run.channels = held_.pixels.channels;
          v.run.rows = std::min((e - a) * width, of.count - v.row);
          v.run.first = static_cast<int32_t>(of.begin + v.row);
          v.run.begins = v.row == 0;
          visit(v);
        }
      }
    }
  }

  const Side &held_, &streamed_;
  Plan plan_;
  bool pairs_;
  const Kernels& kernels_;
  Cut tiles_, panels_;
  std::unique_ptr<float[]> data_, rest_, rows_;
  int64_t packed_first_ = -1, packed_last_ = -1;
  Crew crew_;
  PerThread<float> workspaces_;
};

}  // namespace cisc::cross_similarity
