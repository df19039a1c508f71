// Launch plans for Python: device pointers arrive as integers, kernel arguments leave as bytes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/plan_attention.h"
#include "kernels/cuda/sm80/config.h"
#include "kernels/cuda/sm90/backward_schedule.h"
#include "kernels/cuda/sm90/config.h"
#include "key_ranges.h"

namespace py = pybind11;
namespace aa = anchor_attention;

namespace {

template <class T>
T field(const py::dict& fields, const char* name, T absent) {
  return fields.contains(name) ? fields[name].cast<T>() : absent;
}

template <class T = void>
T* pointer(const py::dict& fields, const char* name) {
  return reinterpret_cast<T*>(field<uintptr_t>(fields, name, 0));
}

aa::Strides strides(const py::dict& fields, const char* name) {
  const auto values = field<std::array<int64_t, 3>>(fields, name, {0, 0, 0});
  return {values[0], values[1], values[2]};
}

aa::FreqsStrides freqs_strides(const py::dict& fields, const char* name) {
  const auto values = field<std::array<int64_t, 2>>(fields, name, {0, 0});
  return {values[0], values[1]};
}

aa::ScalarType scalar_type(const py::dict& fields) {
  const auto name = fields["dtype"].cast<std::string>();
  if (name == "bfloat16") return aa::ScalarType::bfloat16;
  if (name == "float16") return aa::ScalarType::float16;
  return name == "float64" ? aa::ScalarType::float64 : aa::ScalarType::float32;
}

aa::KeyRangeTable table_of(const py::dict& fields) {
  using Words = std::vector<int64_t>;
  return aa::make_key_range_table(fields["q_ranges"].cast<Words>(), fields["k_offsets"].cast<Words>(),
                                  fields["k_ranges"].cast<Words>(), fields["n_queries"].cast<int64_t>(),
                                  fields["n_keys"].cast<int64_t>());
}

aa::AttentionParams attention_params(const py::dict& fields, const aa::KeyRangeTable& table) {
  aa::AttentionParams p{};
  p.q = pointer(fields, "q");
  p.k = pointer(fields, "k");
  p.v = pointer(fields, "v");
  p.q_freqs = pointer(fields, "q_freqs");
  p.key_mask = pointer<const bool>(fields, "key_mask");
  p.out = pointer(fields, "out");
  p.lse = pointer(fields, "lse");
  p.q_strides = strides(fields, "q_strides");
  p.k_strides = strides(fields, "k_strides");
  p.v_strides = strides(fields, "v_strides");
  p.q_freqs_strides = freqs_strides(fields, "q_freqs_strides");
  p.key_mask_batch_stride = field<int64_t>(fields, "key_mask_batch_stride", 0);
  p.batch = fields["batch"].cast<int64_t>();
  p.n_queries = fields["n_queries"].cast<int64_t>();
  p.n_keys = fields["n_keys"].cast<int64_t>();
  p.heads = fields["heads"].cast<int64_t>();
  p.kv_heads = field<int64_t>(fields, "kv_heads", p.heads);
  p.head_dim = fields["head_dim"].cast<int64_t>();
  p.value_dim = field<int64_t>(fields, "value_dim", p.head_dim);
  p.scale = fields["scale"].cast<double>();
  p.dtype = scalar_type(fields);
  p.table = table.view();
  return p;
}

aa::cuda::PlanOptions options(const py::dict& fields) {
  const bool hopper = field<std::string>(fields, "generation", "sm80") == "sm90";
  return {field<int>(fields, "multiprocessors", 132), field<bool>(fields, "allow_tf32", false),
          hopper ? aa::cuda::Generation::sm90 : aa::cuda::Generation::sm80,
          field<bool>(fields, "avoid_tile_of_48", false)};
}

// (offset in the parameters, arguments of the encoder) of each tensor map; enumerators by their values in cuda.h.
py::list tensor_maps(const aa::cuda::LaunchPlan& launch) {
  static constexpr int kTypes[] = {9, 6, 7};  // bfloat16, float16, float32
  py::list maps;
  for (const aa::TensorMapPlan& map : launch.tensor_maps) {
    py::dict arguments;
    arguments["data_type"] = kTypes[static_cast<int>(map.type)];
    arguments["rank"] = map.sizes.size();
    arguments["address"] = reinterpret_cast<uintptr_t>(map.address);
    arguments["dims"] = map.sizes;
    arguments["strides"] = map.strides;
    arguments["box"] = map.box_sizes;
    arguments["element_strides"] = std::array<int, 4>{1, 1, 1, 1};
    arguments["swizzle"] = static_cast<int>(map.swizzle);
    maps.append(py::make_tuple(map.params_offset, arguments));
  }
  return maps;
}

aa::RopeParams rope_params(const py::dict& fields) {
  aa::RopeParams p{};
  p.x = pointer(fields, "x");
  p.freqs = pointer(fields, "freqs");
  p.out = pointer(fields, "out");
  p.x_strides = strides(fields, "x_strides");
  p.freqs_strides = freqs_strides(fields, "freqs_strides");
  p.batch = fields["batch"].cast<int64_t>();
  p.tokens = fields["tokens"].cast<int64_t>();
  p.heads = fields["heads"].cast<int64_t>();
  p.head_dim = fields["head_dim"].cast<int64_t>();
  p.dtype = scalar_type(fields);
  return p;
}

// A plan for the given workspace; with `placed_later` one that was made without and then got it.
aa::cuda::Plan planned(const py::dict& fields, const auto& plan_with) {
  void* workspace = pointer(fields, "workspace");
  if (!field(fields, "placed_later", false)) return plan_with(workspace);
  aa::cuda::Plan plan = plan_with(aa::cuda::kNoWorkspaceYet);
  aa::cuda::place_workspace(plan, workspace);
  return plan;
}

aa::cuda::Plan plan_attention_forward(const py::dict& fields) {
  const aa::KeyRangeTable table = table_of(fields);
  return planned(fields, [&](void* workspace) {
    return aa::cuda::plan_attention_forward(attention_params(fields, table), options(fields), workspace);
  });
}

aa::AttentionBackwardParams backward_params(const py::dict& fields, const aa::KeyRangeTable& table) {
  aa::AttentionBackwardParams p{};
  p.forward = attention_params(fields, table);
  p.grad_out = pointer(fields, "grad_out");
  p.grad_out_strides = strides(fields, "grad_out_strides");
  p.grad_lse = pointer(fields, "grad_lse");
  p.grad_q = pointer(fields, "grad_q");
  p.grad_k = pointer(fields, "grad_k");
  p.grad_v = pointer(fields, "grad_v");
  p.grad_q_freqs = pointer(fields, "grad_q_freqs");
  return p;
}

aa::cuda::Plan plan_attention_backward(const py::dict& fields) {
  const aa::KeyRangeTable table = table_of(fields);
  const aa::AttentionBackwardParams p = backward_params(fields, table);
  return planned(fields,
                 [&](void* workspace) { return aa::cuda::plan_attention_backward(p, options(fields), workspace); });
}

aa::Tangents tangents(const py::dict& fields, const char* name) {
  if (!fields.contains(name)) return {};
  const auto values = fields[name].cast<py::dict>();
  return {pointer(values, "data"), field<int64_t>(values, "stride", 0), strides(values, "strides")};
}

aa::cuda::Plan plan_attention_jvp(const py::dict& fields) {
  const aa::KeyRangeTable table = table_of(fields);
  aa::AttentionJvpParams p{};
  p.forward = attention_params(fields, table);
  p.knows_value = field(fields, "knows_value", false);
  p.n_tangents = field<int64_t>(fields, "n_tangents", 1);
  p.q_tangents = tangents(fields, "q_tangents");
  p.k_tangents = tangents(fields, "k_tangents");
  p.v_tangents = tangents(fields, "v_tangents");
  p.out_tangents = pointer(fields, "out_tangents");
  p.lse_tangents = pointer(fields, "lse_tangents");
  return planned(fields, [&](void* workspace) { return aa::cuda::plan_attention_jvp(p, options(fields), workspace); });
}

aa::cuda::Plan plan_attention_double_backward(const py::dict& fields) {
  const aa::KeyRangeTable table = table_of(fields);
  aa::AttentionDoubleBackwardParams p{};
  p.backward = backward_params(fields, table);
  p.q_tangent = tangents(fields, "q_tangent");
  p.k_tangent = tangents(fields, "k_tangent");
  p.v_tangent = tangents(fields, "v_tangent");
  p.out_tangent = pointer(fields, "out_tangent");
  p.lse_tangent = pointer(fields, "lse_tangent");
  return planned(fields, [&](void* workspace) { return aa::cuda::plan_attention_double_backward(p, workspace); });
}

// Words and sizes of a schedule of the sm_90 backward.
py::dict backward_schedule(const py::dict& fields, int queries_per_tile, int64_t items, int64_t heads_per_kv_head,
                           int64_t sum_bytes, int64_t concurrent_tiles) {
  const aa::KeyRangeTable table = table_of(fields);
  const aa::sm90::BackwardSchedule schedule = aa::sm90::make_backward_schedule(
      table.view(), fields["n_queries"].cast<int64_t>(), fields["n_keys"].cast<int64_t>(), queries_per_tile, items,
      heads_per_kv_head, {sum_bytes, concurrent_tiles});
  py::dict result;
  result["keys"] = schedule.keys.words;
  result["queries"] = schedule.queries.words;
  result["n_key_groups"] = schedule.keys.n_groups;
  result["n_query_groups"] = schedule.queries.n_groups;
  result["n_ranges"] = schedule.n_ranges;
  result["n_sums"] = schedule.n_sums;
  result["turns_per_sum"] = schedule.turns_per_sum;
  return result;
}

aa::cuda::Plan plan_rope(const py::dict& fields) { return aa::cuda::plan_rope(rope_params(fields)); }

aa::cuda::Plan plan_rope_backward(const py::dict& fields) {
  aa::RopeBackwardParams p{};
  p.forward = rope_params(fields);
  p.grad_out = pointer(fields, "grad_out");
  p.grad_out_strides = strides(fields, "grad_out_strides");
  p.grad_x = pointer(fields, "grad_x");
  p.grad_freqs = pointer(fields, "grad_freqs");
  return aa::cuda::plan_rope_backward(p);
}

}  // namespace

