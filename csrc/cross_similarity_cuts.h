// How sweeps of cross_similarity cut their work on each generation of chips, and what shared memory holds
// then. Needs no torch header: _build.plan asks the same functions as the launchers.
#pragma once

#include "cross_similarity.h"
#include "cross_similarity_tiles.h"
#include "fragments.h"

namespace cisc::cross_similarity {

namespace sm90 {

constexpr int kGroups = 2;  // warp groups that multiply; a third one brings tiles
constexpr int64_t kSharedBytes = 227 << 10;
constexpr int kMostStages = 12;
constexpr int64_t kMultiprocessors = 132;  // of a large GPU

constexpr int64_t kBarrierBytes = 8 * (2 * kMostStages + 2);

// How a block cuts.
// kRowTiles_: of 64 query rows, for each group; kColumns_: guide rows of a tile; kCluster_: blocks that share
// the guide's tiles; kResident_: query rows stay in shared memory; kInTurn_: one group multiplies while the
// other reduces; kHeldChunks_: query rows of exactly so many chunks stay in registers, 0: they do not;
// kMoreBytes_: of shared memory, that the reducer has
template <int kRowTiles_, int kColumns_, int kCluster_, bool kResident_, bool kInTurn_ = true,
          int kHeldChunks_ = 0, int kMoreBytes_ = 0>
struct BlockShape {
  static constexpr int kRowTiles = kRowTiles_, kColumns = kColumns_, kCluster = kCluster_;
  static constexpr int kHeldChunks = kHeldChunks_, kHeld = kHeldChunks > 0 ? kHeldChunks * kChunk16 / 16 : 1;
  static constexpr bool kResident = kResident_, kInTurn = kInTurn_;
  static constexpr int kRows = kGroups * kRowTiles * 64;  // of a block
  static constexpr int kSums = kColumns / 2;              // of a thread, for a tile of 64 rows
  static constexpr int kQueryBytes = kRows * kChunkBytes, kGuideBytes = kColumns * kChunkBytes;  // of a chunk
  static constexpr int kStageBytes = kGuideBytes + (kResident ? 0 : kQueryBytes);
  static constexpr int kMoreBytes = kMoreBytes_;

  static_assert(kHeldChunks == 0 || (kRowTiles == 1 && kResident), "registers for 64 rows of a group");
  static_assert(kColumns % (8 * kCluster) == 0 && kColumns / kCluster <= 256 && kRows <= 256, "boxes of TMA");
};

// Shared memory: the query's chunks, the stages, the barriers, what the reducer has.
template <typename S>
struct Layout {
  int32_t query_chunks, stages;

  CISC_HD static Layout of(const RowShape& shape) {
    const int32_t chunks = S::kResident ? shape.all_chunks() : 0;
    const int64_t left = kSharedBytes - kSwizzleBytes - kBarrierBytes - S::kMoreBytes -
                         static_cast<int64_t>(chunks) * S::kQueryBytes;
    const int64_t fit = left / S::kStageBytes;
    return {chunks, static_cast<int32_t>(fit < kMostStages ? fit : kMostStages)};
  }

  // Whether the groups take turns: one goes through a tile's steps before the other begins, so that the
  // stages must hold them.
  CISC_HD bool in_turn(int32_t steps) const { return S::kInTurn && steps <= stages; }

