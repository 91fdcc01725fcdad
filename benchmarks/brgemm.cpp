// Row maximum of query x guide by blocks of ATen's brgemm: a rival of cross_similarity, not part of the
// package. query [rows,depth] and guide [depth,columns] are row-major; value [rows].

#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kRows = 64;

void block_max(const float* scores, int64_t rows, int64_t columns, float* best) {
  for (int64_t i = 0; i < rows; ++i) {
    float most = best[i];
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) most = std::max(most, scores[i * columns + j]);
    best[i] = most;
  }
}

// Guide in blocks [depth,width]; bfloat16 in blocks [depth/2,width,2], since brgemm is five times slower
// without.
template <typename T>
int row_max(int64_t rows, int64_t columns, int64_t depth, int64_t block, int64_t threads, const T* query,
            const T* guide, float* value) {
  namespace blas = at::native::cpublas;
  constexpr bool packed = sizeof(T) == 2;
  if (packed && depth % 2 != 0) return 1;
  std::vector<T> blocks(static_cast<size_t>(depth) * columns);
#pragma omp parallel for num_threads(threads)
  for (int64_t first = 0; first < columns; first += block) {
    const int64_t width = std::min(block, columns - first);
    T* to = blocks.data() + first * depth;
    if (packed) {
      for (int64_t c = 0; c < depth; ++c)
        for (int64_t j = 0; j < width; ++j)
          to[(c / 2 * width + j) * 2 + c % 2] = guide[c * columns + first + j];
    } else {
      for (int64_t c = 0; c < depth; ++c) std::copy_n(guide + c * columns + first, width, to + c * width);
    }
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(kRows * block);
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < rows; start += kRows) {
      const int64_t height = std::min(kRows, rows - start);
      std::fill_n(value + start, height, -std::numeric_limits<float>::infinity());
      for (int64_t first = 0; first < columns; first += block) {
        const int64_t width = std::min(block, columns - first);
        const T* from = blocks.data() + first * depth;
        blas::brgemm(height, width, depth, depth, width, width, false, query + start * depth, from,
                     scores.data(), packed);
        block_max(scores.data(), height, width, value + start);
      }
    }
    blas::brgemm_release(packed);
  }
  return 0;
}

}  // namespace

extern "C" int row_max_float32(int64_t rows, int64_t columns, int64_t depth, int64_t block, int64_t threads,
                               const float* query, const float* guide, float* value) {
  return row_max(rows, columns, depth, block, threads, query, guide, value);
}

extern "C" int row_max_bfloat16(int64_t rows, int64_t columns, int64_t depth, int64_t block, int64_t threads,
                                const at::BFloat16* query, const at::BFloat16* guide, float* value) {
  return row_max(rows, columns, depth, block, threads, query, guide, value);
}
