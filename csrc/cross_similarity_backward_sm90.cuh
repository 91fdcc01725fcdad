// The backward sweep of "softmax" on sm_90a: tiles of cosines once more, which become slopes in registers,
// and those the first factor of a product with the rows that they were made with. See
// docs/pixel_similarity.md.
#pragma once

#include <type_traits>

#include "cross_similarity_backward_layout.cuh"

namespace cisc::cross_similarity::sm90 {
namespace {

// The power of two that is above a magnitude, or 0.
__device__ __forceinline__ int32_t exponent_above(float magnitude) {
  int exponent = 0;
  if (magnitude > 0.0f) ::frexpf(magnitude, &exponent);
  return exponent;
}

__device__ __forceinline__ float finite_magnitude(float value) {
  const float magnitude = ::fabsf(value);
  return magnitude < kInfinity ? magnitude : 0.0f;
}

// A block has a tile of the guide, and finds the largest incoming gradient that it meets.
__global__ void __launch_bounds__(kWarpGroup)
    exponents_kernel(const __grid_constant__ BackwardParameters parameters) {
  CISC_SHARED(of_thread, float[kWarpGroup]);
  const Kernel& p = parameters.sweep.kernel;
  const auto item = BackwardItem::of(parameters);
  const int64_t b = p.held.first + item.image;
  float most = 0.0f;
  Parts parts(p, item, false);
  Part part;
  while (parts.next(&part)) {
#pragma unroll 4
    for (int32_t at = part.begin + static_cast<int32_t>(threadIdx.x); at < part.end; at += kWarpGroup) {
      most = ::fmaxf(most, finite_magnitude(p.grad.at(b, part.slot, p.streamed.pixel_at(b, at))));
    }
  }
  of_thread[threadIdx.x] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarpGroup; ++i) most = ::fmaxf(most, of_thread[i]);
  parameters.sweep.exponents[blockIdx.x] = exponent_above(most);
}

#ifdef CISC_HOPPER

// The place in a ring that is so many stages further on, fewer than there are.
__device__ __forceinline__ Ring ahead(Ring ring, int32_t by, int32_t stages) {
  ring.stage += by;
  if (ring.stage >= stages) {
    ring.stage -= stages;
    ring.parity ^= 1;
  }
  return ring;
}

// Two numbers of 16 bits, the first one below.
template <Matrix type>
__device__ __forceinline__ uint32_t narrow_both(float low, float high) {
#ifdef CISC_SIMT
  if (type == Matrix::bf16) return BFloat16::narrow(low).bits | uint32_t{BFloat16::narrow(high).bits} << 16;
  return Float16::narrow(low).bits | uint32_t{Float16::narrow(high).bits} << 16;
#else
  uint32_t both;
  if constexpr (type == Matrix::bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#endif
}

template <Matrix type>
__device__ __forceinline__ float widen_bits(uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  return type == Matrix::bf16 ? BFloat16{half}.widen() : Float16{half}.widen();
}

// One thread brings the chunks of all tiles.
template <int kSlice>
__device__ __forceinline__ void bring_chunks(const BackwardParameters& p, const BackwardItem& item,
                                             const BackwardLayout<kSlice>& layout, unsigned char* tiles,
                                             BackwardBarriers* barriers) {
  const auto held_row = static_cast<int32_t>(item.image * p.sweep.kernel.held.pixels) + item.first;
  const auto streamed_row = static_cast<int32_t>(item.image * p.sweep.kernel.streamed.pixels);
  const int32_t steps = p.sweep.shape.steps();
  const int32_t count = layout.kept ? layout.shape.all_chunks() : steps + layout.slice_chunks();
  Ring ring;
  Parts parts(p.sweep.kernel, item, p.sweep.to_query);
  Part part;
  bool brought = !layout.kept;
  while (parts.next(&part)) {
    if (!brought) {
      brought = true;
      barrier_expect(&barriers->held_full, static_cast<uint32_t>(layout.held_chunks() * kHeldBytes));
#pragma unroll 1
      for (int32_t chunk = 0; chunk < layout.held_chunks(); ++chunk) {
        copy_tile(&p.held, chunk * kChunk16, held_row, &barriers->held_full, tiles + chunk * kHeldBytes);
      }
    }
    for (int32_t first = part.begin; first < part.end; first += kStreamedRows) {
#pragma unroll 1
      for (int32_t i = 0; i < count; ++i) {
        Barrier* full = &barriers->full[ring.stage];
        unsigned char* stage = tiles + layout.stage(ring.stage);
        const bool makes_step = !layout.kept && i < steps;
        const int32_t chunk = layout.kept  ? i
                              : makes_step ? p.streamed_chunk(i)
                                           : layout.slice_chunk(item.slice, i - steps);
        barrier_wait(&barriers->empty[ring.stage], ring.parity ^ 1);
        barrier_expect(full, makes_step ? kStreamedBytes + kHeldBytes : kStreamedBytes);
        copy_tile(&p.streamed, chunk * kChunk16, streamed_row + first, full, stage);
        if (makes_step) {
          copy_tile(&p.held, p.held_chunk(i) * kChunk16, held_row, full, stage + kStreamedBytes);
        }
        ring.next(layout.stages);
      }
    }
  }
}

// A thread gathers what is to be known of a row of all tiles.
template <bool to_query>
__device__ __forceinline__ void gather_columns(const BackwardParameters& parameters, const BackwardItem& item,
                                               int thread, Column* columns, BackwardBarriers* barriers) {
  const Kernel& p = parameters.sweep.kernel;
  const int64_t b = p.held.first + item.image;
  const float* scales = parameters.sweep.streamed_scale + item.image * p.streamed.pixels;
  const int32_t exponent = kSlopeBits - barriers->exponent;
  Ring ring;
  Parts parts(p, item, to_query);
  Part part;
  while (parts.next(&part)) {
    for (int32_t position = part.begin + thread; position - thread < part.end; position += kStreamedRows) {
      Column column{};
      if (position < part.end) {
        column.scale = scales[position];
        if constexpr (!to_query) {
          const int64_t pixel = p.streamed.pixel_at(b, position), place = p.place(b, part.slot, pixel);
          column.weight = times_power(p.grad.at(b, part.slot, pixel), exponent) * column.scale;
          column.value = p.similarity[place];
          column.log_total = p.log_totals[place];
        }
      }
      barrier_wait(&barriers->columns_empty[ring.stage], ring.parity ^ 1);
      columns[ring.stage * kStreamedRows + thread] = column;
      barrier_arrive(&barriers->columns_full[ring.stage]);
      ring.next(kColumnStages);
    }
  }
}

// What is known of a held row; of the values those of one slot.
struct Row {
  float scale;
  float weight;  // of the query's gradient: incoming gradient and the constants
  float value, log_total;
  bool meets;
};

// The slopes of a thread's products with a tile, times the streamed rows' scales, which are to be multiplied
// by those rows. whole: all are compared; else columns behind the last one and rows that do not meet are not.
template <bool to_query, Matrix type, bool split>
struct Slopes {
  uint32_t high[4][4];              // of 16 columns each, as the product takes them
  uint32_t rest[split ? 4 : 1][4];  // times 2^kRestBits

  __device__ __forceinline__ void set(const Kernel& p, const float (&sums)[kStreamedRows / 2],
                                      const Row (&rows)[2], const Column* columns, int first_column,
                                      int count,
                                      // outputs
                                      float (&alongs)[2]) {
    const bool whole = count >= kStreamedRows && rows[0].meets && rows[1].meets;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const Row& row = rows[pair % 2];
        float slopes[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = sums[k * 8 + pair * 2 + i];
          const int at = k * 16 + pair / 2 * 8 + first_column + i;
          const Column column = columns[at];
          // The guide's scale first, as in forward.
          const float cosine = to_query ? sum * column.scale * row.scale : sum * row.scale * column.scale;
          const float above = cosine - (to_query ? row.value : column.value);
          const float log_total = to_query ? row.log_total : column.log_total;
          const float probability = fast_exp2(min(0.0f, fmaf(above, p.steepness, -log_total)));
          const float weight = to_query ? row.weight * column.scale : column.weight;
          float slope = weight * probability * fmaf(above, p.inverse_temperature, 1.0f);
          if (!whole && (at >= count || !row.meets)) slope = 0.0f;
          slopes[i] = slope;
        }
        const uint32_t both = narrow_both<type>(slopes[0], slopes[1]);
        high[k][pair] = both;
        const float rounded[2] = {widen_bits<type>(both & 0xffffu), widen_bits<type>(both >> 16)};
        if constexpr (split) {
          constexpr float kTimes = 1 << kRestBits;
          rest[k][pair] =
              narrow_both<type>((slopes[0] - rounded[0]) * kTimes, (slopes[1] - rounded[1]) * kTimes);
        }
        // What lies along the vector is taken from the slopes that are multiplied.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float slope = split ? slopes[i] : rounded[i];
          alongs[pair % 2] = fmaf(slope, sums[k * 8 + pair * 2 + i], alongs[pair % 2]);
        }
      }
    }
  }
};

