// map_consistency for AVX-512.

#include "map_consistency_kernel.h"

namespace cisc::map_consistency {
extern const Kernels kAvx512{&loss, &gradient};
}  // namespace cisc::map_consistency
