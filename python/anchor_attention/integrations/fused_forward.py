"""Classes that stand in for attention classes of other packages: what they share."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..modules.checks import Freqs
from ..modules.plan import bounded_cache
from ..modules.projection import is_plain_linear
from ..modules.steps import split_heads

# Arguments that choose among implementations of the same attention.
IMPLEMENTATION_ARGUMENTS = ("attn_implementation", "attn_impl", "is_causal")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = Mapping[str, Any]


class FusedForward(nn.Module):
    """Base of the stand-ins. Each is put before the class that it stands in for, whose attributes it uses.

    Attributes:
        original_class: The class that it stands in for.
        argument_names: The arguments of that class' ``forward``, in order.
    """

    original_class: ClassVar[type[nn.Module]]
    argument_names: ClassVar[tuple[str, ...]]

    num_heads: int
    head_dim: int
    use_rope: bool
    dropout: float
    # Their layers, which an original may have replaced by whatever can be called.
    q: Any
    k: Any
    v: Any
    proj: Any
    proj_dropout: Any

    def fused(self, arguments: Arguments) -> Any:
        """Returns what the original's ``forward`` returns, or ``None`` where this package can't compute it.

        Args:
            arguments: The call's arguments by name.
        """
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the two that it was made of.
        return _empty_module, (type(self).__mro__[1], self.original_class), self.__dict__

    def _returns_cache(self) -> bool:
        return "kv_cache" in self.argument_names

    def _is_usual(self, arguments: Arguments) -> bool:
        """Whether a call is attention without dropout and without a causal mask."""
        drops = self.training and self.dropout > 0
        return not drops and not arguments.get("is_causal") and not getattr(self, "is_causal", False)

    def _takes(self, x: Any, width: int | None = None) -> bool:
        """Whether x is (B, N, width) of a type that the operation computes with."""
        if not isinstance(x, Tensor) or x.dim() != 3 or (width is not None and x.shape[2] != width):
            return False
        return x.dtype in {"cpu": CPU_DTYPES, "cuda": CUDA_DTYPES}.get(x.device.type, ())

    def _rotates(self, x: Tensor, freqs: Any) -> bool:
        """Whether freqs are missing where they must be, or (B or 1, N, head_dim / 2) complex in x's precision."""
        if not self.use_rope or freqs is None:
            return self.use_rope == (freqs is not None)
        if not isinstance(freqs, Tensor) or freqs.dim() != 3 or freqs.device != x.device:
            return False
        complex_type = torch.complex128 if x.dtype == torch.float64 else torch.complex64
        return freqs.dtype == complex_type and freqs.shape[2] * 2 == self.head_dim and same_tokens(freqs, x)

    def _heads(self, projected: Tensor) -> Tensor:
        return split_heads(projected, self.num_heads, self.head_dim)

    def _normalised(self, name: str, heads: Tensor) -> Tensor:
        """Heads as the module's norm ``q_norm`` or ``k_norm`` leaves them, or as ``qk_norm`` asks."""
        norm = getattr(self, name, None)
        if isinstance(norm, nn.Module):
            normalised: Tensor = norm(heads)
            return normalised.to(heads.dtype)
        if getattr(self, "qk_norm", False):
            return nn.functional.rms_norm(heads, (heads.shape[-1],))
        return heads

    def _are_plain(self, *names: str) -> bool:
        """Whether calling these layers is the same as reading their weights, which is all that the original does."""
        return all(is_plain_linear(getattr(self, name)) for name in names)


@bounded_cache
def fused_class(forward: type[FusedForward], original: type[nn.Module]) -> type[FusedForward]:
    """Makes the subclass of ``original`` with the forward pass of ``forward``. Does not check that they match."""
    names = tuple(inspect.signature(original.forward).parameters)[1:]

    @functools.wraps(original.forward)
    def call(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False))
        result = None
        if len(args) <= len(names) and not any(name in arguments or name not in names for name in kwargs):
            arguments.update(kwargs)
            result = self.fused(arguments)
        return original.forward(self, *args, **kwargs) if result is None else result

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            original_class=original,
            argument_names=names,
            forward=call,
            __module__=__name__,
            __doc__=original.__doc__,
        )

    fused: type[FusedForward] = types.new_class(f"Accelerated{original.__name__}", (forward, original), exec_body=fill)
    return fused


def _empty_module(forward: type[FusedForward], original: type[nn.Module]) -> nn.Module:
    fused = fused_class(forward, original)
    module: nn.Module = fused.__new__(fused)
    return module


def arguments_of(arguments: Arguments, *names: str) -> tuple[Any, ...]:
    """The arguments of these names, ``None`` for those that the call does not give."""
    return tuple(arguments.get(name) for name in names)


def same_batch(tensor: Tensor, x: Tensor) -> bool:
    """Whether a tensor (B or 1, …) has the batch of x."""
    # By ==, as a compiler's symbolic sizes are not found in a tuple.
    return tensor.shape[0] == x.shape[0] or tensor.shape[0] == 1


def same_tokens(tensor: Tensor, x: Tensor) -> bool:
    """Whether a tensor (B or 1, N, …) has the batch and the tokens of x."""
    # Sizes can be symbolic while a compiler traces: there the operation checks, without a guard.
    return torch.compiler.is_compiling() or (same_batch(tensor, x) and tensor.shape[1] == x.shape[1])


def angles_fit(x: Tensor, freqs: Freqs | None) -> bool:
    """Whether freqs are the legacy form: equally wide angles (B or 1, N, width) for every axis."""
    if not isinstance(freqs, tuple) or not freqs or x.dtype not in (torch.float32, torch.float64):
        return False
    return all(
        isinstance(angles, Tensor)
        and angles.dim() == 3
        and angles.is_floating_point()
        and angles.shape[2] == freqs[0].shape[2]
        and angles.device == x.device
        and same_tokens(angles, x)
        for angles in freqs
    )
