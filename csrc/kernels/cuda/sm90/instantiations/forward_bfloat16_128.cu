#include "kernels/cuda/sm90/forward.cuh"

namespace anchor_attention::sm90 {
template const void* forward_kernel<Bfloat16, 128>();
}  // namespace anchor_attention::sm90