// sums += slopes times chunks of the streamed rows; on their way until products_wait
// tiles: address of the first slice's chunk; begins: nothing is there yet
template <Matrix type, int kSlice>
__device__ __forceinline__ void multiply_slopes(const uint32_t (&slopes)[4][4],
                                                const uint32_t (&chunks)[kSlice], bool begins,
                                                // outputs
                                                float (&sums)[kSlice][kStreamedRows / 2]) {
#pragma unroll
  for (int c = 0; c < kSlice; ++c) {
    const uint64_t rows = fragments::transposed_descriptor(chunks[c], kStreamedBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      multiply_64<type, true>(sums[c], slopes[k], rows + k * kSixteenRows, !begins || k > 0);
    }
  }
}

// A sum whose rounding is below that of 16-bit slopes.
struct ShortSum {
  float value = 0.0f;

  __device__ __forceinline__ void add(float term) { value += term; }
  __device__ __forceinline__ double exact() const { return static_cast<double>(value); }
};

// A group makes the sums of its 64 held rows.
template <bool to_query, Matrix type, bool split, int kSlice>
class HeldGroup {
  using Along = std::conditional_t<split, Sum, ShortSum>;

 public:
  __device__ __forceinline__ HeldGroup(const BackwardParameters& parameters, const BackwardItem& item,
                                       const BackwardLayout<kSlice>& layout, unsigned char* tiles,
                                       BackwardBarriers* barriers, int group)
      : parameters_(parameters),
        item_(item),
        layout_(layout),
        tiles_(tiles),
        barriers_(barriers),
        group_(group),
        lane_(static_cast<int>(threadIdx.x) % kWarp) {}

