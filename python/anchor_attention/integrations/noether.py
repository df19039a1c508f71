"""Speeds up trained models of the package ``noether`` (on PyPI ``emmiai-noether``) in place.

Nothing of that package is imported: its classes are told by their package, their names and the arguments of their
``forward``. The parameters stay the very same tensors under the same names, so that optimisers, data-parallel wrappers,
averaged copies and checkpoints keep working::

    print(accelerate(model))
    predictions, cache = model(**anchors)
    stream(lambda cache, chunk: model(domain_query_positions=chunk, kv_cache=cache)[0], cache, queries)

The last line is :func:`anchor_attention.streaming.stream`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..modules import CrossAnchorAttention as _CrossAnchorAttention
from ..modules import JointAnchorAttention as _JointAnchorAttention
from ..modules import SelfAnchorAttention as _SelfAnchorAttention
from ..modules.kv_cache import KVCache
from ..modules.multi_branch import MultiBranchAnchorAttention
from ..modules.plan import bounded_cache
from ..patterns import TokenSpec
from .accelerated import (
    DotProductForward,
    FusedForward,
    MaskedMixedForward,
    MixedForward,
    PerceiverForward,
    PlainMixedForward,
    PlainPerceiverForward,
    UntiedMixedForward,
    UntiedPerceiverForward,
    fused_class,
)

PACKAGES = ("noether", "emmi", "ksuit")

# By class and arguments of its forward. A version whose arguments are others is left as it is.
_FORWARDS: dict[tuple[str, tuple[str, ...]], type[FusedForward]] = {
    ("DotProductAttention", ("x", "attn_mask", "freqs")): DotProductForward,
    ("MixedAttention", ("x", "token_specs", "attention_patterns", "attention_mask", "freqs")): PlainMixedForward,
    ("MixedAttention", ("x", "token_specs", "attention_patterns", "key_padding_mask", "freqs")): MaskedMixedForward,
    (
        "MixedAttention",
        ("x", "token_specs", "attention_patterns", "key_padding_mask", "freqs", "kv_cache"),
    ): MixedForward,
    (
        "UntiedMixedAttention",
        ("x", "token_specs", "attention_patterns", "key_padding_mask", "freqs", "kv_cache"),
    ): UntiedMixedForward,
    ("PerceiverAttention", ("q", "kv", "attn_mask", "q_freqs", "k_freqs")): PlainPerceiverForward,
    ("PerceiverAttention", ("q", "kv", "attn_mask", "q_freqs", "k_freqs", "kv_cache")): PerceiverForward,
    (
        "UntiedPerceiverAttention",
        ("q", "token_specs", "kv", "attn_mask", "q_freqs", "k_freqs", "kv_cache"),
    ): UntiedPerceiverForward,
}
_KNOWN_NAMES = {name for name, _ in _FORWARDS}
_KNOWN_CHILDREN = {"qkv", "q", "k", "v", "kv", "proj", "proj_dropout"}


@dataclass(frozen=True)
class ReplacedModule:
    """A module whose attention is computed by this package.

    Args:
        name: Where it is in the model.
        class_name: Its class.
        used_by: Class of the anchor attention that it is a part of, empty if none.
    """

    name: str
    class_name: str
    used_by: str = ""


@dataclass(frozen=True)
class LeftModule:
    """A module that looks like attention and was left as it is.

    Args:
        name: Where it is in the model.
        class_name: Its class.
        reason: Why it was left.
    """

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did to a model."""

    replaced: tuple[ReplacedModule, ...]
    left: tuple[LeftModule, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, left {len(self.left)}"]
        for module in self.replaced:
            used_by = f" of {module.used_by}" if module.used_by else ""
            lines.append(f"  replaced {module.name or 'the model itself'}: {module.class_name}{used_by}")
        lines += [f"  left {module.name or 'the model itself'}: {module.reason}" for module in self.left]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, packages: Sequence[str] = PACKAGES) -> AccelerationReport:
    """Lets this package compute the attention of a model, in place.

    Replaced are mixed attention (and with it self, cross and joint anchor attention and every subclass that creates
    patterns of its own), plain dot-product attention and perceiver attention, with shared or per-domain projections. A
    replaced module keeps its object, its parameters, its hooks and, as a base, its class. A call that the fused
    operation can't do (a dense attention mask, dropout or per-axis angles in plain attention) goes the old way.

    Args:
        model: Any module; its submodules are searched.
        packages: Top-level packages whose classes are taken for the known ones.

    Returns:
        What was replaced and what was left, with the reason. ``print`` shows it as a table.
    """
    replaced: list[ReplacedModule] = []
    left: list[LeftModule] = []
    users = {
        id(child): type(module).__name__
        for module in model.modules()
        for name, child in module.named_children()
        if name == "mixed_attention"
    }
    for name, module in model.named_modules():
        if isinstance(module, FusedForward):
            left.append(LeftModule(name, module.original_class.__name__, "already accelerated"))
        elif _looks_like_attention(module):
            class_name, used_by = type(module).__name__, users.get(id(module), "")
            try:
                forward = _known_forward(type(module), tuple(packages))
                _check_instance(module)
            except ValueError as error:
                left.append(LeftModule(name, class_name, str(error)))
                continue
            # An anchor attention hands the cache on, which its blocks can do with and without.
            if forward is UntiedMixedForward and used_by:
                forward = MixedForward
            module.__class__ = fused_class(forward, type(module))
            replaced.append(ReplacedModule(name, class_name, used_by))
    return AccelerationReport(tuple(replaced), tuple(left))


