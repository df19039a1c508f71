// Addresses of the memory-bound kernels. Each is defined by one file of instantiations/.
#pragma once

#include "kernels/cuda/common/config.h"

namespace anchor_attention::cuda {

struct Bfloat16;
struct Float16;
struct Tf32;
struct Tf32x3;

template <class P>
const void* statistics_kernel();

template <class P>
const void* rope_kernel();

template <class P>
const void* rope_freqs_kernel();

const void* upload_kernel();

}  // namespace anchor_attention::cuda
