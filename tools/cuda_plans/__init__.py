"""Runs the CUDA launch plans on the emulator: the plans that the library launches, and the PTX of its own kernels.

`attention_forward`, `attention_backward`, `attention_jvp`, `attention_double_backward`, `rope` and `rope_backward` take
and return NumPy arrays; bfloat16 travels as uint16 bit patterns.
"""

from tools.cuda_plans.build import plans
from tools.cuda_plans.run import (
    KernelRun,
    attention_backward,
    attention_double_backward,
    attention_forward,
    attention_jvp,
    rope,
    rope_backward,
)

__all__ = [
    "KernelRun",
    "attention_backward",
    "attention_double_backward",
    "attention_forward",
    "attention_jvp",
    "plans",
    "rope",
    "rope_backward",
]
