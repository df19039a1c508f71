"""FLARE attention, in which latents read the tokens and the tokens read the latents, with or without a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import anchor_attention
from ..modules.projection import project
from ..modules.steps import split_heads
from .fused_dense import dense_table
from .fused_forward import Arguments, FusedForward, arguments_of


class FlareForward(FusedForward):
    """Tokens to latents and back. Heads stay beside the head dimension, so that nothing is transposed or copied."""

    heads: int
    dim_head: int
    scale: float
    q_global: Tensor
    in_project_x: Any
    self_k: Any
    self_v: Any
    out_linear: Any
    out_dropout: Any

    def fused(self, arguments: Arguments) -> Any:
        """(B, N, dim) -> (B, N, dim)."""
        (x,) = arguments_of(arguments, "x")
        return self._output(self._through_latents(self._tokens(x))) if self._takes_local(x) else None

    def _takes_local(self, x: Any) -> bool:
        """Whether x is (B, N, dim) and no distributed tensor, which the original knows how to redistribute."""
        return self._takes(x) and not hasattr(x, "redistribute")

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, H, D)."""
        return split_heads(project(self.in_project_x, x), self.heads, self.dim_head)

    def _through_latents(self, tokens: Tensor) -> Tensor:
        """(B, N, H, D) -> (B, N, H, D)."""
        keys, values = project(self.self_k, tokens), project(self.self_v, tokens)
        latents = self.q_global.transpose(1, 2).to(keys.dtype).expand(keys.shape[0], -1, -1, -1)
        gathered = self._attend(latents, keys, values)
        return self._attend(keys, latents, gathered)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = anchor_attention(q, k, v, dense_table(q.shape[1], k.shape[1]), scale=self.scale)
        return attended

    def _output(self, attended: Tensor) -> Any:
        """(B, N, H, D) -> (B, N, dim)."""
        return self.out_dropout(project(self.out_linear, attended.flatten(2)))


class ContextFlareForward(FlareForward):
    """The same for several streams of tokens, which also read a context; learnt weights mix what they read."""

    state_mixing_mode: str
    state_mixing: Tensor
    cross_q: Any
    cross_k: Any
    cross_v: Any
    concat_project: Any

    def fused(self, arguments: Arguments) -> Any:
        """Streams (B, N, dim) and a context (B, H, Nc, context dim) or ``None`` -> a list of (B, N, dim)."""
        streams, context = arguments_of(arguments, "x", "context")
        if not isinstance(streams, (tuple, list)) or not all(self._takes_local(x) for x in streams):
            return None
        if context is None:
            return [self._output(self._through_latents(self._tokens(x))) for x in streams]
        if not all(self._fits_context(context, x) for x in streams):
            return None
        if self.state_mixing_mode not in ("weighted", "concat_project"):
            return None
        # From here on the heads of the context, too, stay beside the head dimension.
        k, v = (project(layer, context).transpose(1, 2) for layer in (self.cross_k, self.cross_v))
        outputs = []
        for x in streams:
            tokens = self._tokens(x)
            read = self._attend(project(self.cross_q, tokens), k, v)
            outputs.append(self._output(self._mixed(self._through_latents(tokens), read)))
        return outputs

    def _fits_context(self, context: Any, x: Tensor) -> bool:
        if not isinstance(context, Tensor) or hasattr(context, "redistribute") or context.dim() != 4:
            return False
        fits = context.shape[0] == x.shape[0] and context.shape[1] == self.heads
        return fits and context.device == x.device

    def _mixed(self, passed: Tensor, read: Tensor) -> Any:
        if self.state_mixing_mode == "concat_project":
            return self.concat_project(torch.cat((passed, read), dim=-1))
        share = torch.sigmoid(self.state_mixing)
        return share * passed + (1 - share) * read
