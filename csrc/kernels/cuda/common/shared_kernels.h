// With these the files of instantiations/ instantiate the memory-bound kernels: a function that names a kernel makes
// the compiler generate it. The functions are never called: the host launches kernels by name, through the driver.
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