  CISC_HD int64_t query(int32_t chunk) const { return static_cast<int64_t>(chunk) * S::kQueryBytes; }
  CISC_HD int64_t stage(int32_t number) const {
    return query(query_chunks) + static_cast<int64_t>(number) * S::kStageBytes;
  }
  CISC_HD int64_t barriers() const { return stage(stages); }
  CISC_HD int64_t more() const { return barriers() + kBarrierBytes; }
  CISC_HD int64_t bytes() const { return more() + S::kMoreBytes + kSwizzleBytes; }
};

constexpr int kFewestStages = 3;

template <typename S>
bool fits(const RowShape& shape) {
  return Layout<S>::of(shape).stages >= kFewestStages;
}

using Wide = BlockShape<2, 128, 2, true>;       // 256 query rows of up to 320 numbers
using Long = BlockShape<1, 256, 2, true>;       // 128 query rows of up to 512 numbers
using Streamed = BlockShape<1, 256, 2, false>;  // any rows

template <typename S>
class_sort::Cut cut_of_shape() {
  return {S::kRows * S::kCluster, S::kColumns, 0, kMultiprocessors / S::kCluster};
}

// f(shape) for rows and a reduction; flagged: as what has set the flags
template <typename Function>
auto with_shape(const RowShape& shape, Reduction reduction, bool flagged, const Function& f) {
  if (reduction != Reduction::topk && !flagged && fits<Wide>(shape)) return f(Wide{});
  if (fits<Long>(shape)) return f(Long{});
  return f(Streamed{});
}

inline class_sort::Cut cut_of(const RowShape& shape, Reduction reduction) {
  return with_shape(shape, reduction, false, [](auto s) { return cut_of_shape<decltype(s)>(); });
}

}  // namespace sm90

namespace sm80 {

constexpr int kGroups = 2;      // each has half of a tile's columns, and its own pace
constexpr int kGroupWarps = 4;  // that share the rows
constexpr int kGroupThreads = kGroupWarps * 32, kThreads = kGroups * kGroupThreads;
constexpr int kGroupColumns = 64, kColumns = kGroups * kGroupColumns;  // of a tile
constexpr int kSums = kGroupColumns / 2;                               // of a thread, for 16 rows
constexpr int kShareBytes = kGroupColumns * kChunkBytes;               // of a chunk of a tile, for a group
constexpr int kPieces = kChunkBytes / 16;                              // that cp.async copies
constexpr int kFewestStages = 2, kMostStages = 4;
constexpr int kAlignment = kChunkBytes;
constexpr int64_t kReserved = 256;  // bytes of shared memory beside those that a launch asks for
constexpr int kMeet = 1;  // the first of the named barriers: of the block, and behind it of each group

// kRowTiles: of 16 query rows, for each warp
constexpr int rows_of(int kRowTiles) { return kGroupWarps * kRowTiles * 16; }

// Shared memory: the query's chunks where they stay, and stages. A stage is a chunk of a tile, and behind it
// one of the query where that does not stay.
struct Layout {
  int32_t query_chunks, stages;      // query_chunks: 0 where they do not stay
  int32_t query_bytes, stage_bytes;  // of a chunk, of a stage

  CISC_HD static Layout of(const RowShape& shape, int rows, bool resident, int64_t memory) {
    Layout layout{};
    layout.query_chunks = resident ? shape.all_chunks() : 0;
    layout.query_bytes = rows * kChunkBytes;
    layout.stage_bytes = kGroups * kShareBytes + (resident ? 0 : layout.query_bytes);
    const int64_t left =
        memory - kReserved - kAlignment - static_cast<int64_t>(layout.query_chunks) * layout.query_bytes;
    const int64_t fit = left > 0 ? left / layout.stage_bytes : 0;
    layout.stages = static_cast<int32_t>(fit < kMostStages ? fit : kMostStages);
    return layout;
  }

  CISC_HD bool resident() const { return query_chunks > 0; }
  CISC_HD bool fits() const { return stages >= kFewestStages; }
  CISC_HD int32_t query(int32_t chunk) const { return chunk * query_bytes; }
  CISC_HD int32_t stage(int32_t number) const { return query(query_chunks) + number * stage_bytes; }
  CISC_HD int64_t bytes() const { return stage(stages) + kAlignment; }
};

constexpr int kWide = 4, kNarrow = 2;   // row tiles of a warp: 256 or 128 query rows of a block
constexpr int64_t kWantedBlocks = 216;  // units, two for each multiprocessor of a large GPU

inline class_sort::Cut cut_of(Reduction reduction) {
  return {rows_of(reduction == Reduction::max ? kWide : kNarrow), kColumns, kWantedBlocks};
}

}  // namespace sm80
}  // namespace cisc::cross_similarity
