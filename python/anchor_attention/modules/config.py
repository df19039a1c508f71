"""Configurations of the modules: frozen dataclasses that check their fields."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

INIT_WEIGHTS = ("truncnormal002", "truncnormal", "torch", "truncnormal002-identity", "zeros")
QK_NORMS = (False, True, "rms")
ROPE_IMPLEMENTATIONS = ("complex", "real")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Fields that every attention module has.

    Args:
        hidden_dim: Width of the tokens, a multiple of ``num_heads``.
        num_heads: Number of heads.
        use_rope: Whether queries and keys are rotated by ``freqs``, which ``forward`` then requires.
        dropout: Probability with which attention weights are dropped while training.
        init_weights: ``"truncnormal002"`` or ``"truncnormal"`` (standard deviation 0.02, zero bias),
            ``"truncnormal002-identity"`` (the same, and a zero output projection), ``"torch"`` (what ``nn.Linear``
            does), ``"zeros"``.
        bias: Whether the projections have a bias.
        qk_norm: ``True`` divides every head's queries and keys by their root mean square; ``"rms"`` also multiplies
            them by learnt weights, ``q_norm.weight`` and ``k_norm.weight``.

    Raises:
        ValueError: If a field is out of range.
    """

    hidden_dim: int
    num_heads: int
    use_rope: bool = False
    dropout: float = 0.0
    init_weights: str = "truncnormal002"
    bias: bool = True
    qk_norm: bool | str = False

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "num_heads"):
            _check_positive_integer(field, getattr(self, field))
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim must be divisible by num_heads, got hidden_dim={self.hidden_dim} "
                f"and num_heads={self.num_heads}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.init_weights not in INIT_WEIGHTS:
            raise ValueError(f"init_weights must be one of {INIT_WEIGHTS}, got {self.init_weights!r}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {QK_NORMS}, got {self.qk_norm!r}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class MixedAttentionConfig(AttentionConfig):
    """Configuration of :class:`MixedAttention`."""


@dataclass(frozen=True, kw_only=True)
class MultiBranchAnchorAttentionConfig(AttentionConfig):
    """Configuration of :class:`MultiBranchAnchorAttention` and :class:`SelfAnchorAttention`.

    Args:
        branches: Names of the branches: prefixes of their token groups' names. At least one.
        anchor_suffix: The anchors of a branch are the group ``branch + anchor_suffix``.

    Raises:
        ValueError: If there are too few branches, a name is empty or occurs twice, or the suffix is empty.
    """

    branches: tuple[str, ...]
    anchor_suffix: str = "_anchors"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "branches", _checked_branches(self.branches))
        if not self.branches:
            raise ValueError("branches list cannot be empty, got ()")
        _check_suffix(self.anchor_suffix)


@dataclass(frozen=True, kw_only=True)
class CrossAnchorAttentionConfig(MultiBranchAnchorAttentionConfig):
    """Configuration of :class:`CrossAnchorAttention`: at least two branches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_two_branches("CrossAnchorAttention", self.branches)


@dataclass(frozen=True, kw_only=True)
class JointAnchorAttentionConfig(MultiBranchAnchorAttentionConfig):
    """Configuration of :class:`JointAnchorAttention`: at least two branches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_two_branches("JointAnchorAttention", self.branches)


@dataclass(frozen=True, kw_only=True)
class RopeFrequencyConfig:
    """Configuration of :class:`RopeFrequency`.

    Args:
        hidden_dim: Width of one attention head, even.
        input_dim: Number of coordinates, with at least two dimensions of the head for each.
        max_wavelength: The slowest frequency is a little above ``1 / max_wavelength``, in radians per unit length.
        implementation: ``"complex"``, or ``"real"`` for the legacy form.

    Raises:
        ValueError: If a field is out of its range.
    """

    hidden_dim: int
    input_dim: int
    max_wavelength: float = 10000.0
    implementation: str = "complex"

    def __post_init__(self) -> None:
        for field in ("hidden_dim", "input_dim"):
            _check_positive_integer(field, getattr(self, field))
        if self.hidden_dim % 2 or self.hidden_dim < 2 * self.input_dim:
            raise ValueError(
                f"hidden_dim must be even and at least 2 * input_dim, got hidden_dim={self.hidden_dim} "
                f"and input_dim={self.input_dim}"
            )
        if not self.max_wavelength > 0:
            raise ValueError(f"max_wavelength must be positive, got {self.max_wavelength}")
        if self.implementation not in ROPE_IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {ROPE_IMPLEMENTATIONS}, got {self.implementation!r}")


@dataclass(frozen=True, kw_only=True)
class PerceiverAttentionConfig(AttentionConfig):
    """Configuration of :class:`PerceiverAttention`, which has no dropout.

    Args:
        kv_dim: Width of the tokens that are read; ``hidden_dim`` when ``None``.
        num_kv_heads: Number of heads of keys and values, a divisor of ``num_heads``, which is what ``None`` means.

    Raises:
        ValueError: If a field is out of its range.
    """

    kv_dim: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_no_dropout("PerceiverAttention", self.dropout)
        if self.kv_dim is not None:
            _check_positive_integer("kv_dim", self.kv_dim)
        if self.num_kv_heads is not None:
            _check_positive_integer("num_kv_heads", self.num_kv_heads)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"num_heads must be divisible by num_kv_heads, got num_heads={self.num_heads} "
                    f"and num_kv_heads={self.num_kv_heads}"
                )


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig(AttentionConfig):
    """Configuration of :class:`LatentAttention`, which has neither rotation nor dropout.

    Args:
        num_latents: Number of latents of a set.
        branches: Names of the branches; without any, one set of latents reads all tokens.
        anchor_suffix: The anchors of a branch are the group ``branch + anchor_suffix``.
        per_branch: Whether each branch has a set of latents of its own.
        scale: Factor of the scores.

    Raises:
        ValueError: If a field is out of its range.
    """

    num_latents: int = 64
    branches: tuple[str, ...] = ()
    anchor_suffix: str = "_anchors"
    per_branch: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_no_dropout("LatentAttention", self.dropout)
        if self.use_rope:
            raise ValueError(f"LatentAttention does not rotate, got use_rope={self.use_rope}")
        _check_positive_integer("num_latents", self.num_latents)
        object.__setattr__(self, "branches", _checked_branches(self.branches))
        if self.per_branch and not self.branches:
            raise ValueError("per_branch needs branches, got ()")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale!r}")
        _check_suffix(self.anchor_suffix)


