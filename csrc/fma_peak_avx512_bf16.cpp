// fma_peak for AVX-512 with bfloat16.

#include "fma_peak_kernel.h"

namespace cisc::fma_peak {
extern const Kernel kAvx512Bf16 = &run;
}  // namespace cisc::fma_peak
