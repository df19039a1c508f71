#include "kernels/cuda/sm90/backward.cuh"
#include "kernels/cuda/sm90/backward_query_gradient.cuh"

namespace anchor_attention::sm90 {
template const void* backward_kernel<Bfloat16, 48, QueryGradient::accumulated>();
template const void* backward_kernel<Bfloat16, 48, QueryGradient::none>();
template const void* query_gradient_kernel<Bfloat16, 48>();
}  // namespace anchor_attention::sm90
