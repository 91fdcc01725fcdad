// map_consistency for AVX2 with FMA.

#include "map_consistency_kernel.h"

namespace cisc::map_consistency {
extern const Kernels kAvx2{&loss, &gradient};
}  // namespace cisc::map_consistency
