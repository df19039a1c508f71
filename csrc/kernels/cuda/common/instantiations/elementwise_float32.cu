#include "kernels/cuda/common/elementwise.cuh"
#include "kernels/cuda/common/merge.cuh"

namespace anchor_attention::cuda {
template const void* merge_kernel<Tf32>();
template const void* statistics_kernel<Tf32>();
template const void* rope_kernel<Tf32>();
template const void* rope_freqs_kernel<Tf32>();
}  // namespace anchor_attention::cuda
