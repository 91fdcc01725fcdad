// Both sides of cross_similarity as rows of 16-bit numbers for tensor cores, in the order of their classes.
//
// Bytes: the features once, and the rows; of long vectors a part of the features twice.
#pragma once

#include "cross_similarity_device.cuh"
#include "cross_similarity_tiles.h"

namespace cisc::cross_similarity {
namespace {

constexpr int kRowBits = 9;      // largest components are brought to [2^8,2^9)
constexpr float kUnit = 256.0f;  // of rounded and split rows, the length

// Blocks of a multiprocessor that pack 16-bit numbers: more of them have more loads on their way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kPackBlocks = 4;
#else
constexpr int kPackBlocks = 5;
#endif

// One side, packed. Workspace holds the images from `Side::first` on.
struct Rows {
  uint16_t* data;  // [images,pixels,width]
  // [images,pixels], and kScalePad more: times which a row is a unit vector: of those 2^-8 at most
  float* scale;
};

// What stays in shared memory of a block's features.
template <typename Element>
struct Kept {
  static constexpr int kPerWord = 4 / sizeof(Element);
  static constexpr int kWords = kChunk16 / kPerWord;  // of a chunk of a row
  // A word has a thread's channels that follow each other, those of its neighbours stand beside it: so
  // neither who writes nor who reads 8 of a row meets another one in a bank.
  using Word = Pack<Element, kPerWord>;

  static int64_t bytes(int32_t chunks) { return kTile * pitch(chunks) * sizeof(Word); }

  // Chunks of rows that a block keeps: where there is room for several blocks, more.
  static int32_t chunks(const Gpu& gpu, const RowShape& shape) {
    const int64_t room = gpu.shared_bytes() < (160 << 10) ? 32 << 10 : 64 << 10;
    return static_cast<int32_t>(
        std::min<int64_t>(shape.chunks, room / static_cast<int64_t>(kTile * kChunk16 * sizeof(Element))));
  }

  // Words of a row.
  CISC_HD static int32_t pitch(int32_t chunks) { return chunks * kWords + 1; }
};

// From global memory, though the compiler does not know where a held pointer leads.
template <typename Element>
__device__ __forceinline__ Element load(const Element* from) {
  return {__ldg(&from->bits)};
}
__device__ __forceinline__ Float32 load(const Float32* from) { return {__ldg(&from->value)}; }

// A thread's channels of a chunk: every kParts-th; 0 behind the first `count` from there on.
// stride: of kParts channels
template <typename Element>
__device__ __forceinline__ void read_chunk(const Element* from, int64_t stride, int64_t count,
                                           // outputs
                                           Element (&values)[kDepth]) {
  const int there = count >= kChunk16 ? kDepth : count > 0 ? static_cast<int>(ceil_div(count, kParts)) : 0;
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    values[i] = i < there ? load(from) : Element{};
    from = held(from + stride);
  }
}

// Eight at once. The compiler would take a struct's copy apart.
__device__ __forceinline__ void write_numbers(uint16_t* to, const uint16_t (&numbers)[8]) {
  Pack<uint32_t, 4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.at[i] = numbers[2 * i] | static_cast<uint32_t>(numbers[2 * i + 1]) << 16;
#ifdef CISC_SIMT
  write_pack(reinterpret_cast<uint32_t*>(to), words);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3])
               : "memory");
#endif
}

// How numbers become those of a row.
struct Scaling {
  float scale, rest, low;  // of exact rows, two powers of two; scale: 0 = the vector has no direction
  float fill;              // what the row has then
};

