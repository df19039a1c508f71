// Every operation and its implementations: the library's table of contents.
#include <torch/csrc/stable/library.h>

#include "host/attention_op.h"
#include "host/backends.h"
#include "host/canonical_key_ranges.h"
#include "host/derivatives.h"
#include "host/rope_op.h"

using namespace anchor_attention;

STABLE_TORCH_LIBRARY(anchor_attention, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, SymInt[] q_ranges, SymInt[] k_offsets, SymInt[] k_ranges, "
      "Tensor? q_freqs=None, Tensor? key_mask=None, float? scale=None, bool allow_tf32=False) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "SymInt[] q_ranges, SymInt[] k_offsets, SymInt[] k_ranges, Tensor? q_freqs, Tensor? key_mask, float? scale, "
      "bool allow_tf32, bool need_q, bool need_k, bool need_v, bool need_q_freqs) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_freqs)");
  m.def(
      "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? lse, Tensor? q_tangents, Tensor? k_tangents, "
      "Tensor? v_tangents, SymInt[] q_ranges, SymInt[] k_offsets, SymInt[] k_ranges, Tensor? key_mask=None, "
      "float? scale=None) -> (Tensor out, Tensor lse, Tensor out_tangents, Tensor lse_tangents)");
  m.def(
      "attention_double_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, SymInt[] q_ranges, SymInt[] k_offsets, SymInt[] "
      "k_ranges, Tensor? key_mask, float? scale, bool need_q, bool need_k, bool need_v) "
      "-> (Tensor out_tangent, Tensor lse_tangent, Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("rope(Tensor x, Tensor freqs) -> Tensor");
  m.def(
      "rope_backward(Tensor grad_out, Tensor? x, Tensor freqs, bool need_x, bool need_freqs) "
      "-> (Tensor grad_x, Tensor grad_freqs)");
  m.def(
      "canonical_key_ranges(int[] q_ranges, int[] k_offsets, int[] k_ranges, int n_queries, int n_keys) "
      "-> (int[] q_ranges, int[] k_offsets, int[] k_ranges)");
  m.def("cpu_instruction_sets() -> (str selected, str runnable, str compiled)");
}

STABLE_TORCH_LIBRARY_IMPL(anchor_attention, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cpu>));
  m.impl("attention_jvp", TORCH_BOX(&attention_jvp<Cpu>));
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward<Cpu>));
  m.impl("rope", TORCH_BOX(&rope<Cpu>));
  m.impl("rope_backward", TORCH_BOX(&rope_backward<Cpu>));
}

#ifdef ANCHOR_ATTENTION_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(anchor_attention, CUDA, m) {
  m.impl("attention", TORCH_BOX(&attention<Cuda>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cuda>));
  m.impl("attention_jvp", TORCH_BOX(&attention_jvp<Cuda>));
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward<Cuda>));
  m.impl("rope", TORCH_BOX(&rope<Cuda>));
  m.impl("rope_backward", TORCH_BOX(&rope_backward<Cuda>));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(anchor_attention, CompositeExplicitAutograd, m) {
  m.impl("canonical_key_ranges", TORCH_BOX(&canonical_key_ranges));
  m.impl("cpu_instruction_sets", TORCH_BOX(&cpu_instruction_sets));
}
