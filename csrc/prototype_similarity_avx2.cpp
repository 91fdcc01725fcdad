// prototype_similarity for AVX2 with FMA.

#include "prototype_similarity_kernel.h"

namespace cisc::prototype_similarity {
extern const Kernels kAvx2{&forward, &backward};
}  // namespace cisc::prototype_similarity
