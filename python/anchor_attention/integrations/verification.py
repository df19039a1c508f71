"""Compares a stand-in with its original on small random inputs that cover the calls a module may get.

Both run on a twin of the module that has the same layer classes and settings, but none of the user's hooks, and its own
buffers. Where all parameters are plain, the twin has random ones, so that attention is far from uniform even in a model
that was just initialised. The module itself is never called, and no part of it is changed.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .fused_forward import Arguments, FusedForward, fused_class
from .verification_cases import Call, branch_names, cases, random_values

# Of the largest value of a result, in units of its type's rounding: sums in another order, exponentials of scores.
ROUNDINGS = 8
# The least tolerance, for types whose rounding is finer than that of the factors of the rotation.
RELATIVE_TOLERANCE = 1e-4


class Unverifiable(Exception):
    """The original can't be run on inputs made for it."""


def difference(module: nn.Module, forward: type[FusedForward], branches: Sequence[str]) -> str | None:
    """Compares a module's own forward pass with that of a stand-in.

    Args:
        module: The original.
        forward: The stand-in's class.
        branches: Names of the branches that the module may get, as far as they are known.

    Returns:
        Where they differ and by how much, ``None`` if they agree.

    Raises:
        Unverifiable: If the original fails on every input.
    """
    device = _device_of(module)
    plain = _has_plain_parameters(module)
    state = _GeneratorStates(device)
    with state, torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        twin = _copied(module, device if plain else None)
        dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
        if plain and dtype in (torch.float16, torch.bfloat16):
            # Half precision would hide many differences.
            by = _difference(_copied(module, device).float(), forward, branches, device, torch.float32)
            if by is not None:
                return by
        return _difference(twin, forward, branches, device, dtype)


def _difference(
    original: nn.Module,
    forward: type[FusedForward],
    branches: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    fused = copy.copy(original)
    fused.__dict__ = original.__dict__.copy()
    stand_in = fused_class(forward, type(original))
    # Whether the stand-in computed the last call, and left nothing of it to the original.
    computed: list[bool] = []

    def counting(self: FusedForward, arguments: Arguments) -> Any:
        result = stand_in.fused(self, arguments)
        computed.append(result is not None)
        return result

    fused.__class__ = type(stand_in.__name__, (stand_in,), {"fused": counting})
    compared = 0
    errors: list[str] = []
    for name, call, trains in cases(original, branches, device, dtype):
        for module in (original, fused):
            _set_training(module, trains and not getattr(original, "dropout", 0.0) > 0)
        try:
            expected = _run(original, call)
        except Exception as error:
            # Not every version supports everything: where the original refuses, there is nothing to compare with.
            errors.append(f"{type(error).__name__}: {error}")
            continue
        compared += 1
        try:
            found = _run(fused, call)
        except Exception as error:
            return f"fails with {name} ({type(error).__name__}: {error:.120})"
        by = _distance(expected, found)
        if by is not None:
            return f"differs from the original with {name}: {by}"
    if not compared:
        raise Unverifiable(f"its own forward fails on small random inputs ({errors[0] if errors else 'no case':.120})")
    if not any(computed):
        raise Unverifiable(
            "every call would be computed by its own forward, which reads weights of layers that are not plain"
        )
    return None


def signature(module: nn.Module, forward: type[FusedForward], branches: Sequence[str]) -> Any:
    """What the outcome depends on, ``None`` if it may depend on more than can be listed."""
    parts = [(name, type(part)) for name, part in module.named_modules()]
    if not _has_plain_parameters(module):
        return None
    plain = (bool, int, float, str, type(None), torch.dtype, tuple)
    settings = []
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules", "training") or key.endswith("_hooks"):
                continue
            if key.startswith("_") and (value is None or (isinstance(value, (dict, set)) and not value)):
                continue
            if isinstance(value, plain):
                # With the type: numbers of different types can be equal.
                settings.append((name, key, type(value), value))
            elif key not in ("_forward_hooks_with_kwargs", "_non_persistent_buffers_set"):
                return None
    shapes = tuple((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters())
    names = tuple(sorted(branch_names(module, branches)))
    listed = forward, type(module), tuple(parts), tuple(settings), shapes, names
    try:
        hash(listed)
    except TypeError:
        return None
    return listed


class _GeneratorStates(contextlib.AbstractContextManager[None]):
    """Leaves torch's generators as they were, and begins with the same state of the CPU's every time."""

    def __init__(self, device: torch.device) -> None:
        self._devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=self._devices)
        self._fork.__enter__()
        # Not torch.manual_seed, which seeds every device, also those that are not used yet.
        torch.default_generator.manual_seed(0)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def _device_of(module: nn.Module) -> torch.device:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    # What a model on the meta device will compute can be seen on the CPU, with parameters of the twin's own.
    return torch.device("cpu") if device.type == "meta" else device


def _has_plain_parameters(module: nn.Module) -> bool:
    """Whether the module and its layers consist of plain parameters only, so that these can be replaced."""
    for part in module.modules():
        if "forward" in vars(part) or any(isinstance(value, Tensor) for value in vars(part).values()):
            return False
        for parameter in part._parameters.values():
            if parameter is not None and not (type(parameter) is nn.Parameter and parameter.is_floating_point()):
                return False
    return True


def _copied(module: nn.Module, device: torch.device | None) -> nn.Module:
    """The module and its submodules anew, without hooks; with random parameters on the device, or with the same."""
    twin: nn.Module = module.__class__.__new__(module.__class__)
    twin.__dict__ = module.__dict__.copy()
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            twin.__dict__[name] = OrderedDict(
                # Of a layer that is not plain: pruning and the older weight normalisation compute the weights in hooks.
                (key, hook)
                for key, hook in value.items()
                if device is None and type(hook).__module__.startswith("torch.nn.utils.")
            )
    twin.__dict__["_parameters"] = {
        name: parameter if parameter is None or device is None else _random_like(parameter, device)
        for name, parameter in module._parameters.items()
    }
    # A layer may change them in its forward.
    twin.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.detach().clone() for name, buffer in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else _copied(child, device) for name, child in module._modules.items()
    }
    return twin


