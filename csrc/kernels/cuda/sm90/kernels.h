// Addresses of the sm_90a kernels. Each is defined by one file of instantiations/.
#pragma once

#include "kernels/cuda/common/kernels.h"
#include "kernels/cuda/common/plan.h"

namespace anchor_attention::sm90 {

using cuda::Bfloat16;
using cuda::Float16;

// Whether the backward adds up the gradient of the queries besides those of keys and values.
enum class QueryGradient : int32_t { none, accumulated };

template <class P, int kHeadDim>
const void* forward_kernel();

template <class P, int kHeadDim, QueryGradient kQueryGradient>
const void* backward_kernel();

template <class P, int kHeadDim>
const void* query_gradient_kernel();

// Null for what there is no kernel of.
const void* attention_kernel(const cuda::KernelId& kernel);

}  // namespace anchor_attention::sm90
