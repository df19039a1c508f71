"""The modules' work done with plain PyTorch, on the weights of the module that it is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from anchor_attention import MultiBranchAnchorAttention
from anchor_attention.benchmark.operation import FORWARD
from anchor_attention.benchmark.peers import OURS, attend_slices, select
from anchor_attention.key_range_table import Slice

from .inputs import ModuleInputs
from .workloads import Workload

ModulePeer = Callable[[MultiBranchAnchorAttention, Workload, str, ModuleInputs], Tensor]


def module_contestant(
    peer: str, module: MultiBranchAnchorAttention, workload: Workload, pattern: str, passes: str
) -> Callable[[ModuleInputs], tuple[Tensor, ...]]:
    """The timed function: (y,) without autograd, or y and fresh gradients of x and of every parameter."""
    call = MODULE_PEERS[peer]
    parameters = list(module.parameters())

    def forward(inputs: ModuleInputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call(module, workload, pattern, inputs),)

    def forward_backward(inputs: ModuleInputs) -> tuple[Tensor, ...]:
        x = inputs.x.detach().requires_grad_()
        y = call(module, workload, pattern, replace(inputs, x=x))
        return (y.detach(), *torch.autograd.grad(y, [x, *parameters], inputs.grad_out))

    return forward if passes == FORWARD else forward_backward


class _PatternTensors(NamedTuple):
    """Tensors of one pattern: q (B, H, tokens, D), k and v (B, H, keys, D), mask (B, 1, 1, keys)."""

    reading: tuple[str, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


def complex_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotates the interleaved pairs of x's last axis by complex factors that broadcast against them."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs).flatten(-2).to(x.dtype)


def anchor_attention_module(
    module: MultiBranchAnchorAttention, workload: Workload, pattern: str, inputs: ModuleInputs
) -> Tensor:
    """Ours."""
    return cast(
        "Tensor",
        module(
            inputs.x,
            workload.token_specs,
            inputs.freqs,
            key_padding_mask=inputs.key_padding_mask,
            kv_cache=inputs.kv_cache,
        ),
    )


def eager(module: MultiBranchAnchorAttention, workload: Workload, pattern: str, inputs: ModuleInputs) -> Tensor:
    """Step by step: keys and values of every token, each pattern's tokens concatenated, equal shapes batched."""
    mixed = module.mixed_attention
    present = [spec for spec in workload.token_specs if spec.size is not None]
    names, sizes = [spec.name for spec in present], [cast("int", spec.size) for spec in present]
    batch, n_tokens, dim = inputs.x.shape
    freqs = inputs.freqs[:, None]
    if inputs.kv_cache is None:
        qkv = linear(inputs.x, mixed.qkv.weight, mixed.qkv.bias)
        q, k, v = qkv.view(batch, n_tokens, 3, mixed.num_heads, mixed.head_dim).permute(2, 0, 3, 1, 4).unbind()
        keys = dict(zip(names, torch.split(complex_rope(k, freqs), sizes, dim=2), strict=True))
        values = dict(zip(names, torch.split(v, sizes, dim=2), strict=True))
    else:
        q = linear(inputs.x, mixed.qkv.weight[:dim], mixed.qkv.bias[:dim])
        q = q.view(batch, n_tokens, mixed.num_heads, mixed.head_dim).transpose(1, 2)
        keys = {name: entry["k"] for name, entry in inputs.kv_cache.items()}
        values = {name: entry["v"] for name, entry in inputs.kv_cache.items()}
    queries = dict(zip(names, torch.split(complex_rope(q, freqs), sizes, dim=2), strict=True))
    masks = {}
    if inputs.key_padding_mask is not None:
        masks = dict(zip(names, torch.split(inputs.key_padding_mask, sizes, dim=1), strict=True))

    by_shape: dict[tuple[int, int], list[_PatternTensors]] = {}
    for attention_pattern in workload.attention_patterns(pattern):
        reading, read = tuple(attention_pattern.query_tokens), attention_pattern.key_value_tokens
        tensors = _PatternTensors(
            reading,
            torch.cat([queries[name] for name in reading], dim=2),
            torch.cat([keys[name] for name in read], dim=2),
            torch.cat([values[name] for name in read], dim=2),
            torch.cat([masks[name] for name in read], dim=1)[:, None, None, :] if masks else None,
        )
        by_shape.setdefault((tensors.q.shape[2], tensors.k.shape[2]), []).append(tensors)
    outs: dict[str, Tensor] = {}
    for members in by_shape.values():
        out = scaled_dot_product_attention(
            torch.cat([member.q for member in members]),
            torch.cat([member.k for member in members]),
            torch.cat([member.v for member in members]),
            attn_mask=torch.cat([member.mask for member in members if member.mask is not None]) if masks else None,
        )
        for member, part in zip(members, out.chunk(len(members)), strict=True):
            group_sizes = [queries[name].shape[2] for name in member.reading]
            outs.update(zip(member.reading, torch.split(part, group_sizes, dim=2), strict=True))
    joined = torch.cat([outs[name] for name in names], dim=2)
    return linear(joined.transpose(1, 2).flatten(2), mixed.proj.weight, mixed.proj.bias)


