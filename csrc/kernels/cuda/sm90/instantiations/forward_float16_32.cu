#include "kernels/cuda/sm90/forward.cuh"

namespace anchor_attention::sm90 {
template const void* forward_kernel<Float16, 32>();
}  // namespace anchor_attention::sm90
