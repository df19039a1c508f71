#include "kernels/cuda/sm80/backward_key.cuh"
#include "kernels/cuda/sm80/backward_query.cuh"
#include "kernels/cuda/sm80/forward.cuh"

namespace anchor_attention::sm80 {
template const void* forward_kernel<Tf32x3, 128>();
template const void* backward_query_kernel<Tf32x3, 128>();
template const void* backward_key_kernel<Tf32x3, 128, KeyGradients::both>();
}  // namespace anchor_attention::sm80
