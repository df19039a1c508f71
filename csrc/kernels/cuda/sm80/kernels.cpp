#include "kernels/cuda/sm80/kernels.h"

#include "kernels/cuda/common/head_dim.h"

namespace anchor_attention::sm80 {
namespace {

template <class P, int kHeadDim>
const void* kernel_of_pass(const KernelId& kernel) {
  if (kernel.kind == KernelKind::forward) return forward_kernel<P, kHeadDim>();
  if (kernel.kind == KernelKind::backward_query) return backward_query_kernel<P, kHeadDim>();
  if constexpr (kHeadDim <= kWidestHeadOfBothGradients) {
    return backward_key_kernel<P, kHeadDim, KeyGradients::both>();
  } else {
    return kernel.gradients == KeyGradients::key ? backward_key_kernel<P, kHeadDim, KeyGradients::key>()
                                                 : backward_key_kernel<P, kHeadDim, KeyGradients::value>();
  }
}

template <class P>
const void* kernel_of_head_dim(const KernelId& kernel) {
  return cuda::for_head_dim<32, 48, 64, 96, 128, 256>(
      kernel.head_dim, [&]<int kHeadDim>() { return kernel_of_pass<P, kHeadDim>(kernel); });
}

}  // namespace

const void* attention_kernel(const KernelId& kernel) {
  switch (kernel.precision) {
    case Precision::bfloat16:
      return kernel_of_head_dim<Bfloat16>(kernel);
    case Precision::float16:
      return kernel_of_head_dim<Float16>(kernel);
    case Precision::tf32:
      return kernel_of_head_dim<Tf32>(kernel);
    default:
      return kernel_of_head_dim<Tf32x3>(kernel);
  }
}

}  // namespace anchor_attention::sm80
