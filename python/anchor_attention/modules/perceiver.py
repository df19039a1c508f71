"""Attention of one stream of tokens to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..functional import anchor_attention, rope
from ..key_range_table import KeyRangeTable
from .checks import check_beside, check_has_data, check_inputs, check_tensor
from .config import PerceiverAttentionConfig, default, given, resolve_config
from .plan import bounded_cache
from .projection import initialise, make_norm, project
from .steps import readable, split_heads


class PerceiverAttention(nn.Module):
    """Multi-head attention of queries from one stream to keys and values from another.

    Its parameters have the names of the class of the same name in the package ``noether``: checkpoints load as they
    are. Method: Perceiver, https://arxiv.org/abs/2103.03206.

    Args:
        config: A :class:`PerceiverAttentionConfig` or any object with its fields; or ``None`` and the fields as
            keywords.
        hidden_dim: Width of the queries, a multiple of ``num_heads``.
        num_heads: Number of heads.
        kv_dim: Width of the tokens that are read; ``hidden_dim`` when ``None``.
        num_kv_heads: Number of heads of keys and values, a divisor of ``num_heads``, which is what ``None`` means.
        use_rope: Whether queries and keys are rotated by ``q_freqs`` and ``k_freqs``, which ``forward`` then requires.
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
        kv_dim: int | None = default(None),
        num_kv_heads: int | None = default(None),
        use_rope: bool = default(False),
        init_weights: str = default("truncnormal002"),
        bias: bool = default(True),
        qk_norm: bool | str = default(False),
        dim: int | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        resolved = resolve_config(PerceiverAttentionConfig, config, given(locals()), unknown)
        self.hidden_dim = resolved.hidden_dim
        self.num_heads = resolved.num_heads
        self.head_dim = resolved.head_dim
        self.kv_dim = resolved.hidden_dim if resolved.kv_dim is None else resolved.kv_dim
        self.num_kv_heads = resolved.num_heads if resolved.num_kv_heads is None else resolved.num_kv_heads
        self.use_rope = resolved.use_rope
        self.init_weights = resolved.init_weights
        kv_width = self.num_kv_heads * self.head_dim
        self.q = nn.Linear(self.hidden_dim, self.hidden_dim, bias=resolved.bias)
        self.k = nn.Linear(self.kv_dim, kv_width, bias=resolved.bias)
        self.v = nn.Linear(self.kv_dim, kv_width, bias=resolved.bias)
        self.q_norm = make_norm(self.head_dim, resolved.qk_norm)
        self.k_norm = make_norm(self.head_dim, resolved.qk_norm)
        self.proj = nn.Linear(self.hidden_dim, self.hidden_dim, bias=resolved.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections as ``init_weights`` says, and the weights of the norms by 1."""
        initialise(self, self.init_weights, self.proj)

    def forward(
        self,
        q: Tensor,
        kv: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        q_freqs: Tensor | None = None,
        k_freqs: Tensor | None = None,
        kv_cache: Mapping[str, Tensor] | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Applies the attention.

        Args:
            q: (B, Nq, hidden_dim) queries.
            kv: (B, Nk, kv_dim) tokens to read, where there is no ``kv_cache``.
            key_padding_mask: (B, Nk) bool, True where a token is real.
            q_freqs: (B or 1, Nq, head_dim / 2) complex64 rotary factors, required with ``use_rope``.
            k_freqs: (B or 1, Nk, head_dim / 2), likewise, where there is no ``kv_cache``.
            kv_cache: What an earlier call returned, in the place of ``kv``: ``"k"`` (rotated) and ``"v"``, both
                (B, kv heads, Nk, head_dim).
            return_kv_cache: Whether to return the keys and values.

        Returns:
            (B, Nq, hidden_dim), and the cache where it is asked for.

        Raises:
            ValueError: If the arguments contradict each other or the configuration.
        """
        check_inputs(q, self.num_heads, self.head_dim, self.use_rope, None, q_freqs, layer=self.q, name="q")
        if (kv is None) == (kv_cache is None):
            raise ValueError("give either kv or kv_cache, got " + ("neither" if kv is None else "both"))
        if kv is not None:
            keys, values = self._project(kv, k_freqs, q)
        else:
            assert kv_cache is not None
            keys, values = self._cached(kv_cache)
        queries = split_heads(project(self.q, q), self.num_heads, self.head_dim)
        attended = anchor_attention(
            self.q_norm(queries).to(queries.dtype),
            keys,
            values,
            _dense_table(q.shape[1], keys.shape[1]),
            q_freqs=None if q_freqs is None else readable(q_freqs),
            key_mask=key_padding_mask,
        )
        out: Tensor = project(self.proj, attended.flatten(2))
        return (out, {"k": keys.transpose(1, 2), "v": values.transpose(1, 2)}) if return_kv_cache else out

    def _project(self, kv: Tensor, k_freqs: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
        check_tensor("kv", kv)
        if kv.dim() != 3 or kv.shape[2] != self.kv_dim:
            raise ValueError(f"kv must be (batch, tokens, {self.kv_dim}), got shape {tuple(kv.shape)}")
        check_has_data("kv", kv, self.k)
        check_beside("kv", kv, "q", q)
        if not torch.compiler.is_compiling() and kv.shape[0] != q.shape[0]:
            raise ValueError(f"kv must have the batch size of q, {q.shape[0]}, got {kv.shape[0]}")
        if self.use_rope != (k_freqs is not None):
            given = "None" if k_freqs is None else type(k_freqs).__name__
            raise ValueError(f"RoPE usage mismatch: use_rope={self.use_rope}, but k_freqs={given}")
        keys = split_heads(project(self.k, kv), self.num_kv_heads, self.head_dim)
        keys = self.k_norm(keys).to(keys.dtype)
        if k_freqs is not None:
            keys = rope(keys, readable(k_freqs))
        return keys, split_heads(project(self.v, kv), self.num_kv_heads, self.head_dim)

    def _cached(self, kv_cache: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        for kind in ("k", "v"):
            tensor = kv_cache.get(kind)
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                raise ValueError(
                    f"kv_cache must hold {kind!r}, (batch, kv heads, tokens, head_dim), got {tensor!r:.80}"
                )
            if (tensor.shape[1], tensor.shape[3]) != (self.num_kv_heads, self.head_dim):
                raise ValueError(
                    f"kv_cache[{kind!r}] must be (batch, {self.num_kv_heads}, tokens, {self.head_dim}), "
                    f"got shape {tuple(tensor.shape)}"
                )
        return kv_cache["k"].transpose(1, 2), kv_cache["v"].transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, kv_dim={self.kv_dim}, "
            f"num_kv_heads={self.num_kv_heads}, use_rope={self.use_rope}"
        )


@bounded_cache
def _dense_table(n_queries: int, n_keys: int) -> KeyRangeTable:
    return KeyRangeTable((0, n_queries), (0, 1), (0, n_keys))
