// How the files of instantiations/ ask for the attention kernels: each function names one, which the compiler then
// makes. Nobody calls them: the host launches kernels by name, through the driver.
#pragma once

#include "kernels/cuda/common/launch_plan.h"
#include "kernels/cuda/common/shared_kernels.h"
#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

template <class P, int kHeadDim>
const void* forward_kernel();

template <class P, int kHeadDim>
const void* backward_query_kernel();

template <class P, int kHeadDim, KeyGradients kGradients>
const void* backward_key_kernel();

}  // namespace anchor_attention::sm80