  __device__ __forceinline__ void run() {
    const Kernel& p = parameters_.sweep.kernel;
    const auto* columns = reinterpret_cast<const Column*>(tiles_ + layout_.columns());
    float sums[kSlice][kStreamedRows / 2] = {};
    Row rows[2];
    Along alongs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = prepare(half);
    __syncwarp();
    Ring ring, ring_of_columns;
    const bool in_turn = layout_.kept;
    if (in_turn && group_ == 1) meet_without_waiting(kTurn, kGroups * kWarpGroup);
    Parts parts(p, item_, to_query);
    Part part;
    bool brought = !layout_.kept;
    while (parts.next(&part)) {
      if (!brought) {
        brought = true;
        barrier_wait(&barriers_->held_full, 0);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) begin(half, part, rows[half]);
      for (int32_t first = part.begin; first < part.end; first += kStreamedRows) {
        float products[kStreamedRows / 2];
        if (in_turn) meet(kTurn + group_, kGroups * kWarpGroup);
        multiply_rows(ring, products);
        if (in_turn) meet_without_waiting(kTurn + 1 - group_, kGroups * kWarpGroup);
        products_wait<0>();
        hold(products);
        if (!layout_.kept) release(before(ring), 1);
        barrier_wait(&barriers_->columns_full[ring_of_columns.stage], ring_of_columns.parity);
        Slopes<to_query, type, split> slopes;
        float along[2] = {};
        slopes.set(p, products, rows, columns + ring_of_columns.stage * kStreamedRows,
                   fragments::column(lane_, 0), part.end - first, along);
        __syncwarp();
        if (lane_ == 0) barrier_arrive(&barriers_->columns_empty[ring_of_columns.stage]);
        ring_of_columns.next(kColumnStages);
#pragma unroll
        for (int half = 0; half < 2; ++half) alongs[half].add(along[half]);
        add_vectors(ring, slopes, sums);
        const int32_t count = layout_.kept ? layout_.shape.all_chunks() : layout_.slice_chunks();
        release(ring, count);
        ring = ahead(ring, count, layout_.stages);
      }
    }
    // The other group's last turn has no taker.
    if (in_turn && group_ == 0) meet(kTurn, kGroups * kWarpGroup);
    finish(rows, alongs, sums);
  }

 private:
  // The first of the warp's.
  __device__ __forceinline__ int warp_row() const {
    return group_ * 64 + fragments::first_row(static_cast<int>(threadIdx.x) / kWarp);
  }

