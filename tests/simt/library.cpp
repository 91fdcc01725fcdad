// Schemas of the operators, which the C++ kernels' files define in the library that has these.

#include <torch/csrc/stable/library.h>

#include "cross_similarity_arguments.h"
#include "map_consistency_arguments.h"
#include "masked_average_pool_arguments.h"
#include "predict_arguments.h"
#include "prototype_similarity_arguments.h"
#include "rectified_cross_entropy_arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::masked_average_pool::kSchema);
  m.def(cisc::masked_average_pool::kBackwardSchema);
  m.def(cisc::prototype_similarity::kSchema);
  m.def(cisc::prototype_similarity::kBackwardSchema);
  m.def(cisc::cross_similarity::kSchema);
  m.def(cisc::cross_similarity::kBackwardSchema);
  m.def(cisc::map_consistency::kSchema);
  m.def(cisc::rectified_cross_entropy::kSchema);
  m.def(cisc::rectified_cross_entropy::kBackwardSchema);
  m.def(cisc::predict::kSchema);
}