Config = TypeVar("Config", bound=AttentionConfig)
T = TypeVar("T")

# What other libraries call the fields, for the hint in the error.
_OTHER_NAMES = {
    "embed_dim": "hidden_dim",
    "d_model": "hidden_dim",
    "hidden_size": "hidden_dim",
    "nhead": "num_heads",
    "heads": "num_heads",
    "num_attention_heads": "num_heads",
    "attn_drop": "dropout",
    "qkv_bias": "bias",
    "rope": "use_rope",
    "domains": "branches",
}


class _Default:
    """A default in a signature that can be told apart from the same value passed by the caller. Shown as the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def default(value: T) -> T:
    """Marks the default of a keyword that a config object may give instead."""
    return cast(T, _Default(value))


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the caller gave, from the ``locals()`` with which a module's constructor begins.

    A field is given if its value is neither a :func:`default` nor ``None`` where a value is required.
    """
    no_fields = ("self", "__class__", "config", "unknown")
    required = ("hidden_dim", "dim", "num_heads", "branches")
    return {
        name: value
        for name, value in arguments.items()
        if name not in no_fields and not isinstance(value, _Default) and not (value is None and name in required)
    }


def resolve_config(
    config_class: type[Config], config: Any, fields: Mapping[str, Any], unknown: Mapping[str, Any] | None = None
) -> Config:
    """Makes a ``config_class`` of a config object that has its fields, or of the fields as keywords.

    Args:
        config_class: What to make.
        config: Any object with the fields as attributes (those with a default may be missing), or ``None``.
        fields: The fields by name, if ``config`` is ``None``. ``dim`` is accepted for ``hidden_dim``.
        unknown: Keywords that are no fields.

    Raises:
        TypeError: If both or neither are given, or a field is missing or unknown.
        ValueError: If a field is out of its range.
    """
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in (*(unknown or {}), *(name for name in fields if name not in (*known, "dim"))):
        raise TypeError(_unknown_field(config_class, name, known))
    if config is not None and fields:
        raise TypeError(f"give either a config or its fields, got {type(config).__name__} and {sorted(fields)}")
    if isinstance(config, config_class):
        return config
    if config is None:
        values = dict(fields)
        if "dim" in values and "hidden_dim" in values:
            raise TypeError(
                f"dim is another name for hidden_dim: give one, got {values['dim']}, {values['hidden_dim']}"
            )
    elif isinstance(config, (int, float, str, Mapping)):
        raise TypeError(
            f"config must be an object with the fields {', '.join(known)}, got {config!r:.80}: "
            "give fields as keywords, as in hidden_dim=192, num_heads=3"
        )
    else:
        values = {name: getattr(config, name) for name in (*known, "dim") if hasattr(config, name)}
    dim = values.pop("dim", None)
    if dim is not None:
        values.setdefault("hidden_dim", dim)
    required = [field.name for field in dataclasses.fields(config_class) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        source = "" if config is None else f", which the {type(config).__name__} lacks"
        raise TypeError(f"{_module_name(config_class)} needs {', '.join(missing)}{source}")
    return config_class(**values)


def _unknown_field(config_class: type[AttentionConfig], name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = _OTHER_NAMES.get(name) or (close[0] if close else None)
    hint = f"did you mean {meant!r}?" if meant in known else f"the fields are {', '.join(known)}"
    return f"{_module_name(config_class)} has no field {name!r}: {hint}"


def _module_name(config_class: type[AttentionConfig]) -> str:
    return config_class.__name__.removesuffix("Config")


def _check_positive_integer(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a positive integer, got {value!r}")


def _checked_branches(branches: Any) -> tuple[str, ...]:
    if isinstance(branches, str) or not isinstance(branches, Iterable):
        raise ValueError(f"branches must be a sequence of names, got {branches!r}")
    names = tuple(branches)
    if not all(isinstance(branch, str) and branch for branch in names):
        raise ValueError(f"branches must be non-empty strings, got {names}")
    if len(set(names)) != len(names):
        raise ValueError(f"branches must differ from each other, got {names}")
    return names


def _check_suffix(anchor_suffix: Any) -> None:
    if not isinstance(anchor_suffix, str) or not anchor_suffix:
        raise ValueError(f"anchor_suffix must be a non-empty string, got {anchor_suffix!r}")


def _check_no_dropout(module: str, dropout: float) -> None:
    if dropout:
        raise ValueError(f"{module} has no dropout, got dropout={dropout}")


def _check_two_branches(module: str, branches: tuple[str, ...]) -> None:
    if len(branches) < 2:
        raise ValueError(
            f"{module} needs at least two branches, got {len(branches)}: {branches}. Otherwise use SelfAnchorAttention"
        )
