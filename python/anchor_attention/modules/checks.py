"""Checks of the arguments that the modules get, with messages that name the argument and a remedy."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..patterns import AttentionPattern, TokenSpec

Freqs = Tensor | tuple[Tensor, ...]


def check_inputs(
    x: Tensor,
    num_heads: int,
    head_dim: int,
    use_rope: bool,
    key_padding_mask: Tensor | None,
    freqs: Freqs | None,
    *,
    layer: nn.Module,
    name: str = "x",
) -> None:
    """Checks the inputs of a call against each other and the module.

    Args:
        layer: What projects ``x``.
        name: What the caller calls x.

    Raises:
        ValueError: If a type, shape, dtype or device does not fit, or freqs are missing or not used.
    """
    hidden_dim = num_heads * head_dim
    check_tensor(name, x)
    check_has_data(name, x, layer)
    if x.dim() != 3 or x.shape[2] != hidden_dim:
        hint = ""
        if x.dim() == 4 and x.shape[3] == head_dim:
            hint = (
                "; the modules take tokens that are not yet split into heads, not the (batch, heads, tokens, head_dim) "
                "of scaled_dot_product_attention"
            )
        raise ValueError(f"{name} must be (batch, tokens, {hidden_dim}), got shape {tuple(x.shape)}{hint}")
    if use_rope != (freqs is not None):
        given = "None" if freqs is None else type(freqs).__name__
        raise ValueError(f"RoPE usage mismatch: use_rope={use_rope}, but freqs={given}")
    if freqs is not None:
        _check_freqs(x, head_dim, freqs)
        for axis, part in enumerate(freqs if isinstance(freqs, tuple) else (freqs,)):
            check_beside(f"freqs[{axis}]" if isinstance(freqs, tuple) else "freqs", part, name, x)
    if key_padding_mask is None:
        return
    check_tensor("key_padding_mask", key_padding_mask)
    if key_padding_mask.dtype != torch.bool:
        raise ValueError(f"key_padding_mask must have dtype torch.bool, got {key_padding_mask.dtype}")
    if key_padding_mask.dim() != 2:
        raise ValueError(f"key_padding_mask must be 2-D (batch, tokens), got shape {tuple(key_padding_mask.shape)}")
    if key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must have the batch size and length of x, {tuple(x.shape[:2])}, "
            f"got {tuple(key_padding_mask.shape)}"
        )
    check_beside("key_padding_mask", key_padding_mask, name, x)


def check_has_data(name: str, x: Tensor, layer: nn.Module) -> None:
    """Checks that an input has data if the weights of the layer that takes it have.

    Weights without data are no error: they may be loaded when the layer is called.

    Raises:
        ValueError: If ``x`` alone is on the meta device.
    """
    if x.is_meta:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_meta:
            raise ValueError(f"{name} must be on the device of the module's weights ({weight.device}), got meta")


def check_beside(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that two arguments are on one device.

    Raises:
        ValueError: If they are not.
    """
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def check_groups(token_specs: Any) -> Sequence[TokenSpec]:
    """Checks that these are token groups: a sequence of objects with ``name`` and ``size``.

    Raises:
        ValueError: If they are something else, for example a dict or a list of pairs.
    """
    _check_listed("token_specs", token_specs, "TokenSpec", "[TokenSpec(name, size), ...]", ("name", "size"))
    specs: Sequence[TokenSpec] = token_specs
    return specs


def check_patterns(attention_patterns: Any) -> Sequence[AttentionPattern]:
    """Checks that these are patterns: a sequence of objects with ``query_tokens`` and ``key_value_tokens``.

    Raises:
        ValueError: If they are something else, for example a table or a dense mask.
    """
    way_out = "[AttentionPattern(query_tokens, key_value_tokens), ...]"
    fields = ("query_tokens", "key_value_tokens")
    _check_listed("attention_patterns", attention_patterns, "AttentionPattern", way_out, fields)
    patterns: Sequence[AttentionPattern] = attention_patterns
    return patterns


def group_size(name: str, size: Any) -> int:
    """Returns a group's size as an ``int``, and a symbolic one as it is.

    Equal numbers of other types are refused: a plan that is cached for 6 must not have been made from 6.0.

    Raises:
        ValueError: If it is no integer.
    """
    if type(size) is int:
        return size
    if isinstance(size, torch.SymInt):
        return cast(int, size)
    try:
        if isinstance(size, bool):
            raise TypeError
        return operator.index(size)
    except TypeError:
        raise ValueError(f"size of token {name!r} must be an integer or None, got {size!r}") from None


def _check_freqs(x: Tensor, head_dim: int, freqs: Freqs) -> None:
    if isinstance(freqs, tuple):
        for axis, angles in enumerate(freqs):
            check_tensor(f"freqs[{axis}]", angles)
            if angles.dim() != 3 or angles.is_complex() or not _fits(angles, x):
                raise ValueError(
                    f"freqs[{axis}] must be real angles ({_batch(x)}, {_tokens(x)}, width), got {angles.dtype} "
                    f"of shape {tuple(angles.shape)}"
                )
        return
    check_tensor("freqs", freqs)
    if freqs.dim() != 3 or not freqs.is_complex() or freqs.shape[2] != head_dim // 2 or not _fits(freqs, x):
        raise ValueError(
            f"freqs must be complex ({_batch(x)}, {_tokens(x)}, {head_dim // 2}), or a tuple of real angles, "
            f"got {freqs.dtype} of shape {tuple(freqs.shape)}"
        )


def _fits(freqs: Tensor, x: Tensor) -> bool:
    # Sizes can be symbolic while a compiler traces: there the operation checks, without a guard.
    return torch.compiler.is_compiling() or (freqs.shape[0] in (1, x.shape[0]) and freqs.shape[1] == x.shape[1])


def _batch(x: Tensor) -> str:
    return f"{x.shape[0]} or 1" if x.shape[0] != 1 else "1"


def _tokens(x: Tensor) -> int:
    return x.shape[1]


def check_tensor(name: str, value: Any) -> None:
    """Checks that an argument is a tensor.

    Raises:
        ValueError: If it is something else, as a NumPy array.
    """
    if not isinstance(value, Tensor):
        hint = ": torch.from_numpy makes one" if type(value).__module__ == "numpy" else ""
        raise ValueError(f"{name} must be a Tensor, got {type(value).__name__}{hint}")


def _check_listed(name: str, values: Any, kind: str, way_out: str, fields: tuple[str, ...]) -> None:
    if isinstance(values, (str, Mapping, Tensor)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of {kind}, got {type(values).__name__}: write {way_out}")
    for value in values:
        if not all(hasattr(value, field) for field in fields):
            raise ValueError(f"{name} must hold {kind} objects, got {value!r:.80}: write {way_out}")
