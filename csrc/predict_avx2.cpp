// predict for AVX2 with FMA.

#include "predict_kernel.h"

namespace cisc::predict {
extern const Kernel kAvx2 = &run;
}  // namespace cisc::predict
