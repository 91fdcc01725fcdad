// prototype_similarity for AVX-512 with bfloat16.

#include "prototype_similarity_kernel.h"

namespace cisc::prototype_similarity {
extern const Kernels kAvx512Bf16{&forward, &backward};
}  // namespace cisc::prototype_similarity
