"""Muon in float32: momentum whose update is made orthogonal, so that every direction of a matrix learns alike.

Method: K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024. PyTorch's own
``torch.optim.Muon`` orthogonalises in bfloat16, one matrix at a time. A processor without bfloat16 instructions spent
three quarters of a training step there; in float32, all matrices of one shape at once, it is a few percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic that pushes singular values towards 1 from the steepest start: p(s) = a s + b s³ + c s⁵.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """Returns (n, rows, columns) with the singular vectors of ``matrices`` and singular values between 0.7 and 1.2.

    Smaller ones than about 1e-3 of a matrix' norm stay below that.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Optimiser of weight matrices.

    Args:
        parameters: Matrices, (rows, columns) float32.
        lr: Learning rate; a step moves a matrix by about ``lr`` in spectral norm, times the root of rows / columns
            where it has more rows than columns.
        weight_decay: Decoupled weight decay.
        momentum: Of the running mean of gradients (Nesterov's form).

    Raises:
        ValueError: A parameter is not a matrix.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), matrices in by_shape.items():
                update = orthogonalized(torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(matrices, list(update.unbind()), alpha=-rate)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        """Takes the gradient into the running mean and returns the mean that looks one step ahead."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        gradient: Tensor = matrix.grad  # type: ignore[assignment]
        mean: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)
