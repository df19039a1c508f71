// torch's thread pool behind the interface of the CPU kernels.
#pragma once

#include "../kernels/cpu/attention.h"

namespace anchor_attention {

cpu::Executor torch_executor();

}  // namespace anchor_attention
