// cross_similarity_tiles.h against brute force: prints what is wrong and ends with 1, or prints what was
// checked.
//
// Sides of random sizes and labels go through all groups, splits and tiles: each pair of positions that is to
// be compared must be met once, and no other. The steps of a product must have each pair of chunks once.

#include "cross_similarity_tiles.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using namespace cisc::cross_similarity;
using cisc::class_sort::kBins;

int64_t checked_pairs = 0, checked_walks = 0, checked_steps = 0;

void require(bool holds, const char* what, int64_t a, int64_t b) {
  if (holds) return;
  std::printf("wrong: %s (%lld, %lld)\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

size_t at(int64_t place) { return static_cast<size_t>(place); }

std::mt19937 random_numbers(5);

int32_t below(int32_t limit) { return std::uniform_int_distribution<int32_t>(0, limit - 1)(random_numbers); }

struct Side {
  std::vector<int32_t> starts;  // [kBins + 1]
  std::vector<int32_t> bins;    // of each position
};

// pixels, of which some may be left out; with labels of a few bins, the last one among them
Side side_of(int32_t pixels, int32_t classes, bool leaves_out) {
  std::vector<int32_t> counts(kBins, 0);
  for (int32_t i = 0; i < pixels; ++i) {
    const int32_t label = below(classes);
    if (leaves_out && below(5) == 0) continue;
    ++counts[at(label == classes - 1 ? kBins - 1 : label * 7 % kBins)];
  }
  Side side{{0}, {}};
  for (int32_t bin = 0; bin < kBins; ++bin) {
    side.starts.push_back(side.starts.back() + counts[at(bin)]);
    for (int32_t i = 0; i < counts[at(bin)]; ++i) side.bins.push_back(bin);
  }
  return side;
}

// The pairs that the segments of a walk have, added to `met`, [query,guide].
void add_pairs(Walk walk, int32_t columns, int64_t guide_pixels,
               // outputs
               std::vector<int32_t>& met) {
  Segment s;
  int64_t tiles = 0;
  int32_t before = -1;
  // As a kernel does that keeps no walk, but where it stands.
  const Walk begun = walk;
  while (walk.next(&s)) {
    const Walk::Mark mark = walk.mark();
    walk = begun;
    walk.go_on(mark);
    require(s.begin > before || before < 0, "ranges that do not ascend", s.begin, before);
    before = s.begin;
    require(s.first_tile < s.end_tile && s.first_query < s.behind_query, "an empty segment", s.begin, s.end);
    for (int32_t tile = s.first_tile; tile < s.end_tile; ++tile, ++tiles) {
      const int32_t first = s.begin + tile * columns, left = s.end - first;
      require(left > 0, "a tile behind its range", first, s.end);
      for (int32_t column = 0; column < columns && column < left; ++column) {
        for (int32_t query = s.first_query; query < s.behind_query; ++query) {
          ++met[at(query * guide_pixels + first + column)];
        }
      }
    }
  }
  ++checked_walks;
}

void check_walks(int32_t query_pixels, int32_t guide_pixels, int32_t classes, int32_t rows, int32_t columns,
                 int32_t splits, int32_t bins) {
  const Side query = side_of(query_pixels, classes, true), guide = side_of(guide_pixels, classes, false);
  const auto count = static_cast<int32_t>(query.bins.size());
  // Own label.
  std::vector<int32_t> met(at(int64_t{query_pixels} * guide_pixels), 0);
  for (int32_t first = 0; first < query_pixels; first += rows) {
    for (int32_t split = 0; split < splits; ++split) {
      Walk walk = Walk::of_own(first, first + rows < query_pixels ? first + rows : query_pixels,
                               query.starts.data(), guide.starts.data(), bins, columns);
      walk.take(split, splits);
      add_pairs(walk, columns, guide_pixels, met);
    }
  }
  for (int32_t q = 0; q < query_pixels; ++q) {
    for (int32_t g = 0; g < guide_pixels; ++g, ++checked_pairs) {
      const bool wanted = q < count && query.bins[at(q)] < bins && query.bins[at(q)] == guide.bins[at(g)];
      require(met[at(int64_t{q} * guide_pixels + g)] == (wanted ? 1 : 0), "a pair of own labels", q, g);
    }
  }
  // One class.
  for (const int32_t bin : {0, 7, kBins - 1, 1}) {
    std::fill(met.begin(), met.end(), 0);
    for (int32_t first = 0; first < query_pixels; first += rows) {
      for (int32_t split = 0; split < splits; ++split) {
        Walk walk = Walk::of_class(first, first + rows < query_pixels ? first + rows : query_pixels,
                                   guide.starts.data(), bin, columns);
        walk.take(split, splits);
        add_pairs(walk, columns, guide_pixels, met);
      }
    }
    for (int32_t q = 0; q < query_pixels; ++q) {
      for (int32_t g = 0; g < guide_pixels; ++g, ++checked_pairs) {
        require(met[at(int64_t{q} * guide_pixels + g)] == (guide.bins[at(g)] == bin ? 1 : 0),
                "a pair of a class", q, g);
      }
    }
  }
}

void check_steps(int64_t channels, Form form) {
  const RowShape shape = RowShape::of(channels, form);
  require(
      shape.chunks * int64_t{kChunk16} >= channels && shape.width() == shape.all_chunks() * int64_t{kChunk16},
      "chunks for the channels", channels, shape.width());
  const int32_t all = shape.all_chunks();
  std::vector<int32_t> met(at(int64_t{all} * all), 0);
  int32_t last_order = 4;
  for (int32_t step = 0; step < shape.steps(); ++step, ++checked_steps) {
    const int32_t query = shape.query_chunk(step), guide = shape.guide_chunk(step);
    require(query >= 0 && query < all && guide >= 0 && guide < all, "a chunk that is not there", query,
            guide);
    require(query % shape.chunks == guide % shape.chunks, "chunks of other channels", query, guide);
    ++met[at(int64_t{query} * all + guide)];
    // Each rest makes a product smaller.
    const int32_t order = (query >= shape.chunks ? 1 : 0) + (guide >= shape.chunks ? 1 : 0);
    require(order <= last_order, "a small product behind a larger one", step, order);
    last_order = order;
  }
  for (int32_t query = 0; query < all; ++query) {
    for (int32_t guide = 0; guide < all; ++guide) {
      const bool rests = query >= shape.chunks && guide >= shape.chunks;
      const bool wanted = query % shape.chunks == guide % shape.chunks && (!rests || shape.chunks == 1);
      require(met[at(int64_t{query} * all + guide)] == (wanted ? 1 : 0), "a product of chunks", query, guide);
    }
  }
}

void check_ring(int32_t stages) {
  Ring ring;
  for (int32_t use = 0; use < 5 * stages + 3; ++use) {
    require(ring.stage == use % stages, "a stage", use, ring.stage);
    require(ring.parity == static_cast<uint32_t>(use / stages % 2), "a parity", use, ring.parity);
    ring.next(stages);
  }
}

}  // namespace

int main() {
  for (int round = 0; round < 400; ++round) {
    const int32_t rows = 1 << (2 + below(5)), columns = 8 << below(4);
    check_walks(1 + below(150), 1 + below(150), 1 + below(9), rows, columns, 1 + below(5), kBins - below(2));
  }
  for (const Form form : {Form::exact, Form::rounded, Form::split}) {
    for (const int64_t channels : {0, 1, 5, 63, 64, 65, 128, 256, 300, 2048}) check_steps(channels, form);
  }
  for (int32_t stages = 1; stages <= 12; ++stages) check_ring(stages);
  std::printf("%lld pairs, %lld walks, %lld steps\n", static_cast<long long>(checked_pairs),
              static_cast<long long>(checked_walks), static_cast<long long>(checked_steps));
  return 0;
}
