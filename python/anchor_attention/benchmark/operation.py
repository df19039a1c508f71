"""One call of the operation alone, forward or with its gradients, from strided q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .peers import Attention

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
# Products of the backward pass in units of the forward's two: scores again, and the gradients of P, q, k and v.
BACKWARD_FLOPS = 2.5


@dataclass(frozen=True)
class OperationInputs:
    """q (B, Nq, H, D), k and v (B, Nk, H, D): views of packed projections; grad_out (B, Nq, H, D), contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> OperationInputs:
        """The same values in another dtype."""
        return OperationInputs(*(tensor.to(dtype) for tensor in (self.q, self.k, self.v, self.grad_out)))


def make_operation_inputs(
    batch: int,
    n_queries: int,
    n_keys: int,
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> OperationInputs:
    """Random inputs whose mean is not zero, so that sums don't cancel where real ones would not."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) + 0.25).to(dtype)

    if n_queries == n_keys:
        q, k, v = normal(batch, n_queries, 3, heads, head_dim).unbind(2)
    else:
        q = normal(batch, n_queries, heads, head_dim)
        k, v = normal(batch, n_keys, 2, heads, head_dim).unbind(2)
    return OperationInputs(q, k, v, normal(batch, n_queries, heads, head_dim))


def operation_contestant(attention: Attention, passes: str) -> Callable[[OperationInputs], tuple[Tensor, ...]]:
    """The timed function: (out,) without autograd, or (out, grad_q, grad_k, grad_v) with newly allocated gradients.

    Raises:
        ValueError: If ``passes`` is not one of :data:`PASSES`.
    """
    if passes not in PASSES:
        raise ValueError(f"passes must be one of {PASSES}, got {passes!r}")

    def forward(inputs: OperationInputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attention(inputs.q, inputs.k, inputs.v),)

    def forward_backward(inputs: OperationInputs) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)]
        out = attention(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))

    return forward if passes == FORWARD else forward_backward


def attention_flops(scores: int, heads: int, head_dim: int, passes: str) -> float:
    """Floating-point operations of the matrix products for this many (query, key) pairs per head."""
    return 4.0 * scores * heads * head_dim * (1 + (BACKWARD_FLOPS if passes == FORWARD_BACKWARD else 0))
