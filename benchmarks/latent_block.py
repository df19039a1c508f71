"""A transformer block with ``LatentAttention`` against the same block in plain PyTorch: equality and speed.

    python -m benchmarks.latent_block

Both have the same parameters; plain PyTorch computes the attention by two calls of ``scaled_dot_product_attention``, as
implementations of FLARE do. Writes raw JSON and a table to ``benchmarks/results/<device>/``. Outputs and gradients are
compared in float32, relative to the largest value of their layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from anchor_attention import LatentAttention

from .whole_models import command_line, compare, run


@dataclass(frozen=True)
class Case:
    """Sizes of a block and its input."""

    tokens: int
    latents: int
    dim: int = 192
    heads: int = 3

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.tokens} tokens, {self.latents} latents, {self.dim}/{self.heads}"


CASES = (Case(16384, 64), Case(16384, 512), Case(16384, 64, dim=256, heads=8), Case(131072, 64))


class PlainLatentAttention(LatentAttention):
    """The same module, computed by plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, hidden_dim) -> (B, N, hidden_dim)."""
        heads = (self.num_heads, self.head_dim)
        keys, values = (layer(x).unflatten(-1, heads).transpose(1, 2) for layer in (self.k, self.v))
        latents = self.latents.transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        gathered = scaled_dot_product_attention(latents, keys, values, scale=self.scale)
        read = scaled_dot_product_attention(keys, latents, gathered, scale=self.scale)
        return self.proj(read.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Norm, attention, norm, two layers, with residuals."""

    def __init__(self, case: Case, attention: type[LatentAttention]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(case.dim)
        self.attention = attention(dim=case.dim, num_heads=case.heads, num_latents=case.latents)
        self.mlp = nn.Sequential(
            nn.LayerNorm(case.dim), nn.Linear(case.dim, 4 * case.dim), nn.GELU(), nn.Linear(4 * case.dim, case.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


def build_blocks(case: Case) -> tuple[Block, Block]:
    """The block in plain PyTorch and ours, with the same random parameters, under which scores are of order one."""
    plain, ours = Block(case, PlainLatentAttention), Block(case, LatentAttention)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.normal_(plain.attention.latents, std=plain.attention.head_dim**-0.5)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Random tokens whose mean is not zero."""
    return {"x": torch.randn(1, case.tokens, case.dim) + 0.25}


def outputs_of(result: Tensor) -> dict[str, Tensor]:
    """The tokens, by name."""
    return {"tokens": result}


def main() -> None:
    """Runs the cases and writes the results."""
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, help="at most so many tokens, for a trial")
    arguments = parser.parse_args()

    def record(case: Case) -> dict[str, Any]:
        case = Case(min(case.tokens, arguments.tokens or case.tokens), case.latents, case.dim, case.heads)
        torch.manual_seed(0)
        plain, ours = build_blocks(case)
        return compare(case.name, plain, ours, partial(make_inputs, case), outputs_of, arguments.rounds)

    run("latent_block", arguments, map(record, CASES))


if __name__ == "__main__":
    main()
