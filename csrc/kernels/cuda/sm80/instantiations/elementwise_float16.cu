#include "kernels/cuda/sm80/elementwise.cuh"

namespace anchor_attention::sm80 {
template const void* statistics_kernel<Float16>();
template const void* rope_kernel<Float16>();
template const void* rope_freqs_kernel<Float16>();
}  // namespace anchor_attention::sm80
