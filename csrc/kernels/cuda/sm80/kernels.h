// Addresses of the kernels. Each is defined by one file of instantiations/.
#pragma once

#include "kernels/cuda/sm80/config.h"

namespace anchor_attention::sm80 {

struct Bfloat16;
struct Float16;
struct Tf32;
struct Tf32x3;

template <class P, int kHeadDim>
const void* forward_kernel();

template <class P, int kHeadDim>
const void* backward_query_kernel();

template <class P, int kHeadDim, KeyGradients kGradients>
const void* backward_key_kernel();

template <class P>
const void* statistics_kernel();

template <class P>
const void* rope_kernel();

template <class P>
const void* rope_freqs_kernel();

const void* upload_kernel();

}  // namespace anchor_attention::sm80
