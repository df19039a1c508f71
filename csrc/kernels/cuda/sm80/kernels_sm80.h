// With these the files of instantiations/ instantiate the attention kernels: a function that names a kernel makes the
// compiler generate it. The functions are never called: the host launches kernels by name, through the driver.
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

template <class P, int kHeadDim>
const void* jvp_kernel();

template <class P, int kHeadDim>
const void* double_backward_query_kernel();

template <class P, int kHeadDim, KeyGradients kGradients>
const void* double_backward_key_kernel();

}  // namespace anchor_attention::sm80
