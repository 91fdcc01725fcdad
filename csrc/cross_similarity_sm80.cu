#include "cross_similarity_sweep.cuh"
namespace cisc::cross_similarity {
class_sort::Cut cut_sm80(const RowShape&, Reduction) { return {128, 128, 100}; }
void sweep_sm80(const Gpu&, const Sweep&) { fail("cross_similarity", "sm80"); }
}  // namespace cisc::cross_similarity
