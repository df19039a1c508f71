"""Tensors of a workload: a module with weights that matter, and the inputs of one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anchor_attention import MultiBranchAnchorAttention

from .workloads import MODULES, Workload

KVCache = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ModuleInputs:
    """One call of a module: x (B, N, dim), freqs (B, N, D / 2), mask (B, N), cache, and grad_out (B, N, dim)."""

    x: Tensor
    freqs: Tensor
    key_padding_mask: Tensor | None
    kv_cache: KVCache | None
    grad_out: Tensor

    def double(self) -> ModuleInputs:
        """The same values in float64."""
        cache = self.kv_cache
        if cache is not None:
            cache = {name: {kind: tensor.double() for kind, tensor in entry.items()} for name, entry in cache.items()}
        return replace(
            self,
            x=self.x.double(),
            freqs=self.freqs.to(torch.complex128),
            kv_cache=cache,
            grad_out=self.grad_out.double(),
        )


def make_module(
    workload: Workload, pattern: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> MultiBranchAnchorAttention:
    """The module of a pattern, with weights under which scores are of order one.

    The default initialisation is for the start of a training: its attention is next to uniform, and hides errors.
    """
    module = MODULES[pattern](
        dim=workload.dim,
        num_heads=workload.heads,
        branches=tuple(branch.name for branch in workload.branches),
        use_rope=True,
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("bias") else workload.dim**-0.5)
    return module.to(device=device, dtype=dtype)


def real_tokens(workload: Workload, device: str | torch.device = "cpu") -> Tensor | None:
    """(B, N) bool, True where a token is no padding: the head of each group, a share that grows with the sample."""
    if workload.min_real is None:
        return None
    share = torch.linspace(workload.min_real, 1.0, workload.batch, device=device)
    groups = []
    for spec in workload.token_specs:
        size = spec.size or 0
        groups.append(torch.arange(size, device=device) < (share[:, None] * size).ceil())
    return torch.cat(groups, dim=1)


def make_module_inputs(
    workload: Workload, module: MultiBranchAnchorAttention, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> ModuleInputs:
    """Random inputs whose mean is not zero; the cache, where there is one, is filled by the module itself."""
    kv_cache = None
    if workload.cached:
        n_anchors = sum(branch.anchors for branch in workload.branches)
        with torch.no_grad():
            _, kv_cache = module(
                _normal(workload.batch, n_anchors, workload.dim, dtype, device),
                workload.anchor_specs,
                _unit_freqs(n_anchors, workload.head_dim, device),
                return_kv_cache=True,
            )
    return ModuleInputs(
        x=_normal(workload.batch, workload.n_tokens, workload.dim, dtype, device),
        freqs=_unit_freqs(workload.n_tokens, workload.head_dim, device),
        key_padding_mask=real_tokens(workload, device),
        kv_cache=kv_cache,
        grad_out=_normal(workload.batch, workload.n_tokens, workload.dim, dtype, device),
    )


def scores_per_head(workload: Workload, pattern: str) -> int:
    """Pairs of a query and a key that is no padding, over the batch: what the arithmetic is counted by."""
    names, table = workload.key_axis(pattern)
    mask = real_tokens(workload)
    if mask is None:
        return workload.batch * table.area()
    specs = workload.token_specs
    groups = torch.split(mask, [spec.size or 0 for spec in specs], dim=1)
    key_mask = torch.cat([group for spec, group in zip(specs, groups, strict=True) if spec.name in names], dim=1)
    return sum(
        (q_end - q_begin) * int(key_mask[:, begin:end].sum())
        for (q_begin, q_end), ranges in table.entries()
        for begin, end in ranges
    )


def _normal(batch: int, n_tokens: int, dim: int, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    return (torch.randn(batch, n_tokens, dim, device=device) + 0.25).to(dtype)


def _unit_freqs(n_tokens: int, head_dim: int, device: str | torch.device) -> Tensor:
    angle = 6.3 * torch.rand(1, n_tokens, head_dim // 2, device=device)
    return torch.polar(torch.ones_like(angle), angle)
