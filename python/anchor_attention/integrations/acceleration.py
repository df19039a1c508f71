"""Replaces attention modules of another package in place, and reports it: what the integrations share.

Nothing of the other package is imported: its classes are recognised by their package, their names and the arguments of
their ``forward``, and each module is compared with its original before it is replaced.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..modules.plan import bounded_cache
from .fused_forward import IMPLEMENTATION_ARGUMENTS, FusedForward, fused_class

ALREADY = "already accelerated"


class Known(NamedTuple):
    """An attention class: what stands in for it, and which arguments its ``forward`` may have."""

    forward: type[FusedForward]
    required: tuple[str, ...]
    optional: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """The attention classes of a package.

    Args:
        known: The classes that can be replaced, by the name of the class that defines ``forward``. A version with
            another class or other arguments is left as it is.
        is_attention: Whether a module is to be replaced or reported.
        check_instance: Raises ValueError, with the reason, for a module that holds what its stand-in does not know.
        reasons: Why classes that are known are not replaced, by the name of the class or of a base.
    """

    known: Mapping[str, Known]
    is_attention: Callable[[nn.Module], bool]
    check_instance: Callable[[nn.Module], None]
    reasons: Mapping[str, str] = field(default_factory=dict)


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
    """What ``accelerate`` did to a model."""

    replaced: tuple[ReplacedModule, ...]
    left: tuple[LeftModule, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, left {len(self.left)}"]
        for module in self.replaced:
            used_by = f" of {module.used_by}" if module.used_by else ""
            lines.append(f"  replaced {module.name or 'the model itself'}: {module.class_name}{used_by}")
        lines += [f"  left {module.name or 'the model itself'}: {module.reason}" for module in self.left]
        return "\n".join(lines)


def replace_attention(model: nn.Module, family: Family, packages: Sequence[str], verify: bool) -> AccelerationReport:
    """Replaces what can be replaced: the work of every ``accelerate``, which is its only kind of caller.

    Args:
        model: Any module; its submodules are searched.
        family: What is looked for.
        packages: Top-level packages whose classes are treated as the known ones.
        verify: Whether to compare each module with its original first.

    Warns:
        UserWarning: If nothing was replaced, at the line that called ``accelerate``.
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
        elif family.is_attention(module):
            user = users.get(id(module))
            class_name, used_by = type(module).__name__, "" if user is None else type(user).__name__
            try:
                forward = known_forward(type(module), family, tuple(packages))
                _check_instance(module, family)
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
        warnings.warn(f"accelerate replaced nothing: {reasons}", stacklevel=3)
    return report


def restore(model: nn.Module) -> int:
    """Undoes ``accelerate``.

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


@bounded_cache
def known_forward(original: type[nn.Module], family: Family, packages: tuple[str, ...]) -> type[FusedForward]:
    """Returns the stand-in of a class.

    Raises:
        ValueError: If the class is not known, or changes what would be replaced.
    """
    definer = next(base for base in original.__mro__ if "forward" in vars(base))
    known = family.known.get(definer.__name__)
    if known is None or definer.__module__.split(".")[0] not in packages:
        for base in original.__mro__:
            if base.__name__ in family.reasons and base.__module__.split(".")[0] in packages:
                raise ValueError(family.reasons[base.__name__])
        raise ValueError(f"its forward is that of {definer.__module__}.{definer.__qualname__}, which is not known")
    _check_arguments(definer, known)
    steps = {name for base in definer.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    for base in original.__mro__[: original.__mro__.index(definer)]:
        changed = sorted(name for name in steps & set(vars(base)) if not name.startswith(("__", "_abc_")))
        if changed:
            raise ValueError(f"{base.__qualname__} changes {', '.join(changed)}, which the fused forward does not call")
    return known.forward


def check_held(module: nn.Module, children: Sequence[str], parameters: Sequence[str] = ()) -> None:
    """Raises ValueError for layers, parameters and buffers besides those that a stand-in knows."""
    held = {
        "": set(dict(module.named_children())) - set(children),
        "the parameters ": {name for name, _ in module.named_parameters(recurse=False)} - set(parameters),
        # Equal results with these values say nothing about others.
        "the buffers ": {name for name, _ in module.named_buffers(recurse=False)},
    }
    for kind, names in held.items():
        if names:
            raise ValueError(f"it holds {kind}{', '.join(sorted(names))}, which the fused forward does not know")


def _check_arguments(definer: type[nn.Module], known: Known) -> None:
    parameters = dict(list(inspect.signature(vars(definer)["forward"]).parameters.items())[1:])
    names = tuple(parameters)
    unknown = set(names) - {*known.required, *known.optional, *IMPLEMENTATION_ARGUMENTS}
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    causal = "is_causal" in parameters and parameters["is_causal"].default is not False
    if unknown or variadic or causal or not set(known.required) <= set(names):
        raise ValueError(f"forward of {definer.__qualname__} has the arguments {names}, which are not known")


def _check_instance(module: nn.Module, family: Family) -> None:
    if "forward" in vars(module):
        raise ValueError("forward is set on the instance")
    family.check_instance(module)


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
