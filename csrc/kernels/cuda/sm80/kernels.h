// Addresses of the attention kernels. Each is defined by one file of instantiations/.
#pragma once

#include "kernels/cuda/common/kernels.h"
#include "kernels/cuda/common/plan.h"
#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim>
const void* forward_kernel();

template <class P, int kHeadDim>
const void* backward_query_kernel();

template <class P, int kHeadDim, KeyGradients kGradients>
const void* backward_key_kernel();

// Null for what there is no kernel of.
const void* attention_kernel(const KernelId& kernel);

}  // namespace anchor_attention::sm80
