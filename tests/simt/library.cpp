// Schemas of the operators, which the C++ kernels' files define in the library that has these.

#include <torch/csrc/stable/library.h>

#include "map_consistency_arguments.h"
#include "predict_arguments.h"
#include "rectified_cross_entropy_arguments.h"

#define CISC_PAIR_ARGUMENTS                                                    \
  "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? " \
  "query_labels, str reduction, int k, float temperature, int ignore_index, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::predict::kSchema);
  m.def("masked_average_pool(Tensor features, Tensor labels, Tensor classes, float eps) -> Tensor");
  m.def(
      "masked_average_pool_backward(Tensor grad, Tensor labels, Tensor classes, SymInt h, SymInt w, "
      "float eps, ScalarType dtype) -> Tensor");
  m.def(cisc::map_consistency::kSchema);
  m.def(cisc::rectified_cross_entropy::kSchema);
  m.def(cisc::rectified_cross_entropy::kBackwardSchema);
  m.def("prototype_similarity(Tensor query, Tensor prototypes, float eps) -> Tensor");
  m.def(
      "prototype_similarity_backward(Tensor grad, Tensor query, Tensor prototypes, float eps) "
      "-> (Tensor, Tensor)");
  m.def("cross_similarity(" CISC_PAIR_ARGUMENTS
        ", bool return_index) -> (Tensor similarity, Tensor index, Tensor saved)");
  m.def(
      "cross_similarity_backward(Tensor grad, Tensor similarity, Tensor index, Tensor "
      "saved, " CISC_PAIR_ARGUMENTS ", bool need_query, bool need_guide) -> (Tensor, Tensor)");
}
