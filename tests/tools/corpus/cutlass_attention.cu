// The attention of CUTLASS's example 88, for Hopper. What begins with CASE_ is defined on the command line: the type,
// extents of a tile, the fusion, which says what is masked, and the schedule.
#include <collective/fmha_fusion.hpp>
#include <kernel/fmha_kernel_builder.hpp>

#include "cutlass_launch.h"

namespace {

using Element = CASE_ELEMENT;
using PerHead = cute::tuple<int, int>;                // of the batch, then of heads
using Strides = cute::tuple<int, cute::_1, PerHead>;  // of tokens, channels, batch and heads
using Tile = cute::Shape<cute::Int<CASE_QUERIES>, cute::Int<CASE_KEYS>, cute::Int<CASE_CHANNELS>>;
using Attention = typename cutlass::fmha::kernel::FmhaBuilder<Element, float, float, Tile, Strides, Strides, Strides,
                                                              cutlass::fmha::collective::CASE_FUSION,
                                                              cutlass::gemm::CASE_SCHEDULE>::Kernel;

Strides packed(int heads, int tokens, int channels) {
  return {channels, cute::_1{}, PerHead{heads * tokens * channels, tokens * channels}};
}

}  // namespace

CUTLASS_KERNEL(attention, Attention)

// q, out (batch, heads, queries, channels); k, v (batch, heads, keys, channels); lse (batch, heads, queries).
// `blocks` of them run at a time.
extern "C" bool launch_attention(Launch* launch, int batch, int heads, int queries, int keys, int channels, int blocks,
                                 const Element* q, const Element* k, const Element* v, Element* out, float* lse) {
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = 0;
  hardware.sm_count = blocks;
  const Strides of_queries = packed(heads, queries, channels);
  const Strides of_keys = packed(heads, keys, channels);
  const typename Attention::Arguments arguments{cute::make_tuple(batch, heads, queries, keys, channels),
                                                {q, of_queries, k, of_keys, v, of_keys},
                                                {out, of_queries, lse, {cute::_1{}, PerHead{heads * queries, queries}}},
                                                hardware};
  return describe<Attention>(arguments, nullptr, launch);
}
