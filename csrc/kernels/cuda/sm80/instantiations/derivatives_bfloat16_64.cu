#include "kernels/cuda/sm80/double_backward_key.cuh"
#include "kernels/cuda/sm80/double_backward_query.cuh"
#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Bfloat16, 64>();
template const void* double_backward_query_kernel<Bfloat16, 64>();
template const void* double_backward_key_kernel<Bfloat16, 64, KeyGradients::both>();
}  // namespace anchor_attention::sm80
