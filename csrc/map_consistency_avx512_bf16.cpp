// map_consistency for AVX-512 with bfloat16.

#include "map_consistency_kernel.h"

namespace cisc::map_consistency {
extern const Kernels kAvx512Bf16{&loss, &gradient};
}  // namespace cisc::map_consistency
