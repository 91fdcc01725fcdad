// fma_peak for AVX-512.

#include "fma_peak_kernel.h"

namespace cisc::fma_peak {
extern const Kernel kAvx512 = &run;
}  // namespace cisc::fma_peak
