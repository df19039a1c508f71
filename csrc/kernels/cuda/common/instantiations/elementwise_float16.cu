#include "kernels/cuda/common/elementwise.cuh"
#include "kernels/cuda/common/merge.cuh"

namespace anchor_attention::cuda {
template const void* merge_kernel<Float16>();
template const void* statistics_kernel<Float16>();
template const void* rope_kernel<Float16>();
template const void* rope_freqs_kernel<Float16>();
}  // namespace anchor_attention::cuda
