#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Float16, 256>();
}  // namespace anchor_attention::sm80
