#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Float16, 64>();
}  // namespace anchor_attention::sm80
