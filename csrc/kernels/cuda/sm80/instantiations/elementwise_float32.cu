#include "kernels/cuda/sm80/elementwise.cuh"

namespace anchor_attention::sm80 {
template const void* statistics_kernel<Tf32>();
template const void* rope_kernel<Tf32>();
template const void* rope_freqs_kernel<Tf32>();
}  // namespace anchor_attention::sm80
