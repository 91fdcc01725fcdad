// prototype_similarity: cosine of each query pixel with each prototype, without a normalised copy of the
// query.

#include "prototype_similarity_arguments.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "isa.h"
#include "prototype_similarity_kernel.h"
#include "tensors.h"

namespace cisc::prototype_similarity {

const Kernels kPortable{&forward, &backward};

namespace {

// Unit vectors of some images' prototypes, and 1 / norm, 0 for both where the norm is below eps.
struct Units {
  std::vector<float> unit;      // [images,S,C]
  std::vector<double> inverse;  // [images,S]
};

// For the images [first, first + count).
Units unit_vectors(const Tensor& prototypes, int64_t first, int64_t count, double eps) {
  const int64_t slots = prototypes.size(1), channels = prototypes.size(2);
  Units u;
  u.unit.resize(static_cast<size_t>(count * slots * channels));
  u.inverse.reserve(static_cast<size_t>(count * slots));
  for (int64_t i = 0; i < count * slots; ++i) {
    float* row = u.unit.data() + i * channels;
    const int64_t offset = (first + i / slots) * prototypes.stride(0) + i % slots * prototypes.stride(1);
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

Problem problem_of(const Tensor& query, int64_t slots, double eps) {
  Problem p{};
  p.channels = query.size(1);
  p.width = query.size(3);
  p.pixels = query.size(2) * query.size(3);
  p.slots = slots;
  p.query = read_image(query);
  p.eps = norm_limit(eps);
  return p;
}

// f(task) for all tasks of the images [first, first + count), in parallel
template <typename Function>
void run_tasks(const Problem& p, const Plan& plan, const Units& units, int64_t first, int64_t count,
               double* partials, const Function& f) {
  const int64_t cells = p.slots * p.channels;
  const Crew crew(count * plan.tasks, 4 * plan.thread_floats);
  const auto workspaces = crew.each<float>(plan.thread_floats);
  crew.run([&](int64_t thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / plan.tasks, from = i % plan.tasks * plan.pixels;
      f(Task{first + image, from, std::min(from + plan.pixels, p.pixels), plan.tile,
             units.unit.data() + image * cells, workspaces[thread],
             partials != nullptr ? partials + i * cells : nullptr});
    }
  });
}

// query: [B,C,h,w] float32, bfloat16 or float16, any strides
// prototypes: [B,S,C] float32, bfloat16 or float16, any strides
// outputs
// similarity: [B,S,h,w] float32, contiguous
Tensor forward_op(const Tensor& query, const Tensor& prototypes, double eps) {
  check_arguments(kForward, query, prototypes, Place::cpu);
  const int64_t batch = query.size(0), slots = prototypes.size(1);
  const std::array<int64_t, 4> size{batch, slots, query.size(2), query.size(3)};
  const torch::headeronly::IntHeaderOnlyArrayRef shape(size.data(), size.size());
  if (query.numel() == 0) return torch::stable::new_zeros(query, shape, ScalarType::Float);
  Tensor similarity = torch::stable::new_empty(query, shape, ScalarType::Float);
  if (similarity.numel() == 0) return similarity;
  Problem p = problem_of(query, slots, eps);
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  const Kernels& kernels = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const Plan plan_ = plan(batch, p.channels, p.pixels, slots, false);
  for (int64_t first = 0; first < batch; first += plan_.images) {
    const int64_t count = std::min(plan_.images, batch - first);
    const Units units = unit_vectors(prototypes, first, count, eps);
    run_tasks(p, plan_, units, first, count, nullptr, [&](const Task& task) { kernels.forward(p, task); });
  }
  return similarity;
}

// grad: [B,S,h,w] float32, any strides
// query, prototypes: as in `forward_op`
// outputs
// gradients of query and prototypes, in their dtypes and, where those are dense, their strides
std::tuple<Tensor, Tensor> backward_op(const Tensor& grad, const Tensor& query, const Tensor& prototypes,
                                       double eps) {
  check_arguments(kBackward, query, prototypes, Place::cpu);
  check_grad(kBackward, grad, {query.size(0), prototypes.size(1), query.size(2), query.size(3)}, "[B,S,h,w]",
             Place::cpu);
  const int64_t batch = query.size(0), slots = prototypes.size(1), channels = query.size(1);
  Tensor grad_query = torch::stable::empty_like(query),
         grad_prototypes = torch::stable::empty_like(prototypes);
  Problem p = problem_of(query, slots, eps);
  p.grad = static_cast<const float*>(grad.const_data_ptr());
  for (int64_t d = 0; d < 4; ++d) p.grad_stride[d] = grad.stride(d);
  p.grad_query = write_image(grad_query);
  const Kernels& kernels = CISC_PICK(kPortable, kAvx2, kAvx512, kAvx512Bf16);
  const Plan plan_ = plan(batch, channels, p.pixels, slots, true);
  const int64_t cells = slots * channels;
  std::vector<double> partials(static_cast<size_t>(plan_.partials));
  std::vector<float> row(static_cast<size_t>(channels));
  const Float kind = float_kind(prototypes.scalar_type());
  for (int64_t first = 0; first < batch; first += plan_.images) {
    const int64_t count = std::min(plan_.images, batch - first);
    const Units units = unit_vectors(prototypes, first, count, eps);
    run_tasks(p, plan_, units, first, count, partials.data(),
              [&](const Task& task) { kernels.backward(p, task); });
    for (int64_t i = 0; i < count; ++i) {
      double* sums = partials.data() + i * plan_.tasks * cells;  // of the first task, then of all
      for (int64_t task = 1; task < plan_.tasks; ++task) {
        for (int64_t cell = 0; cell < cells; ++cell) sums[cell] += sums[task * cells + cell];
      }
      for (int64_t s = 0; s < slots; ++s, sums += channels) {
        const float* unit = units.unit.data() + (i * slots + s) * channels;
        const double inverse = units.inverse[static_cast<size_t>(i * slots + s)];
        double along = 0.0;
        for (int64_t c = 0; c < channels; ++c) along += sums[c] * unit[c];
        for (int64_t c = 0; c < channels; ++c)
          row[c] = static_cast<float>((sums[c] - along * unit[c]) * inverse);
        write_row(kind, row.data(), grad_prototypes.stride(2), channels, grad_prototypes.mutable_data_ptr(),
                  (first + i) * grad_prototypes.stride(0) + s * grad_prototypes.stride(1));
      }
    }
  }
  return {grad_query, grad_prototypes};
}

}  // namespace
}  // namespace cisc::prototype_similarity

STABLE_TORCH_LIBRARY_FRAGMENT(cisc_ext, m) {
  m.def(cisc::prototype_similarity::kSchema);
  m.def(cisc::prototype_similarity::kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(cisc_ext, CPU, m) {
  m.impl("prototype_similarity", TORCH_BOX(&cisc::prototype_similarity::forward_op));
  m.impl("prototype_similarity_backward", TORCH_BOX(&cisc::prototype_similarity::backward_op));
}
