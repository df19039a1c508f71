"""Projections: how they are initialised, and when the weight of one says all about it, so that a part of it can be used
without calling the layer.

Much of what other packages do to a layer shows only when it is called: hooks that recompute, prune, gather or load its
weight, parametrisations, quantised weights, a ``forward`` of its own. What is not surely a plain layer is called.
"""

from __future__ import annotations

import torch
from torch import nn

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


def _is_plain(tensor: torch.Tensor | None) -> bool:
    # torch.func puts plain tensors in the place of parameters, and torch.export fake ones.
    return type(tensor) in (nn.Parameter, torch.Tensor) or type(tensor).__module__ == "torch._subclasses.fake_tensor"
