#include "kernels/cuda/sm80/elementwise.cuh"

namespace anchor_attention::sm80 {
template const void* statistics_kernel<Bfloat16>();
template const void* rope_kernel<Bfloat16>();
template const void* rope_freqs_kernel<Bfloat16>();
}  // namespace anchor_attention::sm80
