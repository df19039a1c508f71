"""Speeds up trained models of PhysicsNeMo (on PyPI ``nvidia-physicsnemo``) in place.

What it replaces is FLARE attention, in which learnt latents read all tokens and all tokens read the latents: in the
model FLARE and, with a context that the tokens read besides, in GeoTransolver with ``attention_type="GALE_FA"``.
Nothing of that package is imported, and the parameters stay the same objects under the same names::

    print(accelerate(model))
    fields = model(local_embedding=points, geometry=surface)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .acceleration import AccelerationReport, Family, Known, LeftModule, ReplacedModule, check_held, restore
from .acceleration import replace_attention as _replace_attention
from .fused_latent import ContextFlareForward, FlareForward
from .physicsnemo_shards import register_shard_tensor

__all__ = [
    "PACKAGES",
    "AccelerationReport",
    "LeftModule",
    "ReplacedModule",
    "accelerate",
    "register_shard_tensor",
    "restore",
]

PACKAGES = ("physicsnemo",)

_CHILDREN = ("in_project_x", "self_k", "self_v", "out_linear", "out_dropout")
_CONTEXT_CHILDREN = ("cross_q", "cross_k", "cross_v", "concat_project")
_SLICES = (
    "its softmax runs over the slices of a token, and what it sums over the tokens has no softmax over them; "
    "attention_type='GALE_FA' and the model FLARE have attention that can be replaced"
)


def accelerate(model: nn.Module, *, packages: Sequence[str] = PACKAGES, verify: bool = True) -> AccelerationReport:
    """Lets this package compute the attention of a model, in place.

    It replaces the attention layers ``FLARE`` and ``GALE_FA``. A replaced module stays the same object, with its
    parameters and hooks; its new class is a subclass of the old one. Dropout is as before. The attention over slices of
    Transolver and of GALE is left as it is: it is not attention of tokens to tokens. A call with distributed tensors
    runs the original ``forward``.

    Args:
        model: Any module; its submodules are searched.
        packages: Top-level packages whose classes are treated as the known ones.
        verify: Whether to compare each module with its original on small random inputs before it is replaced: one and
            several streams of tokens, one token and many, with and without a context, results and gradients, in the
            module's dtype and on its device. A module that differs, or can't be run, is left as it is and reported.
            The model itself is not called; its parameters, hooks and training mode and torch's random generators stay
            as they are.

    Returns:
        What was replaced and what was left, with the reason. ``print`` shows it as a table.

    Warns:
        UserWarning: If nothing was replaced; the message says why.
    """
    return _replace_attention(model, _FAMILY, packages, verify)


def _is_attention(module: nn.Module) -> bool:
    if any(_is_attention(child) for child in module.children()):
        return False
    return "q_global" in module._parameters or any("Attention" in base.__name__ for base in type(module).__mro__)


def _check_instance(module: nn.Module) -> None:
    if getattr(module, "use_te", False):
        raise ValueError("it runs on Transformer Engine")
    missing = sorted(name for name in _CHILDREN if not isinstance(getattr(module, name, None), nn.Module))
    if missing or "q_global" not in module._parameters:
        raise ValueError(f"it lacks {', '.join(missing or ['q_global'])}, which the fused forward needs")
    check_held(module, (*_CHILDREN, *_CONTEXT_CHILDREN), ("q_global", "state_mixing"))
    for name in ("in_project_x", "cross_k"):
        layer = getattr(module, name, None)
        if layer is not None and not isinstance(getattr(layer, "in_features", None), int):
            raise ValueError(f"its {name} is {type(layer).__name__}, which the fused forward does not know")


_FAMILY = Family(
    known={
        "FLARE": Known(FlareForward, ("x",), ()),
        "GALE_FA": Known(ContextFlareForward, ("x",), ("context",)),
    },
    is_attention=_is_attention,
    check_instance=_check_instance,
    reasons={"PhysicsAttentionBase": _SLICES},
)
