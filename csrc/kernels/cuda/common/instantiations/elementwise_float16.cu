#include "kernels/cuda/common/elementwise.cuh"

namespace anchor_attention::cuda {
template const void* statistics_kernel<Float16>();
template const void* rope_kernel<Float16>();
template const void* rope_freqs_kernel<Float16>();
}  // namespace anchor_attention::cuda
