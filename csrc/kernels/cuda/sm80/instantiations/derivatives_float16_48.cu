#include "kernels/cuda/sm80/double_backward_key.cuh"
#include "kernels/cuda/sm80/double_backward_query.cuh"
#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Float16, 48>();
template const void* double_backward_query_kernel<Float16, 48>();
template const void* double_backward_key_kernel<Float16, 48, KeyGradients::both>();
}  // namespace anchor_attention::sm80
