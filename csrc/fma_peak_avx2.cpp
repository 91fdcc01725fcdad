// fma_peak for AVX2 with FMA.

#include "fma_peak_kernel.h"

namespace cisc::fma_peak {
extern const Kernel kAvx2 = &run;
}  // namespace cisc::fma_peak
