// cross_similarity for AVX-512.

#include "cross_similarity_kernel.h"

namespace cisc::cross_similarity {
extern const Kernels kAvx512 = kKernels;
}  // namespace cisc::cross_similarity
