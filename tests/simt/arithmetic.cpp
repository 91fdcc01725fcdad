// What arithmetic.h declares.
#include "arithmetic.h"

#include <cmath>

#include "simt.h"

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define CISC_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CISC_CLONES
#endif

namespace simt {
namespace {

double half_of(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float size = bits_of<float>(rest << 13) * 0x1p112f;
  return sign != 0 ? -size : size;
}

}  // namespace

double widened(Elements type, uint32_t bits) {
  return type == Elements::f16 ? half_of(bits) : bits_of<float>(bits << 16);
}

void truncate(const double* from, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const double exact = from[i];
    const float near = static_cast<float>(exact);
    const bool beyond = std::fabs(static_cast<double>(near)) > std::fabs(exact) && std::fabs(exact) < 0x1p128;
    const uint32_t bits = bits_of<uint32_t>(near) - (beyond ? 1 : 0);
    to[i] = exact != exact ? 0x7fffffff : bits;
  }
}

CISC_CLONES void add_products(const double* a, const double* b, int rows, int depth, int columns,
                              // outputs
                              double* sums) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const double factor = a[i * depth + k];
      for (int j = 0; j < columns; ++j) sums[i * columns + j] += factor * b[k * columns + j];
    }
  }
}

CISC_CLONES void add_products(const int32_t* a, const int32_t* b, int rows, int depth, int columns,
                              // outputs
                              uint32_t* sums) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const int32_t factor = a[i * depth + k];
      for (int j = 0; j < columns; ++j) {
        sums[i * columns + j] += static_cast<uint32_t>(factor * b[k * columns + j]);
      }
    }
  }
}

}  // namespace simt
