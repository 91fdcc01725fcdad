// masked_average_pool for AVX2 with FMA.

#include "masked_average_pool_kernel.h"

namespace cisc::masked_average_pool {
extern const Kernels kAvx2{&pool_planes, &pool_pixels, &scatter};
}  // namespace cisc::masked_average_pool
