// predict for AVX-512.

#include "predict_kernel.h"

namespace cisc::predict {
extern const Kernel kAvx512 = &run;
}  // namespace cisc::predict
