#include "kernels/cuda/sm90/kernels.h"

#include "kernels/cuda/common/head_dim.h"

namespace anchor_attention::sm90 {
namespace {

using cuda::KernelId;
using cuda::KernelKind;
using cuda::Precision;

template <class P, int kHeadDim>
const void* kernel_of_pass(const KernelId& kernel) {
  switch (kernel.kind) {
    case KernelKind::forward:
      return forward_kernel<P, kHeadDim>();
    case KernelKind::backward:
      return backward_kernel<P, kHeadDim, QueryGradient::accumulated>();
    case KernelKind::backward_key:
      return backward_kernel<P, kHeadDim, QueryGradient::none>();
    case KernelKind::query_gradient:
      return query_gradient_kernel<P, kHeadDim>();
    default:
      return nullptr;
  }
}

template <class P>
const void* kernel_of_head_dim(const KernelId& kernel) {
  return cuda::for_head_dim<32, 48, 64, 96, 128>(kernel.head_dim,
                                                 [&]<int kHeadDim>() { return kernel_of_pass<P, kHeadDim>(kernel); });
}

}  // namespace

const void* attention_kernel(const KernelId& kernel) {
  switch (kernel.precision) {
    case Precision::bfloat16:
      return kernel_of_head_dim<Bfloat16>(kernel);
    case Precision::float16:
      return kernel_of_head_dim<Float16>(kernel);
    default:
      return nullptr;
  }
}

}  // namespace anchor_attention::sm90
