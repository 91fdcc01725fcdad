// cross_similarity for AVX-512 with bfloat16.

#include "cross_similarity_kernel.h"

namespace cisc::cross_similarity {
extern const Kernels kAvx512Bf16 = kKernels;
}  // namespace cisc::cross_similarity
