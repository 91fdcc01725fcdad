// rectified_cross_entropy for AVX2 with FMA.

#include "rectified_cross_entropy_kernel.h"

namespace cisc::rectified_cross_entropy {
extern const Kernels kAvx2{&loss, &gradient, &count};
}  // namespace cisc::rectified_cross_entropy
