"""Where the shared tests run the operations: on the CPU, on a GPU, or on the emulator of one.

On the emulator tensors stay in CPU memory; the launch plans of the CUDA kernels and the PTX that nvcc made of them
compute. Arguments are checked by nobody there: that is the same C++ for every device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from tools import cuda_plans
from tools.cuda_plans.run import Array, Table

from anchor_attention import KeyRangeTable, anchor_attention_reference

HAS_CUDA = torch.cuda.is_available()
# A Hopper GPU has kernels of its own for 16-bit types; for others it runs those of every architecture.
EMULATED_HOPPER = "emulated_hopper"
_EVERY_DTYPE = ("cpu", "emulated", *(["cuda"] * HAS_CUDA))
_NARROW = (*_EVERY_DTYPE, EMULATED_HOPPER)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _parameter(name: str, *others: Any) -> Any:
    """A device, and what goes with it, as a parameter of a test; the emulator executes what nvcc compiles."""
    return pytest.param(name, *others, marks=[pytest.mark.emulator, pytest.mark.needs_nvcc] * ("emulated" in name))


DEVICES = [_parameter(name) for name in _EVERY_DTYPE]
NARROW_DEVICES = [_parameter(name) for name in _NARROW]
DEVICES_AND_DTYPES = [
    _parameter(name, dtype) for dtype in DTYPES for name in (_NARROW if dtype.itemsize == 2 else _EVERY_DTYPE)
]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Device:
    """A device by its name in the tests: "cpu", "emulated", "emulated_hopper" or "cuda"."""

    name: str

    @property
    def memory(self) -> str:
        """The torch device that holds the tensors."""
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def is_emulated(self) -> bool:
        """Whether the kernels are executed by the emulator, for which inputs should be small."""
        return self.name.startswith("emulated")

    @contextmanager
    def executing(self) -> Iterator[Device]:
        """While it lasts, this device executes the operations on tensors in its memory."""
        if not self.is_emulated:
            yield self
            return
        library = torch.library.Library("anchor_attention", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
            generation = "sm90" if self.name == EMULATED_HOPPER else "sm80"
            functions = (
                attention,
                attention_backward,
                attention_jvp,
                attention_double_backward,
                rope,
                rope_backward,
            )
            for function in functions:
                implementation = partial(function, generation=generation)
                library.impl(function.__name__, implementation, "CPU", allow_override=True)
        try:
            yield self
        finally:
            library._destroy()


def _array(tensor: torch.Tensor | None) -> Array | None:
    """The tensor's own memory, with its strides; bfloat16 and float16 as their bits."""
    if tensor is None:
        return None
    tensor = tensor.detach().resolve_conj()
    return tensor.view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Gradients and tangents come in any layout; the kernels read those whose last axis is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tensor(array: Array, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).view(like.dtype)


