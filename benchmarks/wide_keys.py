"""Attention whose queries and keys are wider than its values, against padding and PyTorch: equality and speed.

    python -m benchmarks.wide_keys

Coordinate channels widen queries and keys of 64 channels to 72. ``scaled_dot_product_attention`` is fast for equal
sizes alone, so values are padded with zeros and the result is cut. Writes raw JSON and a table to
``benchmarks/results/<device>/``. Outputs and gradients are compared in float32, relative to the largest value.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from anchor_attention import KeyRangeTable, anchor_attention

from .whole_models import command_line, compare, run

HEADS, HEAD_DIM, VALUE_DIM = 3, 72, 64
# Queries and keys.
SIZES = ((2048, 2048), (16384, 512), (512, 16384))


class Padded(nn.Module):
    """Values padded to the width of queries and keys, one call of ``scaled_dot_product_attention``, the result cut."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Nq, H, D), k (B, Nk, H, D), v (B, Nk, H, Dv) -> (B, Nq, H, Dv)."""
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, pad(v, (0, q.shape[3] - v.shape[3]))))
        return scaled_dot_product_attention(queries, keys, values).transpose(1, 2)[..., : v.shape[3]]


class Direct(nn.Module):
    """Values as they are."""

    def __init__(self, n_queries: int, n_keys: int) -> None:
        super().__init__()
        self.table = KeyRangeTable.from_ranges([[0, n_queries]], [[0, n_keys]])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As :meth:`Padded.forward`."""
        return anchor_attention(q, k, v, self.table)


def make_inputs(n_queries: int, n_keys: int) -> dict[str, Tensor]:
    """Random q, k and v whose mean is not zero, with gradients."""
    sizes = {"q": (n_queries, HEAD_DIM), "k": (n_keys, HEAD_DIM), "v": (n_keys, VALUE_DIM)}
    return {name: (torch.randn(1, n, HEADS, width) + 0.25).requires_grad_() for name, (n, width) in sizes.items()}


def outputs_of(result: Tensor) -> dict[str, Tensor]:
    """The output, by name."""
    return {"out": result}


def measure(n_queries: int, n_keys: int, rounds: int) -> dict[str, Any]:
    """The record of one pair of sizes."""
    name = f"{n_queries} queries, {n_keys} keys, D {HEAD_DIM}, Dv {VALUE_DIM}, {HEADS} heads"
    make = partial(make_inputs, n_queries, n_keys)
    return compare(name, Padded(), Direct(n_queries, n_keys), make, outputs_of, rounds)


def main() -> None:
    """Runs the cases and writes the results."""
    arguments = command_line(__doc__).parse_args()

    def record(sizes: tuple[int, int]) -> dict[str, Any]:
        torch.manual_seed(0)
        return measure(*sizes, arguments.rounds)

    run("wide_keys", arguments, map(record, SIZES))


if __name__ == "__main__":
    main()