  __device__ __forceinline__ int row_of(int half) const {
    return warp_row() + fragments::row(lane_, 2 * half);
  }

  __device__ __forceinline__ int32_t position(int half) const { return item_.first + row_of(half); }

  __device__ __forceinline__ int64_t image() const {
    return parameters_.sweep.kernel.held.first + item_.image;
  }

  __device__ __forceinline__ bool inside(int half) const {
    return position(half) < parameters_.sweep.kernel.held.count(image());
  }

  __device__ __forceinline__ Row prepare(int half) const {
    const Kernel& p = parameters_.sweep.kernel;
    Row row{};
    int32_t exponent = barriers_->exponent;
    if (inside(half)) {
      row.scale = parameters_.sweep.held_scale[item_.image * p.held.pixels + position(half)];
      if constexpr (to_query && type == Matrix::f16) {
        const int64_t pixel = p.held.pixel_at(image(), position(half));
        float most = 0.0f;
        for (int64_t slot = 0; slot < p.slots; ++slot) {
          const bool compared = p.log_totals[p.place(image(), slot, pixel)] != -kInfinity;
          if (compared) most = ::fmaxf(most, finite_magnitude(p.grad.at(image(), slot, pixel)));
        }
        exponent = exponent_above(most);
      }
    }
    if (lane_ % 4 == 0) barriers_->exponents[row_of(half)] = exponent;
    return row;
  }

  __device__ __forceinline__ void begin(int half, const Part& part,
                                        // outputs
                                        Row& row) const {
    const Kernel& p = parameters_.sweep.kernel;
    row.meets = position(half) >= part.first && position(half) < part.behind;
    if constexpr (to_query) {
      if (!row.meets) return;
      const int64_t pixel = p.held.pixel_at(image(), position(half));
      const int64_t place = p.place(image(), part.slot, pixel);
      const int32_t exponent = kSlopeBits - barriers_->exponents[row_of(half)];
      row.weight = times_power(p.grad.at(image(), part.slot, pixel), exponent);
      row.value = p.similarity[place];
      row.log_total = p.log_totals[place];
    }
  }

  // The stage in front of a place.
  __device__ __forceinline__ Ring before(Ring ring) const {
    ring.stage = (ring.stage > 0 ? ring.stage : layout_.stages) - 1;
    return ring;
  }

  // Stages from a place on are let go.
  __device__ __forceinline__ void release(const Ring& first, int32_t count) const {
    if (lane_ < count) barrier_arrive(&barriers_->empty[ahead(first, lane_, layout_.stages).stage]);
  }

