#include "kernels/cuda/sm80/jvp.cuh"

namespace anchor_attention::sm80 {
template const void* jvp_kernel<Tf32x3, 256>();
}  // namespace anchor_attention::sm80
