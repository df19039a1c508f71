#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Float16, 96>();
}  // namespace anchor_attention::sm80
