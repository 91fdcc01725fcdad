// predict for AVX-512 with bfloat16.

#include "predict_kernel.h"

namespace cisc::predict {
extern const Kernel kAvx512Bf16 = &run;
}  // namespace cisc::predict
