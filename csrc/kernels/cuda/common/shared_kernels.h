// How the files of instantiations/ ask for the memory-bound kernels: each function names one, which the compiler then
// makes. Nobody calls them: the host launches kernels by name, through the driver.
#pragma once

#include "kernels/cuda/common/config.h"

namespace anchor_attention::cuda {

struct Bfloat16;
struct Float16;
struct Tf32;
struct Tf32x3;

template <class P>
const void* merge_kernel();

template <class P>
const void* statistics_kernel();

template <class P>
const void* rope_kernel();

template <class P>
const void* rope_freqs_kernel();

const void* upload_kernel();

}  // namespace anchor_attention::cuda
