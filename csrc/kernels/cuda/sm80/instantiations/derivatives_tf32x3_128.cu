#include "kernels/cuda/sm80/double_backward_key.cuh"
#include "kernels/cuda/sm80/double_backward_query.cuh"
#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Tf32x3, 128>();
template const void* double_backward_query_kernel<Tf32x3, 128>();
template const void* double_backward_key_kernel<Tf32x3, 128, KeyGradients::key>();
template const void* double_backward_key_kernel<Tf32x3, 128, KeyGradients::value>();
}  // namespace anchor_attention::sm80
