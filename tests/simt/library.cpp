// Schemas of the operators, which the C++ kernels' files define in the library that has these.

#include <torch/csrc/stable/library.h>

#include "cross_similarity_arguments.h"
#include "predict_arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::predict::kSchema);
  m.def("masked_average_pool(Tensor features, Tensor labels, Tensor classes, float eps) -> Tensor");
  m.def(
      "masked_average_pool_backward(Tensor grad, Tensor labels, Tensor classes, SymInt h, SymInt w, "
      "float eps, ScalarType dtype) -> Tensor");
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
  m.def("prototype_similarity(Tensor query, Tensor prototypes, float eps) -> Tensor");
  m.def(
      "prototype_similarity_backward(Tensor grad, Tensor query, Tensor prototypes, float eps) "
      "-> (Tensor, Tensor)");
  m.def(cisc::cross_similarity::kSchema);
  m.def(cisc::cross_similarity::kBackwardSchema);
}
