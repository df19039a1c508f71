"""Inputs for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from anchor_attention import KeyRangeTable

COMPLEX = {torch.float64: torch.complex128}
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 72, 96, 128)


@dataclass
class AttentionInputs:
    """Arguments of one call, with what is needed to call it again in another dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: KeyRangeTable
    grad_out: torch.Tensor
    q_freqs: torch.Tensor | None = None
    k_freqs: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    scale: float | None = None
    names: tuple[str, ...] = field(default=("q", "k", "v", "q_freqs", "k_freqs"), repr=False)

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        def freqs(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().to(COMPLEX.get(dtype, torch.complex64))

        return AttentionInputs(
            *(tensor.detach().to(dtype) for tensor in (self.q, self.k, self.v)),
            self.table,
            self.grad_out.to(dtype),
            freqs(self.q_freqs),
            freqs(self.k_freqs),
            self.key_mask,
            self.scale,
        )

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The tensors that take gradients, by name; they require them from now on."""
        tensors = {name: getattr(self, name) for name in self.names}
        return {name: tensor.requires_grad_() for name, tensor in tensors.items() if tensor is not None}

    def keywords(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("q_freqs", "k_freqs", "key_mask", "scale")}


def unit_freqs(batch: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rotary factors of modulus 1 and random angle, (batch, tokens, head_dim / 2)."""
    angle = 6.3 * torch.rand(batch, tokens, head_dim // 2, dtype=torch.float64)
    freqs = torch.polar(torch.ones_like(angle), angle)
    return freqs.to(COMPLEX.get(dtype, torch.complex64))


def strided(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Random (batch, tokens, heads, head_dim) with a mean that is not 0, in one of several memory layouts."""
    if layout == "packed":
        packed = torch.randn(batch, tokens, 3, heads, head_dim) + 0.1
        return packed.to(dtype)[:, :, 1]
    if layout == "head_major":
        return (torch.randn(batch, heads, tokens, head_dim) + 0.1).to(dtype).transpose(1, 2)
    if layout == "offset":
        return (torch.randn(batch, tokens + 1, heads, head_dim + 3) + 0.1).to(dtype)[:, 1:, :, 3:]
    if layout == "expanded":
        return (torch.randn(1, tokens, heads, head_dim) + 0.1).to(dtype).expand(batch, -1, -1, -1)
    return (torch.randn(batch, tokens, heads, head_dim) + 0.1).to(dtype)


LAYOUTS = ("contiguous", "packed", "head_major", "offset", "expanded")


@st.composite
def tables(draw: st.DrawFn, n_queries: int, n_keys: int) -> KeyRangeTable:
    """Tables with gaps between groups, groups without keys, and empty, repeated, touching and overlapping ranges."""
    cuts = sorted(draw(st.lists(st.integers(0, n_queries), max_size=8)))
    key = st.integers(0, n_keys)
    ranges = st.lists(st.tuples(key, key).map(sorted), max_size=4)
    q_ranges: list[int] = []
    k_offsets = [0]
    k_ranges: list[int] = []
    for begin, end in zip(cuts[::2], cuts[1::2], strict=False):
        q_ranges += [begin, end]
        chosen = draw(ranges)
        if chosen and draw(st.booleans()):
            chosen.append(chosen[0])
        for key_range in chosen:
            k_ranges += key_range
        k_offsets.append(len(k_ranges) // 2)
    return KeyRangeTable(q_ranges, k_offsets, k_ranges)


@st.composite
def attention_inputs(
    draw: st.DrawFn, dtype: torch.dtype = torch.float32, any_value_dim: bool = True
) -> AttentionInputs:
    """Calls of every shape: odd sizes, zero sizes, strides, masks, rotation of either side.

    Keys may have fewer heads than queries, and values heads of another size: of multiples of 8, without
    ``any_value_dim``.
    """
    batch = draw(st.sampled_from([1, 1, 2, 3, 0]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    value_dim = draw(st.sampled_from([head_dim, head_dim, *((1, 33) if any_value_dim else ()), *HEAD_DIMS]))
    n_queries = draw(st.sampled_from([0, 1, 5, 31, 64, 65, 130, 200]))
    n_keys = draw(st.sampled_from([0, 1, 7, 63, 64, 65, 129, 190]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(LAYOUTS))
    q, k, v, grad_out = (
        strided(batch, tokens, n_heads, size, dtype, layout)
        for tokens, n_heads, size in (
            (n_queries, heads, head_dim),
            (n_keys, kv_heads, head_dim),
            (n_keys, kv_heads, value_dim),
            (n_queries, heads, value_dim),
        )
    )
    inputs = AttentionInputs(q, k, v, draw(tables(n_queries, n_keys)), grad_out)
    if draw(st.booleans()):
        inputs.q_freqs = unit_freqs(draw(st.sampled_from([1, batch])), n_queries, head_dim, dtype)
    if draw(st.booleans()):
        inputs.k_freqs = unit_freqs(draw(st.sampled_from([1, batch])), n_keys, head_dim, dtype)
    if draw(st.booleans()):
        inputs.key_mask = torch.rand(batch, n_keys) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    if draw(st.booleans()):
        inputs.scale = draw(st.sampled_from([0.0, 0.3, -0.2, 2.0]))
    return inputs
