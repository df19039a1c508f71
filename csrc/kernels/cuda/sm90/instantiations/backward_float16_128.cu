#include "kernels/cuda/sm90/backward.cuh"
#include "kernels/cuda/sm90/backward_query_gradient.cuh"

namespace anchor_attention::sm90 {
template const void* backward_kernel<Float16, 128, QueryGradient::accumulated>();
template const void* backward_kernel<Float16, 128, QueryGradient::none>();
template const void* query_gradient_kernel<Float16, 128>();
}  // namespace anchor_attention::sm90
