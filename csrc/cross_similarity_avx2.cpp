// cross_similarity for AVX2 with FMA.

#include "cross_similarity_kernel.h"

namespace cisc::cross_similarity {
extern const Kernels kAvx2 = kKernels;
}  // namespace cisc::cross_similarity
