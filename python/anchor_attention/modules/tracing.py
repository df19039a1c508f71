"""Whether a call is recorded, so that addresses and sizes seen now say nothing about later calls."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether a compiler, another tracer or a transform of ``torch.func`` sees the operations of this call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        # Private: torch has no public way to detect torch.jit.trace, make_fx, a fake tensor mode or vmap.
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
