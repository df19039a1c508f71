"""Speeds up trained models of the package ``noether`` (on PyPI ``emmiai-noether``) in place.

Nothing of that package is imported: its classes are recognised by their package, their names and the arguments of their
``forward``, and each module is compared with its original before it is replaced. The parameters stay the same objects
under the same names, so that optimisers, data-parallel wrappers, averaged copies and checkpoints keep working::

    print(accelerate(model))
    predictions, cache = model(**anchors)
    stream(lambda cache, chunk: model(domain_query_positions=chunk, kv_cache=cache)[0], cache, queries)

The last line is :func:`anchor_attention.streaming.stream`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..modules import CrossAnchorAttention as _CrossAnchorAttention
from ..modules import JointAnchorAttention as _JointAnchorAttention
from ..modules import SelfAnchorAttention as _SelfAnchorAttention
from ..modules.kv_cache import KVCache
from ..modules.multi_branch import MultiBranchAnchorAttention
from ..patterns import TokenSpec
from .acceleration import (
    AccelerationReport,
    Family,
    Known,
    LeftModule,
    ReplacedModule,
    check_held,
    known_forward,
    restore,
)
from .acceleration import replace_attention as _replace_attention
from .fused_dense import DotProductForward, PerceiverForward, UntiedPerceiverForward
from .fused_forward import fused_class
from .fused_mixed import MixedForward, UntiedMixedForward

__all__ = [
    "PACKAGES",
    "AccelerationReport",
    "CrossAnchorAttention",
    "JointAnchorAttention",
    "LeftModule",
    "ReplacedModule",
    "SelfAnchorAttention",
    "accelerate",
    "accelerated_class",
    "restore",
]

PACKAGES = ("noether", "emmi", "ksuit")


_MIXED = (("x", "token_specs", "attention_patterns"), ("attention_mask", "key_padding_mask", "freqs", "kv_cache"))
_PERCEIVER = (("q", "kv"), ("attn_mask", "q_freqs", "k_freqs", "kv_cache"))
_FORWARDS = {
    "DotProductAttention": Known(DotProductForward, ("x",), ("attn_mask", "freqs")),
    "MixedAttention": Known(MixedForward, *_MIXED),
    "UntiedMixedAttention": Known(UntiedMixedForward, *_MIXED),
    "PerceiverAttention": Known(PerceiverForward, *_PERCEIVER),
    "UntiedPerceiverAttention": Known(UntiedPerceiverForward, ("q", "token_specs", "kv"), _PERCEIVER[1]),
}
_CHILDREN = ("qkv", "q", "k", "v", "kv", "proj", "proj_dropout", "q_norm", "k_norm")
_NORMS = (nn.Identity, nn.RMSNorm)


def accelerate(model: nn.Module, *, packages: Sequence[str] = PACKAGES, verify: bool = True) -> AccelerationReport:
    """Lets this package compute the attention of a model, in place.

    It replaces mixed attention (and with it self, cross and joint anchor attention and every subclass that creates its
    own patterns), plain dot-product attention and perceiver attention, with shared or per-domain projections. A
    replaced module stays the same object, with its parameters and hooks; its new class is a subclass of the old one. A
    call that the fused operation can't do (a dense attention mask, dropout in training) runs the original ``forward``.

    Args:
        model: Any module; its submodules are searched.
        packages: Top-level packages whose classes are treated as the known ones.
        verify: Whether to compare each module with its original on small random inputs before it is replaced: balanced
            and unbalanced groups, masks, caches, an absent branch, in the module's dtype and on its device. A module
            that differs, or can't be run, is left as it is and reported. The model itself is not called; its
            parameters, hooks and training mode and torch's random generators stay as they are.

    Returns:
        What was replaced and what was left, with the reason. ``print`` shows it as a table.

    Warns:
        UserWarning: If nothing was replaced; the message says why.
    """
    return _replace_attention(model, _FAMILY, packages, verify)


def accelerated_class(original: type[nn.Module], *, packages: Sequence[str] = PACKAGES) -> type[nn.Module]:
    """Returns the subclass of an attention class whose ``forward`` is computed by this package.

    Args:
        original: The class of a known attention module, or a subclass that does not change how it attends.
        packages: Top-level packages whose classes are treated as the known ones.

    Raises:
        ValueError: If the class is not known, or changes what would be replaced.
    """
    return fused_class(known_forward(original, _FAMILY, tuple(packages)), original)


def _looks_like_attention(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    if "mixed_attention" in children or any(_looks_like_attention(child) for child in module.children()):
        return False
    return ("proj" in children and bool({"qkv", "q"} & children)) or "Attention" in type(module).__name__


def _check_instance(module: nn.Module) -> None:
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        if norm is not None and type(norm) not in _NORMS:
            raise ValueError(f"its {name} is {type(norm).__name__}, which the fused forward does not know")
    check_held(module, _CHILDREN)


_FAMILY = Family(_FORWARDS, _looks_like_attention, _check_instance)


class _BlockAttention(MultiBranchAnchorAttention):
    """Takes and returns what the transformer blocks of the package pass and expect."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        token_specs: Sequence[TokenSpec],
        key_padding_mask: Tensor | None = None,
        freqs: Tensor | tuple[Tensor, ...] | None = None,
        kv_cache: KVCache | None = None,
    ) -> tuple[Tensor, KVCache | None]:
        """As :meth:`MultiBranchAnchorAttention.forward`, but for the order of the arguments and the cache.

        Returns:
            The output, and the cache of the groups that are read; ``None`` in its place if a group came from a cache.
        """
        cached = any(spec.size is None for spec in token_specs)
        result = super().forward(
            x,
            token_specs,
            freqs,
            key_padding_mask=key_padding_mask,
            kv_cache=kv_cache if cached else None,
            return_kv_cache=not cached,
        )
        return (result, None) if isinstance(result, Tensor) else result


class SelfAnchorAttention(_BlockAttention, _SelfAnchorAttention):
    """:class:`anchor_attention.SelfAnchorAttention` as ``attention_constructor`` of a block config, with its cache."""


class CrossAnchorAttention(_BlockAttention, _CrossAnchorAttention):
    """:class:`anchor_attention.CrossAnchorAttention` as ``attention_constructor`` of a block config, with its cache."""


class JointAnchorAttention(_BlockAttention, _JointAnchorAttention):
    """:class:`anchor_attention.JointAnchorAttention` as ``attention_constructor`` of a block config, with its cache."""