PYBIND11_MODULE(CUDA_PLANS_MODULE, module) {
  using aa::cuda::LaunchPlan;
  using aa::cuda::Plan;
  py::class_<LaunchPlan>(module, "LaunchPlan")
      .def_property_readonly("name", [](const LaunchPlan& launch) { return launch.kernel.name(); })
      .def_readonly("grid", &LaunchPlan::grid)
      .def_readonly("block", &LaunchPlan::block)
      .def_readonly("shared_bytes", &LaunchPlan::shared_bytes)
      .def_property_readonly("tensor_maps", &tensor_maps)
      .def_property_readonly("params", [](const LaunchPlan& launch) {
        return py::bytes(reinterpret_cast<const char*>(launch.params.data()), launch.params.size());
      });
  py::class_<Plan>(module, "Plan")
      .def_readonly("launches", &Plan::launches)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes);
  module.def("generation_of", [](int major, const std::optional<std::string>& pinned) {
    const auto generation = aa::cuda::generation_of(major, pinned ? pinned->c_str() : nullptr);
    return generation == aa::cuda::Generation::sm90 ? "sm90" : "sm80";
  });
  module.def("plan_attention_forward", &plan_attention_forward);
  module.def("plan_attention_backward", &plan_attention_backward);
  module.def("plan_attention_jvp", &plan_attention_jvp);
  module.def("plan_attention_double_backward", &plan_attention_double_backward);
  module.def("backward_schedule", &backward_schedule, py::arg("fields"), py::arg("queries_per_tile"), py::arg("items"),
             py::arg("heads_per_kv_head") = 1, py::arg("sum_bytes") = int64_t{1} << 40,
             py::arg("concurrent_tiles") = 1);
  module.def("plan_rope", &plan_rope);
  module.def("plan_rope_backward", &plan_rope_backward);
  module.def("shared_bytes", [](int pass, int precision, int head_dim) {
    return aa::sm80::shared_bytes(static_cast<aa::sm80::Pass>(pass), static_cast<aa::sm80::Precision>(precision),
                                  head_dim);
  });
}
