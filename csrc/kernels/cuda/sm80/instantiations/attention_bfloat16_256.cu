#include "kernels/cuda/sm80/backward_key.cuh"
#include "kernels/cuda/sm80/backward_query.cuh"
#include "kernels/cuda/sm80/forward.cuh"

namespace anchor_attention::sm80 {
template const void* forward_kernel<Bfloat16, 256>();
template const void* backward_query_kernel<Bfloat16, 256>();
template const void* backward_key_kernel<Bfloat16, 256, KeyGradients::key>();
template const void* backward_key_kernel<Bfloat16, 256, KeyGradients::value>();
}  // namespace anchor_attention::sm80