// Features, to rows. A block has 64 positions of a side, and reads them once, or what it cannot keep twice.
// Vectors that are not finite become NaN, those without length 0.
// kept: chunks; finite: what is not becomes 0 and its scale NaN, and rows behind the last position become 0
template <typename Element>
__global__ void __launch_bounds__(kThreads, sizeof(Element) == 2 ? kPackBlocks : 4)
    pack_kernel(Side side, Form form, RowShape shape, int32_t kept, bool finite, double eps,
                // outputs: lengths go to the side
                Rows rows) {
  using Tile = Kept<Element>;
  using Word = typename Tile::Word;
  constexpr int kPacks = kChunk16 / 8;  // of 8 numbers, in a chunk
  CISC_SHARED(squares, double[kThreads]);
  CISC_SHARED(largest, float[kThreads]);
  CISC_SHARED(scalings, Scaling[kTile]);
  CISC_DYNAMIC_SHARED(memory);
  auto* words = reinterpret_cast<Word*>(memory);  // [kTile,pitch]
  const int32_t pitch = Tile::pitch(kept);
  const int64_t tiles = ceil_div(side.pixels, kTile);
  const int64_t b = side.first + blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
  const int thread = static_cast<int>(threadIdx.x), at = thread % kTile, part = thread / kTile;
  const int64_t place = (b - side.first) * side.pixels, position = first + at, behind = side.count(b);
  // Behind the last row of all, for its tile.
  if (blockIdx.x + 1 == gridDim.x) rows.scale[place + side.pixels + thread] = 1.0f;
  const auto rows_here = static_cast<int32_t>((finite ? side.pixels : behind) - first);
  if (rows_here <= 0) return;
  const bool inside = position < behind;
  const int64_t pixel = inside ? side.pixel_at(b, position) : 0;
  const int64_t channels = inside ? side.channels - part : 0, stride = kParts * side.image.stride_c;
  const auto* from =
      static_cast<const Element*>(side.image.data) + side.offset(b, pixel) + part * side.image.stride_c;
  const auto keep = [&](int32_t chunk, const Element(&values)[kDepth]) {
    Word* to = words + at * pitch + chunk * Tile::kWords + part;
#pragma unroll
    for (int i = 0; i < kDepth / Tile::kPerWord; ++i) {
      Word word;
#pragma unroll
      for (int j = 0; j < Tile::kPerWord; ++j) word.at[j] = values[i * Tile::kPerWord + j];
      to[i * kParts] = word;
    }
  };
  double square = 0.0;
  float most = 0.0f;
  for (int32_t chunk = 0; chunk < shape.chunks; ++chunk) {
    Element values[kDepth];
    read_chunk(from + chunk * (kDepth * stride), stride, channels - chunk * kChunk16, values);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const float value = values[i].widen();
      square += static_cast<double>(value) * static_cast<double>(value);
      most = ::fmaxf(most, ::fabsf(value));
    }
    if (chunk < kept) keep(chunk, values);
  }
  squares[thread] = square;
  largest[thread] = most;
  __syncthreads();
  if (part == 0) {
    square = 0.0;
    for (int i = 0; i < kParts; ++i) {
      square += squares[i * kTile + at];
      most = ::fmaxf(most, largest[i * kTile + at]);
    }
    const Length length = inverse_length(::sqrt(square), eps);
    Scaling scaling{length.scale, length.rest, length.low, length.finite || finite ? 0.0f : kNan};
    int exponent = 0;
    if (form == Form::exact && length.exists) {
      ::frexpf(most, &exponent);
      exponent = kRowBits - exponent;
      // In halves, as the whole may be none that float32 has.
      scaling.scale = ::ldexpf(1.0f, exponent / 2);
      scaling.rest = ::ldexpf(1.0f, exponent - exponent / 2);
    }
    scalings[at] = scaling;
    if (inside) {
      side.scale[place + pixel] = length.scale;
      side.rest[place + pixel] = length.rest;
      side.low[place + pixel] = length.low;
      const double exact = ::ldexp(1.0 / length.norm, -exponent);
      rows.scale[place + position] = finite && !length.finite               ? kNan
                                     : length.exists && form == Form::exact ? static_cast<float>(exact)
                                                                            : 1.0f / kUnit;
    }
  }
  __syncthreads();
  const int64_t width = shape.width(), rests_behind = static_cast<int64_t>(shape.chunks) * kChunk16;
  const int column = thread % kPacks;
  // A thread has 8 numbers of a row and of another one.
  const auto write = [&](int32_t slot, int32_t chunk) {
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / kPacks) {
      const int row = i + thread / kPacks;
      if (row >= rows_here) continue;
      const Scaling scaling = scalings[row];
      const Word* kept_words = words + row * pitch + slot * Tile::kWords + column * (8 / Tile::kPerWord);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8 / Tile::kPerWord; ++j) {
        const Word word = kept_words[j];
#pragma unroll
        for (int k = 0; k < Tile::kPerWord; ++k) values[j + k * kParts] = word.at[k].widen();
      }
      uint16_t* to = rows.data + (place + first + row) * width + chunk * kChunk16 + column * 8;
      uint16_t numbers[8], rests[8];
      if (form == Form::exact) {
        if constexpr (sizeof(Element) == 2) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float value = values[j] * scaling.scale * scaling.rest;
            numbers[j] = Element::narrow(scaling.scale == 0.0f ? scaling.fill : value).bits;
          }
          write_numbers(to, numbers);
        }
        continue;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float unit = kUnit * unit_of(values[j], scaling.scale, scaling.rest, scaling.low);
        const float value = scaling.scale == 0.0f ? scaling.fill : unit;
        const auto number = Float16::narrow(value);
        numbers[j] = number.bits;
        rests[j] = Float16::narrow(value - number.widen()).bits;
      }
      write_numbers(to, numbers);
      if (form == Form::split) write_numbers(to + rests_behind, rests);
    }
  };
  for (int32_t chunk = 0; chunk < kept; ++chunk) write(chunk, chunk);
  for (int32_t chunk = kept; chunk < shape.chunks; ++chunk) {
    Element values[kDepth];
    read_chunk(from + chunk * (kDepth * stride), stride, channels - chunk * kChunk16, values);
    __syncthreads();
    keep(0, values);
    __syncthreads();
    write(0, chunk);
  }
}

// Host.
inline void pack_rows(const Gpu& gpu, const Side& side, int64_t images, Form form, const RowShape& shape,
                      bool finite, double eps,
                      // outputs
                      const Rows& rows) {
  with_float(side.image.kind, [&](auto element) {
    using Tile = Kept<decltype(element)>;
    const int32_t kept = Tile::chunks(gpu, shape);
    gpu.launch(pack_kernel<decltype(element)>, images * ceil_div(side.pixels, kTile), kThreads,
               Tile::bytes(kept), side, form, shape, kept, finite, eps, rows);
  });
}

}  // namespace
}  // namespace cisc::cross_similarity
