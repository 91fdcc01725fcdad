// Schemas of the operators, which the C++ kernels' files define in the library that has these.

#include <torch/csrc/stable/library.h>

#include "masked_average_pool_arguments.h"
#include "predict_arguments.h"
#include "prototype_similarity_arguments.h"

#define CISC_PAIR_ARGUMENTS                                                    \
  "Tensor query, Tensor guide, Tensor guide_labels, Tensor? classes, Tensor? " \
  "query_labels, str reduction, int k, float temperature, int ignore_index, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::predict::kSchema);
  m.def(cisc::masked_average_pool::kSchema);
  m.def(cisc::masked_average_pool::kBackwardSchema);
  m.def(
      "map_consistency(Tensor similarity, Tensor labels, Tensor classes, int ignore_index, bool need_grad) "
      "-> (Tensor loss, Tensor grad)");
  m.def(
      "rectified_cross_entropy(Tensor logits, Tensor labels, Tensor? similarity, Tensor? classes, "
      "int ignore_index, str reduction, float? ohem_threshold, int ohem_min_kept, bool need_grad) "
      "-> (Tensor loss, Tensor grad)");
  m.def(
      "rectified_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor? similarity, "
      "Tensor? classes, int ignore_index, float? ohem_threshold, int ohem_min_kept) -> Tensor");
  m.def(cisc::prototype_similarity::kSchema);
  m.def(cisc::prototype_similarity::kBackwardSchema);
  m.def("cross_similarity(" CISC_PAIR_ARGUMENTS
        ", bool return_index) -> (Tensor similarity, Tensor index, Tensor saved)");
  m.def(
      "cross_similarity_backward(Tensor grad, Tensor similarity, Tensor index, Tensor "
      "saved, " CISC_PAIR_ARGUMENTS ", bool need_query, bool need_guide) -> (Tensor, Tensor)");
}