def restore(model: nn.Module) -> int:
    """Undoes :func:`accelerate`.

    Returns:
        The number of modules that were restored.
    """
    restored = 0
    for module in model.modules():
        original = getattr(type(module), "original_class", None)
        if isinstance(module, FusedForward) and original is not None:
            nn.Module.__setattr__(module, "__class__", original)
            restored += 1
    return restored


def accelerated_class(original: type[nn.Module], *, packages: Sequence[str] = PACKAGES) -> type[nn.Module]:
    """Returns the subclass of an attention class whose ``forward`` is computed by this package.

    Args:
        original: The class of a known attention module, or a subclass that does not change how it attends.
        packages: Top-level packages whose classes are taken for the known ones.

    Raises:
        ValueError: If the class is not known, or changes what would be replaced.
    """
    return fused_class(_known_forward(original, tuple(packages)), original)


@bounded_cache
def _known_forward(original: type[nn.Module], packages: tuple[str, ...]) -> type[FusedForward]:
    definer = next(base for base in original.__mro__ if "forward" in vars(base))
    if definer.__name__ not in _KNOWN_NAMES or definer.__module__.split(".")[0] not in packages:
        raise ValueError(f"its forward is that of {definer.__module__}.{definer.__qualname__}, which is not known")
    arguments = tuple(inspect.signature(vars(definer)["forward"]).parameters)[1:]
    forward = _FORWARDS.get((definer.__name__, arguments))
    if forward is None:
        raise ValueError(f"forward of {definer.__qualname__} has the arguments {arguments}, which are not known")
    steps = {name for base in definer.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    for base in original.__mro__[: original.__mro__.index(definer)]:
        changed = sorted(name for name in steps & set(vars(base)) if not name.startswith(("__", "_abc_")))
        if changed:
            raise ValueError(f"{base.__qualname__} changes {', '.join(changed)}, which the fused forward does not call")
    return forward


def _looks_like_attention(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    if "mixed_attention" in children or any(_looks_like_attention(child) for child in module.children()):
        return False
    return ("proj" in children and bool({"qkv", "q"} & children)) or "Attention" in type(module).__name__


def _check_instance(module: nn.Module) -> None:
    if "forward" in vars(module):
        raise ValueError("forward is set on the instance")
    unknown = sorted(set(dict(module.named_children())) - _KNOWN_CHILDREN)
    if unknown:
        raise ValueError(f"it holds {', '.join(unknown)}, which the fused forward does not know")
    own = sorted(name for name, _ in module.named_parameters(recurse=False))
    if own:
        raise ValueError(f"it holds the parameters {', '.join(own)}, which the fused forward does not know")


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
