"""Modules with the names, layers and calls of PhysicsNeMo's attention, written in plain PyTorch from its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class FLARE(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, n_global_queries: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.use_te = False
        self.heads, self.dim_head, self.scale = heads, dim_head, 1.0
        self.q_global = nn.Parameter(torch.randn(1, heads, n_global_queries, dim_head))
        self.in_project_x = nn.Linear(dim, heads * dim_head)
        self.self_k = nn.Linear(dim_head, dim_head)
        self.self_v = nn.Linear(dim_head, dim_head)
        self.out_linear = nn.Linear(heads * dim_head, dim)
        self.out_dropout = nn.Dropout(dropout)

    def tokens(self, x: Tensor) -> Tensor:
        return self.in_project_x(x).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)

    def through_latents(self, tokens: Tensor) -> Tensor:
        keys, values = self.self_k(tokens), self.self_v(tokens)
        latents = self.q_global.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1)
        gathered = scaled_dot_product_attention(latents, keys, values, scale=self.scale)
        return scaled_dot_product_attention(keys, latents, gathered, scale=self.scale)

    def output(self, heads: Tensor) -> Tensor:
        return self.out_dropout(self.out_linear(heads.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.through_latents(self.tokens(x)))


class GALE_FA(FLARE):
    def __init__(self, *args: Any, context_dim: int, state_mixing_mode: str = "weighted", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        d = self.dim_head
        self.cross_q, self.cross_k, self.cross_v = nn.Linear(d, d), nn.Linear(context_dim, d), nn.Linear(context_dim, d)
        self.state_mixing_mode = state_mixing_mode
        if state_mixing_mode == "weighted":
            self.state_mixing = nn.Parameter(torch.tensor(0.3))
        else:
            self.concat_project = nn.Sequential(nn.Linear(2 * d, d), nn.GELU())

    def mixed(self, passed: Tensor, read: Tensor) -> Tensor:
        if self.state_mixing_mode == "concat_project":
            return self.concat_project(torch.cat((passed, read), dim=-1))
        return torch.lerp(read, passed, torch.sigmoid(self.state_mixing))

    def forward(self, x: tuple[Tensor, ...], context: Tensor | None = None) -> list[Tensor]:
        outputs = []
        for stream in x:
            tokens = self.tokens(stream)
            passed = self.through_latents(tokens)
            if context is not None:
                keys, values = self.cross_k(context), self.cross_v(context)
                read = scaled_dot_product_attention(self.cross_q(tokens), keys, values, scale=self.scale)
                passed = self.mixed(passed, read)
            outputs.append(self.output(passed))
        return outputs


class PhysicsAttentionBase(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.slices = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.slices(x).softmax(dim=-1)
        return weights @ (weights.transpose(1, 2) @ x)
