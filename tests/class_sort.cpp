// class_sort.h against brute force: prints what is wrong and ends with 1, or prints what was checked.
//
//   class_sort WORKSPACE_BYTES PIXEL_BYTES
//
// Sides of many sizes are sorted, and every tile of the one goes through all of its splits. Each pair of
// pixels whose labels are equal must be met once, and no pixel twice.

#include "class_sort.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

namespace {

using cisc::ceil_div;
using namespace cisc::class_sort;

int64_t checked_pairs = 0, checked_tiles = 0, checked_blocks = 0;

void require(bool holds, const char* what, int64_t a, int64_t b) {
  if (holds) return;
  std::printf("wrong: %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

struct Sorted {
  std::vector<int64_t> labels;                    // [pixels]
  std::vector<int32_t> order, starts, positions;  // positions: of each pixel, -1 = left out
};

// ignored: a label whose pixels are left out, or -1000 for none
Sorted sort(std::vector<int64_t> labels, int64_t ignored) {
  const auto pixels = static_cast<int64_t>(labels.size());
  const auto bin = [&](int64_t pixel) {
    const int64_t label = labels[static_cast<size_t>(pixel)];
    return label == ignored ? -1 : bin_of(label);
  };
  std::vector<int32_t> order, starts(kBins + 1, 0), positions(static_cast<size_t>(pixels), -1);
  for (int32_t i = 0; i < static_cast<int32_t>(pixels); ++i) {
    if (bin(i) < 0) continue;
    order.push_back(i);
    ++starts[static_cast<size_t>(bin(i)) + 1];
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return bin(a) < bin(b); });
  for (size_t i = 0; i < kBins; ++i) starts[i + 1] += starts[i];
  for (size_t i = 0; i < order.size(); ++i) {
    positions[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
  }
  return {std::move(labels), order, starts, positions};
}

// The list of a tile of one side's order in another side.
SkipList list_of(const Sorted& held, const Sorted& other, int64_t tile) {
  int32_t bins[kTile], from[kTile], to[kTile];
  int rows = 0;
  for (int64_t at = tile * kTile; rows < kTile && at < held.starts[kBins]; ++at, ++rows) {
    bins[rows] = bin_of(held.labels[static_cast<size_t>(held.order[static_cast<size_t>(at)])]);
    from[rows] = other.starts[static_cast<size_t>(bins[rows])];
    to[rows] = other.starts[static_cast<size_t>(bins[rows]) + 1];
  }
  SkipList list;
  list.clear();
  list.add_rows(bins, from, to, rows);
  require(list.count <= rows, "ranges of a tile", list.count, rows);
  return list;
}

// How often each of the other side's positions is met, by all splits; no other ones.
void visit(const SkipList& list, const Schedule& schedule, std::vector<int32_t>& met) {
  int64_t behind = 0;
  for (int64_t split = 0; split < schedule.splits; ++split) {
    const int64_t first = schedule.first_tile(list, split), end = schedule.first_tile(list, split + 1);
    require(first == behind && first <= end, "first tile of a split", split, first);
    behind = end;
    for (int64_t at = first * kTile; at < std::min(end * kTile, list.length()); ++at) {
      const int64_t position = list.position(at);
      require(position >= 0 && position < static_cast<int64_t>(met.size()), "position", at, position);
      ++met[static_cast<size_t>(position)];
    }
  }
  require(behind == ceil_div(list.length(), kTile), "tiles of all splits", behind, list.length());
}

// Own-label mode: tiles of the query against the guide.
void check_own(const Sorted& query, const Sorted& guide, int64_t ignored) {
  const Schedule schedule = Schedule::of(1, 1, static_cast<int64_t>(query.labels.size()),
                                         static_cast<int64_t>(guide.labels.size()), kPlainCut);
  std::map<int64_t, int64_t> members;  // of a label in the guide
  for (const int64_t label : guide.labels) ++members[label];
  std::vector<int32_t> met(static_cast<size_t>(guide.starts[kBins]));
  std::vector<int32_t> rows_met(query.labels.size(), 0);
  for (int64_t tile = 0; tile < schedule.tiles; ++tile, ++checked_tiles) {
    std::fill(met.begin(), met.end(), 0);
    visit(list_of(query, guide, tile), schedule, met);
    std::map<int64_t, int64_t> found;
    std::vector<char> of_tile(kBins, 0);
    for (int64_t at = tile * kTile; at < std::min<int64_t>((tile + 1) * kTile, query.starts[kBins]); ++at) {
      const auto pixel = static_cast<size_t>(query.order[static_cast<size_t>(at)]);
      ++rows_met[pixel];
      of_tile[static_cast<size_t>(bin_of(query.labels[pixel]))] = 1;
    }
    for (size_t at = 0; at < met.size(); ++at) {
      const int64_t label = guide.labels[static_cast<size_t>(guide.order[at])];
      require(met[at] <= 1, "a position met twice", tile, static_cast<int64_t>(at));
      require(met[at] == of_tile[static_cast<size_t>(bin_of(label))], "a position of no bin of the tile",
              tile, static_cast<int64_t>(at));
      if (met[at] == 1) ++found[label];
    }
    for (int64_t at = tile * kTile; at < std::min<int64_t>((tile + 1) * kTile, query.starts[kBins]); ++at) {
      const int64_t label = query.labels[static_cast<size_t>(query.order[static_cast<size_t>(at)])];
      const auto wanted = members.find(label);
      const int64_t pairs = wanted == members.end() ? 0 : wanted->second;
      require(found[label] == pairs, "pairs of a pixel", at, found[label]);
      checked_pairs += pairs;
    }
  }
  for (size_t i = 0; i < rows_met.size(); ++i) {
    require(rows_met[i] == (query.labels[i] == ignored ? 0 : 1), "a query pixel", static_cast<int64_t>(i),
            rows_met[i]);
  }
}

// Classes: one range.
void check_class(const Sorted& guide, int64_t wanted, int64_t query_pixels) {
  SkipList list;
  list.clear();
  const auto bin = static_cast<size_t>(bin_of(wanted));
  list.add(guide.starts[bin], guide.starts[bin + 1]);
  const Schedule schedule =
      Schedule::of(2, 3, query_pixels, static_cast<int64_t>(guide.labels.size()), kPlainCut);
  std::vector<int32_t> met(static_cast<size_t>(guide.starts[kBins]), 0);
  visit(list, schedule, met);
  for (size_t at = 0; at < met.size(); ++at) {
    const int64_t label = guide.labels[static_cast<size_t>(guide.order[at])];
    require(met[at] == (bin_of(label) == bin_of(wanted) ? 1 : 0), "a class's position", wanted,
            static_cast<int64_t>(at));
  }
}

// Every tile of every image and slot is somebody's once, and what the blocks leave fits.
void check_schedule(int64_t images, int64_t slots, int64_t query, int64_t guide, int64_t bytes,
                    int64_t pixel_bytes) {
  const Schedule s = Schedule::of(images, slots, query, guide, kPlainCut);
  require(s.tiles * kTile >= query && (s.tiles - 1) * kTile < std::max<int64_t>(query, 1), "tiles", s.tiles,
          query);
  require(s.splits >= 1 && s.splits <= std::max<int64_t>(ceil_div(guide, kTile), 1), "splits", s.splits,
          guide);
  if (s.units() == 0) return;
  const int64_t step = s.units_at_once(bytes, pixel_bytes);
  require(step >= 1 && step <= s.units(), "units at once", step, s.units());
  require(step == 1 || step * s.splits * kTile * pixel_bytes <= bytes, "workspace", step, s.splits);
  require(s.splits * kTile * pixel_bytes <= bytes, "workspace of one tile", s.splits, pixel_bytes);
  require(s.units() * s.splits >= std::min(kBlocks, s.units() * (ceil_div(guide, kTile) / kLeastTiles)),
          "blocks", s.units(), s.splits);
  int64_t next = 0;
  for (int64_t first = 0; first < s.units(); first += step) {
    for (int64_t unit = first; unit < std::min(first + step, s.units()); ++unit, ++checked_blocks) {
      const Job job = s.job(unit, 0);
      require(job.image >= 0 && job.image < images && job.slot >= 0 && job.slot < slots && job.tile >= 0 &&
                  job.tile < s.tiles,
              "a block out of range", unit, job.tile);
      require((job.image * slots + job.slot) * s.tiles + job.tile == next, "a tile", unit, next);
      ++next;
    }
  }
  require(next == s.units(), "all tiles", next, s.units());
}

// Where the last round of blocks is to be full: no more splits than there are columns for, and rounds no
// longer than without any.
void check_rounds(int64_t units, int64_t streamed, int64_t at_once) {
  const Cut cut{1, 16, 0, at_once};
  const Schedule s = Schedule::of(1, 1, units, streamed, cut);
  const int64_t columns = ceil_div(streamed, cut.columns);
  const auto time = [&](int64_t splits) {
    return ceil_div(units * splits, at_once) * (ceil_div(columns, splits) + kBlockColumns);
  };
  require(s.splits >= 1 && s.splits <= std::max<int64_t>(columns / kLeastTiles, 1) && s.splits <= kMostSplits,
          "splits for rounds", units, s.splits);
  require(time(s.splits) <= time(1), "time of rounds", units, s.splits);
  for (int64_t splits = 1; splits <= std::min(columns / kLeastTiles, kMostSplits); ++splits) {
    require(time(splits) * kWorth >= time(s.splits) * (kWorth - 1), "faster rounds", units, splits);
  }
}

// Labels in regions, as images have, or at random.
std::vector<int64_t> draw(std::mt19937_64& random, int64_t pixels, const std::vector<int64_t>& values) {
  std::vector<int64_t> labels;
  const bool regions = random() % 2 == 0;
  while (static_cast<int64_t>(labels.size()) < pixels) {
    const int64_t value = values[random() % values.size()];
    for (uint64_t run = regions ? random() % 3000 + 1 : 1; run > 0; --run) {
      if (static_cast<int64_t>(labels.size()) < pixels) labels.push_back(value);
    }
  }
  return labels;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  const int64_t bytes = std::atoll(words[1]), pixel_bytes = std::atoll(words[2]);
  std::mt19937_64 random(3);
  const std::vector<std::vector<int64_t>> kinds{{0},
                                                {0, 1, 2, 3, 255},
                                                {7, 7 + 256, 7 + (1LL << 32), -249, 8},  // in two bins
                                                {INT64_MIN, INT64_MAX, -1, -2, 255, 256, 1LL << 40}};
  std::vector<int64_t> many;
  for (int64_t i = 0; i < 1000; ++i) many.push_back(i - 300);
  const std::vector<int64_t> small{0, 1, 2, 63, 64, 65, 127, 129, 700, 1023, 1024, 1025, 3000};
  for (const int64_t n : small) {
    for (const int64_t m : small) {
      for (size_t kind = 0; kind <= kinds.size(); ++kind) {
        const std::vector<int64_t>& values = kind < kinds.size() ? kinds[kind] : many;
        const int64_t ignored = random() % 2 == 0 ? -1000 : values[random() % values.size()];
        const Sorted query = sort(draw(random, n, values), ignored),
                     guide = sort(draw(random, m, values), -1000);
        check_own(query, guide, ignored);
        check_class(guide, values[random() % values.size()], n);
        check_class(guide, 5, n);
      }
    }
  }
  for (const auto& [n, m] : std::vector<std::pair<int64_t, int64_t>>{
           {131072, 131072}, {131072, 65}, {64, 131072}, {130321, 32761}, {1, 131071}}) {
    for (size_t kind = 0; kind < 3; ++kind) {
      const Sorted query = sort(draw(random, n, kinds[kind]), 255),
                   guide = sort(draw(random, m, kinds[kind]), -1000);
      check_own(query, guide, 255);
      check_class(guide, 7, n);
    }
  }
  for (const int64_t images : {1, 2, 16, 32}) {
    for (const int64_t slots : {1, 2, 3, 21, 150}) {
      for (const int64_t n : {0, 1, 64, 65, 1024, 16384, 32761, 131072}) {
        for (const int64_t m : {0, 1, 255, 256, 16384, 131072, 1 << 26}) {
          check_schedule(images, slots, n, m, bytes, pixel_bytes);
        }
      }
    }
  }
  for (const int64_t units : {1, 2, 8, 32, 52, 66, 67, 128, 208, 256, 1000}) {
    for (const int64_t m : {1, 64, 65, 4096, 6561, 16384, 131072}) {
      for (const int64_t at_once : {1, 66, 132}) check_rounds(units, m, at_once);
    }
  }
  std::printf("%lld pairs, %lld tiles, %lld units\n", static_cast<long long>(checked_pairs),
              static_cast<long long>(checked_tiles), static_cast<long long>(checked_blocks));
  return 0;
}
