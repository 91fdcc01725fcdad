// prototype_similarity for AVX-512.

#include "prototype_similarity_kernel.h"

namespace cisc::prototype_similarity {
extern const Kernels kAvx512{&forward, &backward};
}  // namespace cisc::prototype_similarity
