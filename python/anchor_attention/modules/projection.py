"""Projections: how they are initialised, when the weight of one says all about it, so that a part of it can be used
without calling the layer, and in which type they are computed.

Much of what other packages do to a layer shows only when it is called: hooks that recompute, prune, gather or load its
weight, parametrisations, quantised weights, a ``forward`` of its own. What is not surely a plain layer is called.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn

# Private, but the only place where hooks of all modules are kept.
from torch.nn.modules import module as _module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD = nn.Linear.forward


def make_norm(head_dim: int, qk_norm: bool | str) -> nn.Module:
    """The norm of the queries or keys of every head."""
    if not qk_norm:
        return nn.Identity()
    return nn.RMSNorm(head_dim, elementwise_affine=qk_norm == "rms")


def initialise(module: nn.Module, init_weights: str, proj: nn.Linear) -> None:
    """Initialises the projections that a module holds as ``init_weights`` says, and the weights of its norms by 1."""
    for child in module.children():
        if isinstance(child, nn.RMSNorm):
            child.reset_parameters()
        if not isinstance(child, nn.Linear):
            continue
        if init_weights == "torch":
            child.reset_parameters()
            continue
        if init_weights == "zeros" or (init_weights == "truncnormal002-identity" and child is proj):
            nn.init.zeros_(child.weight)
        else:
            nn.init.trunc_normal_(child.weight, std=0.02)
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a plain linear layer is computed as :func:`linear` does."""
    if _narrow_dtype(x) is not None and is_plain_linear(layer):
        return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
    result: Tensor = layer(x)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, in float32 where the processor has no products of the 16-bit type asked for.

    There torch multiplies element by element: on a processor with AVX2 alone, tens of times slower than in float32. The
    result is of the type that ``linear`` would return, rounded once.
    """
    narrow = _narrow_dtype(x)
    tensors = [x, weight] if bias is None else [x, weight, bias]
    # Without autocast, types that differ are an error, which torch words better.
    if narrow is None or not (torch.is_autocast_enabled("cpu") or all(tensor.dtype == narrow for tensor in tensors)):
        return nn.functional.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return nn.functional.linear(*(tensor.float() for tensor in tensors)).to(narrow)


def _narrow_dtype(x: Tensor) -> torch.dtype | None:
    """The 16-bit type in which torch would multiply x, if this processor has no products of it; else None.

    A compiled or exported graph keeps its own type: it may run elsewhere.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return None if dtype not in (torch.bfloat16, torch.float16) or _has_products(dtype) else dtype


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether torch's products of matrices of a 16-bit type use instructions of this processor."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # oneDNN looks at the processor, and torch's own kernels may be held to less.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    is_supported = getattr(torch.ops.mkldnn, name, None)
    return is_supported is None or bool(is_supported())


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is the same as ``linear(x, layer.weight, layer.bias)``, and nothing besides."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or nn.Linear.forward is not _FORWARD:
        return False
    if any(getattr(layer, hooks) for hooks in _HOOKS) or _any_global_hook():
        return False
    parameters = layer._parameters
    # Pruning and weight normalisation keep a tensor of that name that is no parameter.
    if "weight" not in parameters or not _is_plain(parameters["weight"]):
        return False
    return "bias" in parameters and (parameters["bias"] is None or _is_plain(parameters["bias"]))


def _any_global_hook() -> bool:
    for hooks in (
        _module._global_forward_hooks,
        _module._global_forward_pre_hooks,
        _module._global_backward_hooks,
        _module._global_backward_pre_hooks,
    ):
        for hook in hooks.values():
            # torch's own counters follow every module by such hooks, and are there to see what is computed.
            if getattr(hook, "__module__", None) != "torch.utils.module_tracker":
                return True
    return False


def _is_plain(tensor: Tensor | None) -> bool:
    # torch.func puts plain tensors in the place of parameters, and torch.export fake ones.
    return type(tensor) in (nn.Parameter, Tensor) or type(tensor).__module__ == "torch._subclasses.fake_tensor"