def _entries(q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int]) -> Table:
    keys = list(zip(k_ranges[::2], k_ranges[1::2], strict=True))
    queries = zip(q_ranges[::2], q_ranges[1::2], strict=True)
    return [(group, keys[first:last]) for group, (first, last) in zip(queries, pairwise(k_offsets), strict=True)]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int],
    q_freqs: torch.Tensor | None = None, key_mask: torch.Tensor | None = None, scale: float | None = None,
    allow_tf32: bool = False, *, generation: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``anchor_attention::attention``; float64, which the GPU kernels do not take, by plain PyTorch."""
    if q.dtype == torch.float64:
        table = KeyRangeTable(q_ranges, k_offsets, k_ranges)
        return anchor_attention_reference(
            q, k, v, table, q_freqs=q_freqs, key_mask=key_mask, scale=scale, return_lse=True
        )
    out, lse = cuda_plans.attention_forward(
        _NAMES[q.dtype], *map(_array, (q, k, v)), _entries(q_ranges, k_offsets, k_ranges), q_freqs=_array(q_freqs),
        key_mask=_array(key_mask), scale=scale, allow_tf32=allow_tf32,
        run=cuda_plans.KernelRun(generation=generation),
    )  # fmt: skip
    return _tensor(out, q), torch.from_numpy(lse)


def attention_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor,
    q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int],
    q_freqs: torch.Tensor | None, key_mask: torch.Tensor | None, scale: float | None, allow_tf32: bool,
    need_q: bool, need_k: bool, need_v: bool, need_q_freqs: bool, *, generation: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """``anchor_attention::attention_backward``, not for float64."""
    needed = {"q": need_q, "k": need_k, "v": need_v, "q_freqs": need_q_freqs}
    grads = cuda_plans.attention_backward(
        _NAMES[q.dtype], *map(_array, (q, k, v)), _entries(q_ranges, k_offsets, k_ranges),
        *map(_array, (out, lse, _readable(grad_out))),
        grad_lse=None if grad_lse is None else _array(grad_lse.contiguous()), q_freqs=_array(q_freqs),
        key_mask=_array(key_mask), scale=scale, allow_tf32=allow_tf32,
        run=cuda_plans.KernelRun(generation=generation),
        wanted=[name for name, is_needed in needed.items() if is_needed],
    )  # fmt: skip
    like = {"q": q, "k": k, "v": v, "q_freqs": q_freqs}
    return tuple(
        _tensor(grads[name], tensor) if name in grads and tensor is not None else q.new_empty(0)
        for name, tensor in like.items()
    )


def attention_jvp(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None,
    q_tangents: torch.Tensor | None, k_tangents: torch.Tensor | None, v_tangents: torch.Tensor | None,
    q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int],
    key_mask: torch.Tensor | None = None, scale: float | None = None, *, generation: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """``anchor_attention::attention_jvp``, not for float64."""
    of_q, of_k, of_v = (None if t is None else _array(_readable(t)) for t in (q_tangents, k_tangents, v_tangents))
    arrays = cuda_plans.attention_jvp(
        _NAMES[q.dtype], *map(_array, (q, k, v)), _entries(q_ranges, k_offsets, k_ranges), out=_array(out),
        lse=_array(lse), q_tangents=of_q, k_tangents=of_k, v_tangents=of_v, key_mask=_array(key_mask), scale=scale,
        run=cuda_plans.KernelRun(generation=generation),
    )  # fmt: skip
    new_out, new_lse, out_tangents, lse_tangents = arrays
    value = (_tensor(new_out, q), torch.from_numpy(new_lse)) if out is None else (q.new_empty(0), q.new_empty(0))
    return *value, _tensor(out_tangents, q), torch.from_numpy(lse_tangents)


def attention_double_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, q_tangent: torch.Tensor | None, k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None, q_ranges: Sequence[int], k_offsets: Sequence[int], k_ranges: Sequence[int],
    key_mask: torch.Tensor | None, scale: float | None, need_q: bool, need_k: bool, need_v: bool, *, generation: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """``anchor_attention::attention_double_backward``, not for float64."""
    along = [None if t is None else _readable(t) for t in (q_tangent, k_tangent, v_tangent)]
    table = (q_ranges, k_offsets, k_ranges)
    _, _, out_tangent, lse_tangent = (
        result[0] if result.numel() else result
        for result in attention_jvp(
            q, k, v, out, lse, *(None if t is None else t[None] for t in along), *table, key_mask, scale,
            generation=generation,
        )
    )  # fmt: skip
    needed = {"q": need_q, "k": need_k, "v": need_v}
    of_q, of_k, of_v = map(_array, along)
    grads = cuda_plans.attention_double_backward(
        _NAMES[q.dtype], *map(_array, (q, k, v)), _entries(*table),
        *map(_array, (out, lse, _readable(grad_out), out_tangent, lse_tangent)),
        q_tangent=of_q, k_tangent=of_k, v_tangent=of_v,
        grad_lse=None if grad_lse is None else _array(grad_lse.contiguous()), key_mask=_array(key_mask), scale=scale,
        run=cuda_plans.KernelRun(generation=generation), wanted=[name for name, needs in needed.items() if needs],
    )  # fmt: skip
    like = {"q": q, "k": k, "v": v}
    results = (_tensor(grads[name], tensor) if name in grads else q.new_empty(0) for name, tensor in like.items())
    return out_tangent, lse_tangent, *results


def rope(x: torch.Tensor, freqs: torch.Tensor, *, generation: str) -> torch.Tensor:
    """``anchor_attention::rope``, not for float64."""
    run = cuda_plans.KernelRun(generation=generation)
    return _tensor(cuda_plans.rope(_NAMES[x.dtype], *map(_array, (x, freqs)), run=run), x)


def rope_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor | None,
    freqs: torch.Tensor,
    need_x: bool,
    need_freqs: bool,
    *,
    generation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``anchor_attention::rope_backward``, not for float64."""
    source = grad_out if x is None else x
    if grad_out.numel() == 0:
        grad_x, grad_freqs = torch.zeros_like(grad_out), torch.zeros_like(freqs)
    else:
        run = cuda_plans.KernelRun(generation=generation)
        arrays = cuda_plans.rope_backward(
            _NAMES[grad_out.dtype], *map(_array, (source, freqs, _readable(grad_out))), run=run
        )
        grad_x, grad_freqs = _tensor(arrays[0], grad_out), torch.from_numpy(arrays[1])
    return grad_x if need_x else grad_out.new_empty(0), grad_freqs if need_freqs else freqs.new_empty(0)
