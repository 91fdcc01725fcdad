// rectified_cross_entropy for AVX-512 with bfloat16.

#include "rectified_cross_entropy_kernel.h"

namespace cisc::rectified_cross_entropy {
extern const Kernels kAvx512Bf16{&loss, &gradient, &count};
}  // namespace cisc::rectified_cross_entropy
