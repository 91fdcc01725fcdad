// cisc_ext._build: what was built, and what workspace a shape gets, from the code that launches. No tensors
// here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cross_similarity.h"
#include "cross_similarity_plan.h"
#include "isa.h"
#include "map_consistency.h"
#include "masked_average_pool.h"
#include "predict.h"
#include "prototype_similarity.h"
#include "rectified_cross_entropy.h"

namespace py = pybind11;

namespace {

py::tuple words(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (end > begin) parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(parts);
}

py::dict info() {
  py::dict built;
  built["compiler"] = CISC_COMPILER;
  built["flags"] = words(CISC_FLAGS);
  built["instruction_sets"] = words(CISC_INSTRUCTION_SETS);
  built["torch"] = CISC_TORCH;
  built["torch_target"] = CISC_TORCH_TARGET;
  built["cuda_compiler"] = CISC_CUDA_COMPILER;
  built["cuda_chips"] = words(CISC_CUDA_CHIPS);
  built["left_out"] = CISC_LEFT_OUT;
  built["instruction_set_in_use"] = cisc::kIsaNames[static_cast<int>(cisc::isa())];
  return built;
}

using Shape = std::vector<int64_t>;
using Shapes = std::map<std::string, Shape>;

// The shape of an argument, of `rank` dimensions, none negative.
const Shape& shape_of(const std::string& op, const Shapes& shapes, const std::string& name, size_t rank) {
  const auto found = shapes.find(name);
  if (found == shapes.end()) throw std::invalid_argument("plan: " + op + " needs the shape of " + name);
  const Shape& shape = found->second;
  if (shape.size() != rank || std::any_of(shape.begin(), shape.end(), [](int64_t n) { return n < 0; })) {
    throw std::invalid_argument("plan: " + name + " must have " + std::to_string(rank) +
                                " dimensions, none negative");
  }
  return shape;
}

// [B,C,h,w] upsampled to labels [B,H,W]
cisc::upsample::Grid grid_of(const Shape& maps, int64_t height, int64_t width, bool align_corners) {
  if (maps[2] == 0 || maps[3] == 0) throw std::invalid_argument("plan: maps must have at least one pixel");
  return {maps[1], maps[2], maps[3], height, width, align_corners};
}

py::dict described(const py::dict& tile, int64_t bytes, const cisc::Work& work) {
  py::dict out;
  out["tile"] = tile;
  out["workspace_bytes"] = bytes;
  out["flops"] = work.flops;
  out["bytes"] = work.bytes;
  return out;
}

py::dict upsampling(const cisc::upsample::Plan& p, int64_t bytes, const cisc::Work& work) {
  py::dict tile;
  tile["label_columns"] = p.columns;
  tile["label_rows"] = cisc::upsample::kChunk;
  tile["feature_rows"] = p.rows;
  tile["tasks"] = p.tasks;
  return described(tile, bytes, work);
}

// Forward of cross_similarity on a GPU with byte labels: packed rows, and the rest of the workspace.
py::dict plan_on_gpu(const Shapes& shapes, const std::string& dtype, int chip, const std::string& reduction,
                     int64_t k, bool indexed, bool rounded) {
  namespace ns = cisc::cross_similarity;
  const std::string op = "cross_similarity";
  const Shape &query = shape_of(op, shapes, "query", 4), &guide = shape_of(op, shapes, "guide", 4);
  const bool own = shapes.count("classes") == 0;
  const int64_t slots = own ? 1 : shape_of(op, shapes, "classes", 2)[1];
  ns::Reduction by{};
  if (k < 1) throw std::invalid_argument("plan: k must be at least 1");
  if (!ns::find_reduction(reduction, &by) || by == ns::Reduction::mean) {
    throw std::invalid_argument("plan: reduction must be max, topk or softmax on a GPU, got " + reduction);
  }
  const int64_t n = query[2] * query[3], m = guide[2] * guide[3];
  const ns::Form form = dtype != "float32" ? ns::Form::exact : rounded ? ns::Form::rounded : ns::Form::split;
  const int64_t winners = std::max<int64_t>(std::min(k, m), 1);
  const auto p = ns::GpuPlan::of(chip, query[0], query[1], n, m, slots, own, form, by, winners, indexed);
  py::dict tile;
  tile["query_pixels"] = p.cut.rows;
  tile["guide_pixels"] = p.cut.columns;
  tile["splits"] = p.splits;
  tile["images_at_once"] = p.images;
  const int64_t element = dtype == "float32" ? 4 : 2;
  cisc::Work work{};
  work.flops = 2 * query[0] * slots * query[1] * n * m;
  if (query[0] * slots * n > 0) {
    work.bytes = query[0] * (query[1] * (n + m) * element + ns::label_bytes(n, m, own) +
                             slots * n * ns::output_bytes(by, winners, indexed));
  }
  py::dict out = described(tile, p.packed_bytes + p.other_bytes, work);
  out["packed_bytes"] = p.packed_bytes;
  return out;
}

// One row per operator that has kernels here; `backward` is the gradient, made with the loss where there is
// one, `ohem` that hard pixels are searched for before; what comes behind is of cross_similarity.
py::dict plan(const std::string& op, const Shapes& shapes, const std::string& dtype,
              const std::string& device, bool backward, int64_t threads, bool ohem,
              const std::string& reduction, int64_t k, bool return_index, bool rounded) {
  const std::map<std::string, int> chips{{"sm_75", 75}, {"sm_80", 80}, {"sm_90a", 90}};
  const auto chip = chips.find(device);
  if (device != "cpu" && chip == chips.end()) {
    throw std::invalid_argument("plan: device must be cpu, sm_75, sm_80 or sm_90a, got " + device);
  }
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") {
    throw std::invalid_argument("plan: dtype must be float32, bfloat16 or float16, got " + dtype);
  }
  if (chip != chips.end()) {
    if (op != "cross_similarity" || backward) {
      throw std::invalid_argument("plan: of a GPU's kernels it knows cross_similarity's forward only");
    }
    return plan_on_gpu(shapes, dtype, chip->second, reduction, k, return_index, rounded);
  }
  if (threads < 1) throw std::invalid_argument("plan: threads must be at least 1");
  const int64_t bytes = dtype == "float32" ? 4 : 2;
  constexpr int64_t kLabelBytes = 1;  // uint8
  if (op == "rectified_cross_entropy") {
    namespace ns = cisc::rectified_cross_entropy;
    const Shape &logits = shape_of(op, shapes, "logits", 4), &labels = shape_of(op, shapes, "labels", 3);
    const auto grid = grid_of(logits, labels[1], labels[2], true);
    const bool maps = shapes.count("similarity") > 0;
    const auto map_grid = maps ? grid_of(shape_of(op, shapes, "similarity", 4), labels[1], labels[2], false)
                               : cisc::upsample::Grid{0, 1, 1, labels[1], labels[2], false};
    const auto p = ns::plan(grid, map_grid, logits[0], backward);
    return upsampling(
        p, ns::workspace_bytes(grid, map_grid, p, threads, ohem),
        ns::work(grid, map_grid, p, logits[0], bytes, kLabelBytes, bytes, backward, ohem ? ns::kPasses : 0));
  }
  if (op == "map_consistency") {
    namespace ns = cisc::map_consistency;
    const Shape &maps = shape_of(op, shapes, "similarity", 4), &labels = shape_of(op, shapes, "labels", 3);
    const auto grid = grid_of(maps, labels[1], labels[2], false);
    const auto p = ns::plan(grid, maps[0], backward);
    return upsampling(p, cisc::upsample::workspace_bytes(grid, p, threads, 0),
                      ns::work(grid, p, maps[0], bytes, kLabelBytes, backward));
  }
  if (op == "predict") {
    namespace ns = cisc::predict;
    const Shape &logits = shape_of(op, shapes, "logits", 4), &size = shape_of(op, shapes, "size", 2);
    const auto grid = grid_of(logits, size[0], size[1], true);
    const auto p = ns::plan(grid, logits[0]);
    const int64_t cells = ns::copies(grid.planes) * grid.planes * grid.planes;
    return upsampling(p, cisc::upsample::workspace_bytes(grid, p, threads, cells),
                      ns::work(grid, p, logits[0], bytes, kLabelBytes));
  }
  if (op == "prototype_similarity") {
    namespace ns = cisc::prototype_similarity;
    const Shape &query = shape_of(op, shapes, "query", 4),
                &prototypes = shape_of(op, shapes, "prototypes", 3);
    const int64_t pixels = query[2] * query[3];
    const auto p = ns::plan(query[0], query[1], pixels, prototypes[1], backward);
    py::dict tile;
    tile["pixels"] = p.tile;
    tile["task_pixels"] = p.pixels;
    tile["tasks"] = p.tasks;
    return described(tile, ns::workspace_bytes(p, query[1], prototypes[1], threads),
                     ns::work(query[0], query[1], pixels, prototypes[1], bytes, bytes, backward));
  }
  if (op == "masked_average_pool") {
    namespace ns = cisc::masked_average_pool;
    const Shape &features = shape_of(op, shapes, "features", 4), &labels = shape_of(op, shapes, "labels", 3);
    const int64_t slots = shape_of(op, shapes, "classes", 2)[1];
    if (slots > ns::kMaxClasses) throw std::invalid_argument("plan: at most 65536 classes");
    const auto p = ns::plan(features[1], features[2], features[3], slots);
    py::dict tile;
    tile["feature_rows"] = p.rows;
    tile["feature_columns"] = p.columns;
    tile["channels"] = p.channels;
    return described(tile, ns::workspace_bytes(p, features[1], slots, threads),
                     ns::work(p, features[0], features[1], features[2], features[3], labels[1] * labels[2],
                              slots, bytes, kLabelBytes, backward));
  }
  if (op == "cross_similarity") {
    namespace ns = cisc::cross_similarity;
    const Shape &query = shape_of(op, shapes, "query", 4), &guide = shape_of(op, shapes, "guide", 4);
    const bool own = shapes.count("classes") == 0;
    const int64_t slots = own ? 1 : shape_of(op, shapes, "classes", 2)[1];
    if (k < 1) throw std::invalid_argument("plan: k must be at least 1");
    ns::Reduction by{};
    if (!ns::find_reduction(reduction, &by)) {
      throw std::invalid_argument("plan: reduction must be max, topk, softmax or mean, got " + reduction);
    }
    const int64_t pixels = guide[2] * guide[3];
    const ns::Problem problem{ns::shape_of(cisc::isa()),
                              query[1],
                              query[2] * query[3],
                              pixels,
                              slots,
                              std::max<int64_t>(std::min(k, pixels), 1),
                              by,
                              dtype == "bfloat16" && cisc::isa() == cisc::Isa::avx512_bf16};
    const ns::Plan p = problem.plan(true, backward, problem.reduction);
    cisc::Work work = ns::work(problem, bytes, bytes, own, return_index, backward);
    work.flops *= query[0];
    work.bytes *= query[0];
    py::dict tile;
    tile["query_pixels"] = p.shape.tile;
    tile["guide_pixels"] = p.shape.panel;
    tile["guide_pixels_at_hand"] = p.panels * p.shape.panel;
    tile["task_query_pixels"] = p.tiles * p.shape.tile;
    return described(tile, ns::workspace_bytes(problem, threads, backward), work);
  }
  throw std::invalid_argument("plan: there is no C++ kernel of " + op);
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "What was built, and the workspace that the built operators take.";
  m.attr("CUDA_CHIPS") = words(CISC_CUDA_CHIPS);
  m.def("info", &info, "Compilers, flags, instruction sets, CUDA chips, and what was left out and why.");
  m.def(
      "plan", &plan, py::arg("op"), py::arg("shapes"), py::arg("dtype") = "float32",
      py::arg("device") = "cpu", py::arg("backward") = false, py::arg("threads") = 1, py::arg("ohem") = false,
      py::arg("reduction") = "max", py::arg("k") = 8, py::arg("return_index") = false,
      py::arg("rounded") = false,
      "What the launcher of an operator does with arguments of these shapes (name: sizes): tile, workspace "
      "in bytes, FLOPs, bytes moved: inputs, with uint8 labels, as often as they are read, and results. On "
      "a GPU inputs are counted once, and packed_bytes are those of the workspace that hold the features as "
      "rows for tensor cores; rounded: of float32 these are rounded to float16, as at matmul precision "
      "'high' and 'medium'. ValueError for what has no kernel.");
}
