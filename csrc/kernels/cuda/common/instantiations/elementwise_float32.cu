#include "kernels/cuda/common/elementwise.cuh"

namespace anchor_attention::cuda {
template const void* statistics_kernel<Tf32>();
template const void* rope_kernel<Tf32>();
template const void* rope_freqs_kernel<Tf32>();
}  // namespace anchor_attention::cuda
