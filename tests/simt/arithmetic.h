// Sums of products as tensor cores make them, as far as asynchronous.cpp says.
#pragma once

#include <cstdint>

#include "asynchronous.h"

namespace simt {

double widened(Elements type, uint32_t bits);

// Toward zero; NaN is one and the same.
void truncate(const double* from, int64_t count,
              // outputs
              uint32_t* to);

// sums [rows,columns] += a [rows,depth] b [depth,columns]
void add_products(const double* a, const double* b, int rows, int depth, int columns,
                  // outputs
                  double* sums);
void add_products(const int32_t* a, const int32_t* b, int rows, int depth, int columns,
                  // outputs
                  uint32_t* sums);

}  // namespace simt