def _random_like(parameter: Tensor, device: torch.device) -> nn.Parameter:
    scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
    values = random_values(*parameter.shape) * scale + (1.0 if parameter.dim() == 1 else 0.0)
    return nn.Parameter(values.to(device, parameter.dtype), requires_grad=parameter.requires_grad)


def _set_training(module: nn.Module, trains: bool) -> None:
    for part in module.modules():
        part.training = trains


def _run(module: nn.Module, call: Call) -> list[Tensor | None]:
    """What a call returns, what goes into the output projection, and the gradients of the tokens.

    Raises:
        RuntimeError: If there are no values in what it returns.
    """
    results = [leaf for leaf in tree_leaves(call(module)) if isinstance(leaf, Tensor)]
    if any(result.is_meta for result in results):
        raise RuntimeError("its weights are on the meta device")
    return list(results)


def _distance(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> str | None:
    if len(expected) != len(found):
        return f"{len(found)} tensors instead of {len(expected)}"
    for right, ours in zip(expected, found, strict=True):
        if right is None or ours is None:
            if right is not ours:
                return "a gradient is missing"
            continue
        if right.shape != ours.shape or right.dtype != ours.dtype:
            return f"{ours.dtype} of shape {tuple(ours.shape)} instead of {right.dtype} {tuple(right.shape)}"
        if not right.is_floating_point() or right.numel() == 0:
            continue
        tolerance = max(ROUNDINGS * torch.finfo(right.dtype).eps, RELATIVE_TOLERANCE)
        right, ours = right.double(), ours.double()
        scale = float(right.abs().max())
        by = float((right - ours).abs().max())
        if not by <= tolerance * max(scale, 1e-6):
            return f"by {by / max(scale, 1e-6):.2g} of the largest value"
    return None
