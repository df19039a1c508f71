#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Float16, 48>();
}  // namespace anchor_attention::sm80
