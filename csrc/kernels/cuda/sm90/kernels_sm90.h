// With these the files of instantiations/ instantiate the sm_90a kernels: a function that names a kernel makes the
// compiler generate it. The functions are never called: the host launches kernels by name, through the driver.
#pragma once

#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/common/shared_kernels.h"

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

}  // namespace anchor_attention::sm90
