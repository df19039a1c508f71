"""Attention between token groups in arbitrary patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .._context import interceptable
from ..patterns import AttentionPattern, TokenSpec
from .checks import Freqs, check_inputs
from .config import MixedAttentionConfig, default, given, resolve_config
from .kv_cache import CacheEntry, KVCache
from .projection import initialise, make_norm, project
from .steps import attend, plan_call, project_packed


class MixedAttention(nn.Module):
    """Multi-head attention in which every token group attends, densely, to the groups that a pattern names.

    All groups share the projections. Only tokens that some group reads are projected to keys and values.

    Args:
        config: A :class:`MixedAttentionConfig` or any object with its fields; or ``None`` and the fields as keywords.
        hidden_dim: Width of the tokens, a multiple of ``num_heads``.
        num_heads: Number of heads.
        use_rope: Whether queries and keys are rotated by ``freqs``, which ``forward`` then requires.
        dropout: Probability with which attention weights are dropped while training.
        init_weights: How the projections are initialised, see :class:`AttentionConfig`.
        bias: Whether the projections have a bias.
        qk_norm: Whether queries and keys are normalised: ``False``, ``True``, or ``"rms"`` with learnt weights.
        dim: Another name for ``hidden_dim``.

    Raises:
        TypeError: If a field is missing or unknown.
        ValueError: If a field is out of its range.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        hidden_dim: int | None = None,
        num_heads: int | None = None,
        use_rope: bool = default(False),
        dropout: float = default(0.0),
        init_weights: str = default("truncnormal002"),
        bias: bool = default(True),
        qk_norm: bool | str = default(False),
        dim: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        resolved = resolve_config(MixedAttentionConfig, config, given(locals()), unknown)
        self.hidden_dim = resolved.hidden_dim
        self.num_heads = resolved.num_heads
        self.head_dim = resolved.head_dim
        self.use_rope = resolved.use_rope
        self.dropout = resolved.dropout
        self.init_weights = resolved.init_weights
        self.qk_norm = resolved.qk_norm
        self.qkv = nn.Linear(resolved.hidden_dim, 3 * resolved.hidden_dim, bias=resolved.bias)
        self.q_norm = make_norm(self.head_dim, self.qk_norm)
        self.k_norm = make_norm(self.head_dim, self.qk_norm)
        self.proj = nn.Linear(resolved.hidden_dim, resolved.hidden_dim, bias=resolved.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections as ``init_weights`` says, and the weights of the norms by 1.

        After deferred initialisation call it on this module last: the layers that it holds have their own.
        """
        initialise(self, self.init_weights, self.proj)

    @interceptable
    def forward(
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        attention_patterns: Sequence[AttentionPattern],
        key_padding_mask: Tensor | None = None,
        freqs: Freqs | None = None,
        kv_cache: Mapping[str, CacheEntry] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Applies the attention.

        Args:
            x: (B, N, hidden_dim), the groups one after the other in the order of ``token_specs``.
            token_specs: Name and size of each group. A group without a size is not in x: its keys and values come from
                ``kv_cache``. A group with a size gets fresh ones, cached or not.
            attention_patterns: Every group in x is a query in exactly one pattern.
            key_padding_mask: (B, N) bool, True where a token of x is real. Only groups that are read matter.
            freqs: Rotary factors of the tokens of x, required with ``use_rope``: (B or 1, N, head_dim / 2) complex64,
                or the legacy tuple of angles per axis, (B or 1, N, block) in radians.
            kv_cache: What an earlier call returned: for each group ``"k"`` (rotated) and ``"v"``, both
                (B, heads, tokens, head_dim), and ``"mask"``, (B, tokens) bool, where there was a mask.
            return_kv_cache: Whether to return the keys and values of every group that some pattern reads.

        Returns:
            (B, N, hidden_dim), and the cache where it is asked for.

        Raises:
            ValueError: If the arguments contradict each other or the configuration.
        """
        check_inputs(x, self.num_heads, self.head_dim, self.use_rope, key_padding_mask, freqs, layer=self.qkv)
        plan = plan_call(
            x, token_specs, attention_patterns, kv_cache, self.num_heads, self.head_dim, keep_unread=return_kv_cache
        )
        q, k, v = project_packed(self.qkv, x, plan, self.num_heads)
        # Before the rotation, which keeps the norm: cached keys are normalised as well as rotated. Back to the type of
        # the projection: under autocast a norm may answer in another.
        q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        attended, cache = attend(
            q,
            k,
            v,
            plan,
            key_padding_mask=key_padding_mask,
            freqs=freqs,
            kv_cache=kv_cache,
            return_kv_cache=return_kv_cache,
            dropout=self.dropout if self.training else 0.0,
        )
        out = project(self.proj, attended)
        return out if cache is None else (out, cache)

    def extra_repr(self) -> str:
        return (
            f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, use_rope={self.use_rope}, "
            f"qk_norm={self.qk_norm!r}, dropout={self.dropout}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for kind in ("weight", "bias"):
            own = getattr(self.qkv, kind, None)
            _join_projections(state_dict, prefix, kind, self.hidden_dim, own, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _join_projections(
    state_dict: dict[str, Any], prefix: str, kind: str, hidden_dim: int, own: Any, error_msgs: list[str]
) -> None:
    """Puts separate q, k and v in the place of the fused projection, if all of them are there and fit."""
    names = [f"{prefix}{name}.{kind}" for name in ("q", "k", "v")]
    if not all(isinstance(state_dict.get(name), Tensor) for name in names):
        return
    fused_name = f"{prefix}qkv.{kind}"
    fused = state_dict.get(fused_name)
    separate = [state_dict.pop(name) for name in names]
    shape = (hidden_dim, hidden_dim) if kind == "weight" else (hidden_dim,)
    wrong = [(name, tensor) for name, tensor in zip(names, separate, strict=True) if tensor.shape != shape]
    for name, tensor in wrong:
        error_msgs.append(
            f"size mismatch for {name}: the checkpoint holds shape {tuple(tensor.shape)}, the module needs {shape}."
        )
    if wrong:
        if isinstance(own, Tensor):
            # Of another width altogether, the fused one is reported as well; else the message above says it all.
            rows = sum(tensor.shape[0] if tensor.dim() else 1 for tensor in separate)
            state_dict.setdefault(fused_name, own.detach() if rows == own.shape[0] else own.new_empty(rows, *shape[1:]))
        return
    joined = torch.cat(separate)
    if isinstance(fused, Tensor) and not _are_equal(joined, fused):
        error_msgs.append(
            f"{fused_name} and {', '.join(names)} are both in the checkpoint and differ: remove the ones that are old."
        )
        return
    state_dict[fused_name] = joined


def _are_equal(joined: Tensor, fused: Tensor) -> bool:
    if joined.is_meta or fused.is_meta:
        return joined.shape == fused.shape
    return joined.shape == fused.shape and torch.equal(joined, fused.to(joined))
