#include "kernels/cuda/sm80/kernels.h"

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
  switch (kernel.head_dim) {
    case 32:
      return kernel_of_pass<P, 32>(kernel);
    case 48:
      return kernel_of_pass<P, 48>(kernel);
    case 64:
      return kernel_of_pass<P, 64>(kernel);
    case 96:
      return kernel_of_pass<P, 96>(kernel);
    case 128:
      return kernel_of_pass<P, 128>(kernel);
    case 256:
      return kernel_of_pass<P, 256>(kernel);
    default:
      return nullptr;
  }
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