  // The products of the held rows with a tile, on their way. Where chunks are not kept, the ring goes on, and
  // all stages but the last are let go.
  __device__ __forceinline__ void multiply_rows(Ring& ring,
                                                // outputs
                                                float (&products)[kStreamedRows / 2]) {
    const int32_t steps = layout_.shape.steps();
    const uint32_t tiles = shared_address(tiles_);
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      const Ring at = layout_.kept ? ahead(ring, parameters_.streamed_chunk(step), layout_.stages) : ring;
      barrier_wait(&barriers_->full[at.stage], at.parity);
      const uint32_t stage = tiles + static_cast<uint32_t>(layout_.stage(at.stage));
      const uint32_t held =
          (layout_.kept ? tiles + static_cast<uint32_t>(parameters_.held_chunk(step) * kHeldBytes)
                        : stage + kStreamedBytes) +
          static_cast<uint32_t>(group_) * 64 * kChunkBytes;
      const uint64_t a = fragments::descriptor(held), b = fragments::descriptor(stage);
      products_begin();
#pragma unroll
      for (int k = 0; k < kChunk16 / 16; ++k) {
        multiply_64<type, false>(products, a + k * kSixteenColumns, b + k * kSixteenColumns,
                                 step > 0 || k > 0);
      }
      products_commit();
      if (layout_.kept) continue;
      if (step > 0) {
        products_wait<1>();
        release(before(ring), 1);
      }
      ring.next(layout_.stages);
    }
  }

  // Addresses of the slice's chunks, rounded or rests, once they are there.
  __device__ __forceinline__ void find_chunks(const Ring& ring, bool rests,
                                              // outputs
                                              uint32_t (&chunks)[kSlice]) const {
#pragma unroll
    for (int c = 0; c < kSlice; ++c) {
      const int32_t number = rests ? kSlice + c : c;
      const Ring at =
          ahead(ring, layout_.kept ? layout_.slice_chunk(item_.slice, number) : number, layout_.stages);
      if (!layout_.kept) barrier_wait(&barriers_->full[at.stage], at.parity);
      chunks[c] = shared_address(tiles_) + static_cast<uint32_t>(layout_.stage(at.stage));
    }
  }

  __device__ __forceinline__ void add_vectors(const Ring& ring, Slopes<to_query, type, split>& slopes,
                                              // outputs
                                              float (&sums)[kSlice][kStreamedRows / 2]) const {
    uint32_t chunks[kSlice];
    find_chunks(ring, false, chunks);
    if constexpr (!split) {
      products_begin();
      multiply_slopes<type>(slopes.high, chunks, false, sums);
      products_commit();
      products_wait<0>();
      hold_all(sums);
    } else {
      // What tensor cores add they truncate: a tile's sums are added to those of the others here.
      float of_tile[kSlice][kStreamedRows / 2];
      products_begin();
      multiply_slopes<type>(slopes.rest, chunks, true, of_tile);
      products_commit();
      uint32_t rests[kSlice];
      find_chunks(ring, true, rests);
      products_wait<0>();
      hold_all(of_tile);
      add(of_tile, 1.0f / (1 << kRestBits), sums);
      products_begin();
      multiply_slopes<type>(slopes.high, rests, true, of_tile);
      multiply_slopes<type>(slopes.high, chunks, false, of_tile);
      products_commit();
      products_wait<0>();
      hold_all(of_tile);
      add(of_tile, 1.0f, sums);
    }
  }

  __device__ __forceinline__ static void hold_all(float (&sums)[kSlice][kStreamedRows / 2]) {
#pragma unroll
    for (int c = 0; c < kSlice; ++c) hold(sums[c]);
  }

  __device__ __forceinline__ static void add(const float (&terms)[kSlice][kStreamedRows / 2], float times,
                                             // outputs
                                             float (&sums)[kSlice][kStreamedRows / 2]) {
#pragma unroll
    for (int c = 0; c < kSlice; ++c) {
#pragma unroll
      for (int i = 0; i < kStreamedRows / 2; ++i) sums[c][i] = fmaf(terms[c][i], times, sums[c][i]);
    }
  }

  // Sums go to shared memory, where the tiles were, and from there through the norm to the gradient.
  __device__ __forceinline__ void finish(const Row (&rows)[2], const Along (&alongs)[2],
                                         const float (&sums)[kSlice][kStreamedRows / 2]) const {
    using Shared = Sums<kSlice>;
    auto* shared = reinterpret_cast<Shared*>(tiles_);
    int32_t exponents[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) exponents[half] = barriers_->exponents[row_of(half)] - kSlopeBits;
    meet(kGroupsMeet, kGroups * kWarpGroup);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      double along = alongs[half].exact() * static_cast<double>(rows[half].scale);
      along += __shfl_xor_sync(kAll, along, 1);
      along += __shfl_xor_sync(kAll, along, 2);
      if (lane_ % 4 != 0) continue;
      shared->along[row_of(half)] = along;
      shared->exponent[row_of(half)] = exponents[half];
    }
#pragma unroll
    for (int c = 0; c < kSlice; ++c) {
#pragma unroll
      for (int i = 0; i < kStreamedRows / 2; ++i) {
        const int row = warp_row() + fragments::row(lane_, i);
        shared->at[row * Shared::kPitch + c * kChunk16 + fragments::column(lane_, i)] = sums[c][i];
      }
    }
    meet(kGroupsMeet, kGroups * kWarpGroup);
    write(*shared);
  }

  // A thread has every second piece of a row.
  __device__ __forceinline__ void write(const Sums<kSlice>& shared) const {
    constexpr int kPiece = 16;
    const Kernel& p = parameters_.sweep.kernel;
    const int row = static_cast<int>(threadIdx.x) % kHeldRows;
    const int32_t place = item_.first + row;
    if (place >= p.held.count(image())) return;
    const int64_t pixel = p.held.pixel_at(image(), place), of = item_.image * p.held.pixels + pixel;
    const float scale = p.held.scale[of], rest = p.held.rest[of], low = p.held.low[of];
    const int64_t from = p.held.offset(image(), pixel), to = p.target.offset(image(), pixel);
    const double along = shared.along[row];
    const int32_t exponent = shared.exponent[row];
    const auto along_unit = static_cast<float>(along);
    const int64_t first_channel = static_cast<int64_t>(item_.slice) * kSlice * kChunk16;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x) / kHeldRows * kPiece; first < kSlice * kChunk16;
         first += kGroups * kWarpGroup / kHeldRows * kPiece) {
      const int64_t channel = first_channel + first, left = p.held.channels - channel;
      if (left <= 0) break;
      float values[kPiece];
      read_channels(p.held.image, from + channel * p.held.image.stride_c, 1, left, values);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const float unit = unit_of(values[i], scale, rest, low);
        const float across = fmaf(-unit, along_unit, shared.at[row * Sums<kSlice>::kPitch + first + i]);
        values[i] = times_power(across, exponent) * rest * scale;
      }
      with_elements(p.target.image.kind, p.target.image.data, [&](auto* elements) {
        auto* element = elements + to + channel * p.target.image.stride_c;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          if (i < left) element[i * p.target.image.stride_c] = element->narrow(values[i]);
        }
      });
    }
  }

  const BackwardParameters& parameters_;
  const BackwardItem& item_;
  const BackwardLayout<kSlice>& layout_;
  unsigned char* tiles_;
  BackwardBarriers* barriers_;
  int group_, lane_;
};

