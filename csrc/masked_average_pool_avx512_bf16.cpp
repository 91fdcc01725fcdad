// masked_average_pool for AVX-512 with bfloat16.

#include "masked_average_pool_kernel.h"

namespace cisc::masked_average_pool {
extern const Kernels kAvx512Bf16{&pool_planes, &pool_pixels, &scatter};
}  // namespace cisc::masked_average_pool
