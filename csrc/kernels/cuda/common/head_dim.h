// From a head size that is known when a plan runs to the kernel that was compiled for it.
#pragma once

namespace anchor_attention::cuda {

// `address.template operator()<N>()` for the one of kHeadDims that equals `head_dim`; null if none does.
template <int... kHeadDims, class Address>
const void* for_head_dim(int head_dim, const Address& address) {
  const void* kernel = nullptr;
  static_cast<void>(((head_dim == kHeadDims && (kernel = address.template operator()<kHeadDims>(), true)) || ...));
  return kernel;
}

}  // namespace anchor_attention::cuda
