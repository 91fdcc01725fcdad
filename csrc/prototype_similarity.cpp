// prototype_similarity: cosine of each query pixel with each prototype, without a normalised copy of the
// query.

#include "prototype_similarity.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "isa.h"
#include "prototype_similarity_kernel.h"
#include "tensors.h"

namespace cisc::prototype_similarity {

const Kernels kPortable{&forward, &backward};

namespace {

constexpr const char* kForward = "prototype_similarity";
constexpr const char* kBackward = "prototype_similarity_backward";

void check_arguments(const char* op, const Tensor& query, const Tensor& prototypes) {
  check_rank(op, "query", query, 4, "[B,C,h,w]");
  check_features(op, "query", query.scalar_type());
  check_cpu(op, "query", query);
  check_rank(op, "prototypes", prototypes, 3, "[B,S,C]");
  check_features(op, "prototypes", prototypes.scalar_type());
  check_cpu(op, "prototypes", prototypes);
  check_size(op, "prototypes", prototypes, 0, query.size(0), "[B,S,C]");
  check_size(op, "prototypes", prototypes, 2, query.size(1), "[B,S,C]");
}

// Unit vectors, and 1 / norm, 0 for both where the norm is below eps.
struct Units {
  std::vector<float> unit;      // [B,S,C]
  std::vector<double> inverse;  // [B,S]
};

Units unit_vectors(const Tensor& prototypes, double eps) {
  const int64_t batch = prototypes.size(0), slots = prototypes.size(1), channels = prototypes.size(2);
  Units u;
  u.unit.resize(static_cast<size_t>(batch * slots * channels));
  for (int64_t i = 0; i < batch * slots; ++i) {
    float* row = u.unit.data() + i * channels;
    const int64_t offset = i / slots * prototypes.stride(0) + i % slots * prototypes.stride(1);
    read_row(float_kind(prototypes.scalar_type()), prototypes.const_data_ptr(), offset, prototypes.stride(2),
             channels, row);
    double square = 0.0;
    for (int64_t c = 0; c < channels; ++c)
      square += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    const double norm = std::sqrt(square);
    u.inverse.push_back(norm < eps ? 0.0 : 1.0 / norm);
    for (int64_t c = 0; c < channels; ++c) row[c] = static_cast<float>(row[c] * u.inverse.back());
  }
  return u;
}

Problem problem_of(const Tensor& query, const Units& units, int64_t slots, double eps) {
  Problem p{};
  p.channels = query.size(1);
  p.width = query.size(3);
  p.pixels = query.size(2) * query.size(3);
  p.slots = slots;
  p.query = read_image(query);
  p.units = units.unit.data();
  p.eps = static_cast<float>(eps);
  return p;
}

// f(task) for all tasks of the images [first, first + count), in parallel
template <typename Function>
void run_tasks(const Problem& p, const Plan& plan, int64_t first, int64_t count, double* partials,
               const Function& f) {
  parallel_for(0, count * plan.tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> workspace(new float[plan.thread_floats]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % plan.tasks * plan.pixels;
      f(Task{first + i / plan.tasks, from, std::min(from + plan.pixels, p.pixels), plan.tile, workspace.get(),
             partials != nullptr ? partials + i * p.slots * p.channels : nullptr});
    }
  });
}

// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// prototypes: [B,S,C] float32, bfloat16 or float16, any strides
// outputs
// similarity: [B,S,h,w] float32, contiguous
Tensor forward_op(const Tensor& query, const Tensor& prototypes, double eps) {
  check_arguments(kForward, query, prototypes);
  const int64_t batch = query.size(0), slots = prototypes.size(1);
  const std::array<int64_t, 4> size{batch, slots, query.size(2), query.size(3)};
  Tensor similarity = torch::stable::new_zeros(query, {size.data(), size.size()}, ScalarType::Float);
  if (similarity.numel() == 0 || query.numel() == 0) return similarity;
  const Units units = unit_vectors(prototypes, eps);
  Problem p = problem_of(query, units, slots, eps);
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  const Kernels& kernels = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  run_tasks(p, plan(batch, p.channels, p.pixels, slots, false), 0, batch, nullptr,
            [&](const Task& task) { kernels.forward(p, task); });
  return similarity;
}

// grad: [B,S,h,w] float32, any strides
// query, prototypes: as in `forward_op`
// outputs
// gradients of query and prototypes, in their dtypes and, where those are dense, their strides
std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& query, const Tensor& prototypes,
                                       double eps) {
  check_arguments(kBackward, query, prototypes);
  const int64_t batch = query.size(0), slots = prototypes.size(1), channels = query.size(1);
  check_rank(kBackward, "grad", grad, 4, "[B,S,h,w]");
  check_dtype(kBackward, "grad", grad.scalar_type(), {ScalarType::Float}, "float32");
  check_cpu(kBackward, "grad", grad);
  const std::array<int64_t, 4> size{batch, slots, query.size(2), query.size(3)};
  for (int64_t d = 0; d < 4; ++d) check_size(kBackward, "grad", grad, d, size[d], "[B,S,h,w]");
  Tensor grad_query = torch::stable::empty_like(query),
         grad_prototypes = torch::stable::empty_like(prototypes);
  const Units units = unit_vectors(prototypes, eps);
  Problem p = problem_of(query, units, slots, eps);
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  for (int64_t d = 0; d < 4; ++d) p.grad_stride[d] = grad.stride(d);
  p.grad_query = write_image(grad_query);
  const Kernels& kernels = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const Plan plan_ = plan(batch, channels, p.pixels, slots, true);
  const int64_t cells = slots * channels;
  std::vector<double> partials(static_cast<size_t>(plan_.partials)), total(static_cast<size_t>(cells));
  std::vector<float> row(static_cast<size_t>(channels));
  const Float kind = float_kind(prototypes.scalar_type());
  for (int64_t first = 0; first < batch; first += plan_.images) {
    const int64_t count = std::min(plan_.images, batch - first);
    run_tasks(p, plan_, first, count, partials.data(), [&](const Task& task) { kernels.backward(p, task); });
    for (int64_t b = first; b < first + count; ++b) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t task = 0; task < plan_.tasks; ++task) {
        const double* from = partials.data() + ((b - first) * plan_.tasks + task) * cells;
        for (int64_t i = 0; i < cells; ++i) total[i] += from[i];
      }
      for (int64_t s = 0; s < slots; ++s) {
        const float* unit = units.unit.data() + (b * slots + s) * channels;
        const double* sums = total.data() + s * channels;
        double along = 0.0;
        for (int64_t c = 0; c < channels; ++c) along += sums[c] * unit[c];
        const double inverse = units.inverse[static_cast<size_t>(b * slots + s)];
        for (int64_t c = 0; c < channels; ++c)
          row[c] = static_cast<float>((sums[c] - along * unit[c]) * inverse);
        write_row(kind, row.data(), grad_prototypes.stride(2), channels, grad_prototypes.mutable_data_ptr(),
                  b * grad_prototypes.stride(0) + s * grad_prototypes.stride(1));
      }
    }
  }
  return {grad_query, grad_prototypes};
}

}  // namespace
}  // namespace cisc::prototype_similarity

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def("prototype_similarity(Tensor query, Tensor prototypes, float eps) -> Tensor");
  m.def(
      "prototype_similarity_backward(Tensor grad, Tensor query, Tensor prototypes, float eps) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("prototype_similarity", TORCH_BOX(&cisc::prototype_similarity::forward_op));
  m.impl("prototype_similarity_backward", TORCH_BOX(&cisc::prototype_similarity::backward_op));
}