def sdpa_per_pattern(
    module: MultiBranchAnchorAttention, workload: Workload, pattern: str, inputs: ModuleInputs
) -> Tensor:
    """The strong version: keys and values of the tokens that are read, one call per pattern on views."""
    mixed = module.mixed_attention
    batch, n_tokens, dim = inputs.x.shape
    heads = (mixed.num_heads, mixed.head_dim)
    freqs = inputs.freqs[:, :, None]
    names, table = workload.key_axis(pattern)
    slices = _runs([(spec.name in names, spec.size or 0) for spec in workload.token_specs])
    if slices == [(0, n_tokens)]:
        q, k, v = linear(inputs.x, mixed.qkv.weight, mixed.qkv.bias).view(batch, n_tokens, 3, *heads).unbind(2)
    else:
        q_weight, kv_weight = torch.split(mixed.qkv.weight, [dim, 2 * dim])
        q_bias, kv_bias = torch.split(mixed.qkv.bias, [dim, 2 * dim])
        q = linear(inputs.x, q_weight, q_bias).view(batch, n_tokens, *heads)
        if inputs.kv_cache is None:
            k, v = linear(select(inputs.x, slices), kv_weight, kv_bias).view(batch, -1, 2, *heads).unbind(2)
    q = complex_rope(q, freqs)
    entries: list[tuple[Slice, Tensor, Tensor, Tensor | None]] = []
    if inputs.kv_cache is None:
        k = complex_rope(k, select(freqs, slices))
        mask = None if inputs.key_padding_mask is None else select(inputs.key_padding_mask, slices)
        for query, ranges in table.entries():
            key_mask = None if mask is None else select(mask, ranges)
            entries.append((query, select(k, ranges), select(v, ranges), key_mask))
    else:
        sizes = [inputs.kv_cache[name]["k"].shape[2] for name in names]
        ends = dict(zip(names, itertools.accumulate(sizes), strict=True))
        for query, ranges in table.entries():
            read = [name for name in names if any(begin < ends[name] <= end for begin, end in ranges)]
            k, v = (_joined([inputs.kv_cache[name][kind].transpose(1, 2) for name in read]) for kind in ("k", "v"))
            entries.append((query, k, v, None))
    return linear(attend_slices(q, entries).flatten(2), mixed.proj.weight, mixed.proj.bias)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _runs(groups: list[tuple[bool, int]]) -> list[tuple[int, int]]:
    """Slices of the groups that are chosen, neighbours joined."""
    runs: list[tuple[int, int]] = []
    begin = 0
    for chosen, size in groups:
        if chosen:
            if runs and runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], begin + size)
            else:
                runs.append((begin, begin + size))
        begin += size
    return runs


MODULE_PEERS: dict[str, ModulePeer] = {
    OURS: anchor_attention_module,
    "eager": eager,
    "sdpa_per_pattern": sdpa_per_pattern,
}