#endif  // CISC_HOPPER

// A block has 128 held rows of an image and a slice of channels.
template <bool to_query, Matrix type, bool split, int kSlice>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParameters parameters) {
#ifdef CISC_HOPPER
  CISC_DYNAMIC_SHARED(memory);
  unsigned char* tiles = tiles_in(memory);
  const auto layout = BackwardLayout<kSlice>::of(parameters.sweep.shape);
  const auto item = BackwardItem::of(parameters);
  auto* barriers = reinterpret_cast<BackwardBarriers*>(tiles + layout.barriers());
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpGroup;
  if (thread == 0) {
    prefetch_map(&parameters.held);
    prefetch_map(&parameters.streamed);
    for (int32_t stage = 0; stage < layout.stages; ++stage) {
      barrier_set(&barriers->full[stage], 1);
      barrier_set(&barriers->empty[stage], kWarps);
    }
    for (int32_t stage = 0; stage < kColumnStages; ++stage) {
      barrier_set(&barriers->columns_full[stage], kGatherers);
      barrier_set(&barriers->columns_empty[stage], kWarps);
    }
    barrier_set(&barriers->held_full, 1);
    barriers_set();
  }
  if (thread == 0) {
    barriers->exponent =
        !to_query && type == Matrix::f16
            ? parameters.sweep.exponents[static_cast<int32_t>(blockIdx.x) / parameters.slices]
            : kSlopeBits;
  }
  __syncthreads();
  if (group == kGroups) {
    keep_registers<kGathersRegisters>();
    const int gatherer = thread - kGroups * kWarpGroup - kWarp;
    if (gatherer == -kWarp) bring_chunks<kSlice>(parameters, item, layout, tiles, barriers);
    if (gatherer >= 0 && gatherer < kGatherers) {
      gather_columns<to_query>(parameters, item, gatherer,
                               reinterpret_cast<Column*>(tiles + layout.columns()), barriers);
    }
  } else {
    take_registers<kSumsRegisters>();
    HeldGroup<to_query, type, split, kSlice> held(parameters, item, layout, tiles, barriers, group);
    held.run();
  }
#endif
}

template <bool to_query, Matrix type, bool split, int kSlice>
void launch_backward(const Gpu& gpu, const BackwardSweep& sweep) {
  const Kernel& p = sweep.kernel;
  const auto layout = BackwardLayout<kSlice>::of(sweep.shape);
  BackwardParameters parameters{
      tensor_map(gpu, type, sweep.held_rows, p.images * p.held.pixels, sweep.shape.width(), kHeldRows),
      tensor_map(gpu, type, sweep.streamed_rows, p.images * p.streamed.pixels, sweep.shape.width(),
                 kStreamedRows),
      sweep, static_cast<int32_t>(ceil_div(p.held.pixels, kHeldRows)), 1};
  const int64_t tiles = p.images * parameters.tiles;
  if (!to_query && type == Matrix::f16) gpu.launch(exponents_kernel, tiles, kWarpGroup, 0, parameters);
  parameters.slices = static_cast<int32_t>(ceil_div(sweep.shape.chunks, kSlice));
  gpu.launch(backward_kernel<to_query, type, split, kSlice>, tiles * parameters.slices, kThreads,
             layout.bytes(), parameters);
}

}  // namespace
}  // namespace cisc::cross_similarity::sm90
