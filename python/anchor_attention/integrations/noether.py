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

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..modules import CrossAnchorAttention as _CrossAnchorAttention
from ..modules import JointAnchorAttention as _JointAnchorAttention
from ..modules import SelfAnchorAttention as _SelfAnchorAttention
from ..modules.kv_cache import KVCache
from ..modules.multi_branch import MultiBranchAnchorAttention
from ..modules.plan import bounded_cache
from ..patterns import TokenSpec
from .fused_dense import DotProductForward, PerceiverForward, UntiedPerceiverForward
from .fused_forward import IMPLEMENTATION_ARGUMENTS, FusedForward, fused_class
from .fused_mixed import MixedForward, UntiedMixedForward

PACKAGES = ("noether", "emmi", "ksuit")


class _Known(NamedTuple):
    """An attention class: what stands in for it, and which arguments its ``forward`` may have."""

    forward: type[FusedForward]
    required: tuple[str, ...]
    optional: tuple[str, ...]


_MIXED = (("x", "token_specs", "attention_patterns"), ("attention_mask", "key_padding_mask", "freqs", "kv_cache"))
_PERCEIVER = (("q", "kv"), ("attn_mask", "q_freqs", "k_freqs", "kv_cache"))
# A version with another class or other arguments is left as it is.
_FORWARDS = {
    "DotProductAttention": _Known(DotProductForward, ("x",), ("attn_mask", "freqs")),
    "MixedAttention": _Known(MixedForward, *_MIXED),
    "UntiedMixedAttention": _Known(UntiedMixedForward, *_MIXED),
    "PerceiverAttention": _Known(PerceiverForward, *_PERCEIVER),
    "UntiedPerceiverAttention": _Known(UntiedPerceiverForward, ("q", "token_specs", "kv"), _PERCEIVER[1]),
}
_KNOWN_CHILDREN = {"qkv", "q", "k", "v", "kv", "proj", "proj_dropout", "q_norm", "k_norm"}
_NORMS = (nn.Identity, nn.RMSNorm)
ALREADY = "already accelerated"


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
    replaced: list[ReplacedModule] = []
    left: list[LeftModule] = []
    users = {
        id(child): module
        for module in model.modules()
        for name, child in module.named_children()
        if name == "mixed_attention"
    }
    # Modules of the same kind and sizes are compared once.
    verdicts: dict[Any, str | None] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedForward):
            left.append(LeftModule(name, module.original_class.__name__, ALREADY))
        elif _looks_like_attention(module):
            user = users.get(id(module))
            class_name, used_by = type(module).__name__, "" if user is None else type(user).__name__
            try:
                forward = _known_forward(type(module), tuple(packages))
                _check_instance(module)
                if verify:
                    _check_results(module, forward, tuple(getattr(user, "branches", ())), verdicts)
            except ValueError as error:
                left.append(LeftModule(name, class_name, str(error)))
                continue
            module.__class__ = fused_class(forward, type(module))
            replaced.append(ReplacedModule(name, class_name, used_by))
    report = AccelerationReport(tuple(replaced), tuple(left))
    if not replaced and not any(module.reason == ALREADY for module in left):
        reasons = str(report) if left else f"{type(model).__name__} holds no attention of {', '.join(packages)}"
        warnings.warn(f"accelerate replaced nothing: {reasons}", stacklevel=2)
    return report


def restore(model: nn.Module) -> int:
    """Undoes :func:`accelerate`.

    Returns:
        The number of modules that were restored.
    """
    restored = 0
    for module in model.modules():
        # Not inherited: a class that others made of ours, as fully_shard does, stays what it is.
        original = vars(type(module)).get("original_class")
        if isinstance(module, FusedForward) and original is not None:
            nn.Module.__setattr__(module, "__class__", original)
            restored += 1
    return restored


def accelerated_class(original: type[nn.Module], *, packages: Sequence[str] = PACKAGES) -> type[nn.Module]:
    """Returns the subclass of an attention class whose ``forward`` is computed by this package.

    Args:
        original: The class of a known attention module, or a subclass that does not change how it attends.
        packages: Top-level packages whose classes are treated as the known ones.

    Raises:
        ValueError: If the class is not known, or changes what would be replaced.
    """
    return fused_class(_known_forward(original, tuple(packages)), original)


@bounded_cache
def _known_forward(original: type[nn.Module], packages: tuple[str, ...]) -> type[FusedForward]:
    definer = next(base for base in original.__mro__ if "forward" in vars(base))
    known = _FORWARDS.get(definer.__name__)
    if known is None or definer.__module__.split(".")[0] not in packages:
        raise ValueError(f"its forward is that of {definer.__module__}.{definer.__qualname__}, which is not known")
    _check_arguments(definer, known)
    steps = {name for base in definer.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    for base in original.__mro__[: original.__mro__.index(definer)]:
        changed = sorted(name for name in steps & set(vars(base)) if not name.startswith(("__", "_abc_")))
        if changed:
            raise ValueError(f"{base.__qualname__} changes {', '.join(changed)}, which the fused forward does not call")
    return known.forward


def _check_arguments(definer: type[nn.Module], known: _Known) -> None:
    parameters = dict(list(inspect.signature(vars(definer)["forward"]).parameters.items())[1:])
    names = tuple(parameters)
    unknown = set(names) - {*known.required, *known.optional, *IMPLEMENTATION_ARGUMENTS}
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    causal = "is_causal" in parameters and parameters["is_causal"].default is not False
    if unknown or variadic or causal or not set(known.required) <= set(names):
        raise ValueError(f"forward of {definer.__qualname__} has the arguments {names}, which are not known")


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
    for name in ("q_norm", "k_norm"):
        norm = getattr(module, name, None)
        if norm is not None and type(norm) not in _NORMS:
            raise ValueError(f"its {name} is {type(norm).__name__}, which the fused forward does not know")
    own = sorted(name for name, _ in module.named_parameters(recurse=False))
    if own:
        raise ValueError(f"it holds the parameters {', '.join(own)}, which the fused forward does not know")
    buffers = sorted(name for name, _ in module.named_buffers(recurse=False))
    if buffers:
        # Equal results with these values say nothing about others.
        raise ValueError(f"it holds the buffers {', '.join(buffers)}, which the fused forward does not know")


def _check_results(
    module: nn.Module, forward: type[FusedForward], branches: tuple[str, ...], verdicts: dict[Any, str | None]
) -> None:
    from . import verification  # takes a while, and only this needs it

    key = verification.signature(module, forward, branches)
    if key is None or key not in verdicts:
        try:
            verdict = verification.difference(module, forward, branches)
        except verification.Unverifiable as error:
            verdict = f"it could not be verified, {error}: verify=False replaces it without verification"
        if key is None:
            key = id(module)
        verdicts[key] = verdict
    found = verdicts[key]
    if found is not None:
        raise ValueError(found)


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
