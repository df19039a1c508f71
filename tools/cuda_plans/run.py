"""Executes plans on the emulator, with NumPy arrays as device memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.cuda_plans.build import plans, ptx_file
from tools.ptx_emulator import Counters, Memory, Module, Product, encode_tensor_map

Array = NDArray[Any]
# (query range, key ranges) pairs
Table = Sequence[tuple[tuple[int, int], Sequence[tuple[int, int]]]]

_NAME = re.compile(
    r"(?P<generation>sm90_)?"
    r"(?P<kind>forward|merge|backward_query|backward_key|backward|jvp|double_backward_query|double_backward_key|"
    r"row_statistics|query_gradient|rope_freqs|rope|upload)"
    r"(?:_(?P<precision>bfloat16|float16|tf32x3|tf32))?(?:_(?P<head_dim>\d+))?(?:_(?P<gradients>key|value))?$"
)
_ENTRIES = {
    "forward": "attention_forward",
    "merge": "attention_merge",
    "backward_query": "attention_backward_query",
    "backward_key": "attention_backward_key",
    "jvp": "attention_jvp",
    "double_backward_query": "attention_double_backward_query",
    "double_backward_key": "attention_double_backward_key",
    "row_statistics": "attention_row_statistics",
    "rope": "cuda4rope",
    "rope_freqs": "rope_freqs_gradient",
    "upload": "upload",
}
# Of sm90: the first part of an instantiation's name, and the entry.
_SM90_ENTRIES = {
    "forward": ("forward", "attention_forward"),
    "backward": ("backward", "attention_backward.*QueryGradientE1"),
    "backward_key": ("backward", "attention_backward.*QueryGradientE0"),
    "query_gradient": ("backward", "attention_query_gradient"),
}
# Of sm80: kernels in files of their own.
_DERIVATIVES = ("jvp", "double_backward_query", "double_backward_key")
_KEY_GRADIENTS = {None: "KeyGradientsE0", "key": "KeyGradientsE1", "value": "KeyGradientsE2"}


@cache
def _module(instantiation: str) -> Module:
    return Module.from_ptx(ptx_file(instantiation))


def _instantiation_and_entry(name: str) -> tuple[str, str]:
    match = _NAME.match(name)
    if match is None:
        raise ValueError(f"unknown kernel {name!r}")
    kind, precision, head_dim = match["kind"], match["precision"], match["head_dim"]
    if match["generation"]:
        file, entry = _SM90_ENTRIES[kind]
        return f"sm90_{file}_{precision}_{head_dim}", entry
    if kind == "upload":
        return "upload", _ENTRIES[kind]
    if head_dim is None:
        return f"elementwise_{'float32' if precision == 'tf32' else precision}", _ENTRIES[kind]
    file = "derivatives" if kind in _DERIVATIVES else "attention"
    entry = _ENTRIES[kind]
    if kind.endswith("backward_key"):
        entry = f"{entry}.*{_KEY_GRADIENTS[match['gradients']]}"
    return f"{file}_{precision}_{head_dim}", entry


def instantiation_of(name: str) -> tuple[str, str]:
    """File and PTX entry of the kernel that a plan calls `name`."""
    instantiation, entry = _instantiation_and_entry(name)
    return instantiation, _module(instantiation).find(entry)


def locate(name: str) -> tuple[Module, str]:
    """Module and PTX entry of the kernel that a plan calls `name`."""
    instantiation, entry = instantiation_of(name)
    return _module(instantiation), entry


@dataclass
class KernelRun:
    """What a call launched, for tests and for tables: (kernel name, grid, counters) in launch order."""

    seed: int = 0
    concurrent_blocks: int = 1
    multiprocessors: int = 132
    generation: str = "sm80"
    avoid_tile_of_48: bool = False
    reluctant_warps: Sequence[int] = ()
    products: list[Product] | None = None  # gets every wgmma
    launches: list[tuple[str, int, Counters]] = field(default_factory=list)
    shared_bytes: dict[str, int] = field(default_factory=dict)  # dynamic, by kernel name


class _Device:
    """Emulated device memory: every NumPy buffer becomes one allocation, views of it share that."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._owners: dict[int, tuple[int, Array]] = {}

    def address(self, array: Array | None, *, output: bool = False) -> int:
        # Like torch, which has no memory for an empty tensor.
        if array is None or not array.size:
            return 0
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        if id(owner) not in self._owners:
            name = f"{len(self._owners)}: {owner.dtype}{list(owner.shape)}"
            address = self.memory.register(owner, name, writable=output, poisoned=output)
            self._owners[id(owner)] = (address, owner)
        return self._owners[id(owner)][0] + array.ctypes.data - owner.ctypes.data


def _strides(array: Array) -> tuple[int, ...]:
    if array.size and array.strides[-1] != array.itemsize:
        raise ValueError("the last axis must be contiguous")
    return tuple(stride // array.itemsize for stride in array.strides[:-1])


def _freqs_strides(freqs: Array | None) -> tuple[int, ...]:
    if freqs is None:
        return (0, 0)
    batch, token = _strides(freqs)
    return (0 if freqs.shape[0] == 1 else batch, token)


def with_tensor_maps(launch: Any) -> bytes:
    """The parameters of a launch with its tensor maps encoded, by the emulator in place of the driver."""
    params = bytearray(launch.params)
    for offset, arguments in launch.tensor_maps:
        encoded = encode_tensor_map(**arguments)
        params[offset : offset + len(encoded)] = encoded
    return bytes(params)


def _run(plan: Callable[[dict[str, Any]], Any], fields: dict[str, Any], device: _Device, run: KernelRun) -> None:
    planned = plan(fields)
    if planned.workspace_bytes:
        workspace = np.zeros(planned.workspace_bytes, np.uint8)
        fields["workspace"] = device.address(workspace, output=True)
        planned = plan(fields)
    for launch in planned.launches:
        module, entry = locate(launch.name)
        counters = module.launch(
            entry, launch.grid, launch.block, launch.shared_bytes, with_tensor_maps(launch), device.memory,
            seed=run.seed, concurrent_blocks=run.concurrent_blocks, reluctant_warps=run.reluctant_warps,
            products=run.products,
        )  # fmt: skip
        run.launches.append((launch.name, launch.grid, counters))
        run.shared_bytes[launch.name] = launch.shared_bytes


def _attention_fields(
    device: _Device, dtype: str, q: Array, k: Array, v: Array, table: Table,
    q_freqs: Array | None, key_mask: Array | None, scale: float | None, run: KernelRun, allow_tf32: bool,
) -> dict[str, Any]:  # fmt: skip
    batch, n_queries, heads, head_dim = q.shape
    offsets = np.cumsum([0] + [len(keys) for _, keys in table])
    return {
        "dtype": dtype,
        "allow_tf32": allow_tf32,
        "multiprocessors": run.multiprocessors,
        "generation": run.generation,
        "avoid_tile_of_48": run.avoid_tile_of_48,
        "q": device.address(q),
        "k": device.address(k),
        "v": device.address(v),
        "q_freqs": device.address(q_freqs),
        "key_mask": device.address(key_mask),
        "q_strides": _strides(q),
        "k_strides": _strides(k),
        "v_strides": _strides(v),
        "q_freqs_strides": _freqs_strides(q_freqs),
        "key_mask_batch_stride": 0 if key_mask is None else key_mask.strides[0],
        "batch": batch,
        "n_queries": n_queries,
        "n_keys": k.shape[1],
        "heads": heads,
        "kv_heads": k.shape[2],
        "head_dim": head_dim,
        "value_dim": v.shape[3],
        "scale": head_dim**-0.5 if scale is None else scale,
        "q_ranges": [bound for queries, _ in table for bound in queries],
        "k_offsets": offsets.tolist(),
        "k_ranges": [bound for _, keys in table for key_range in keys for bound in key_range],
    }


def attention_forward(
    dtype: str, q: Array, k: Array, v: Array, table: Table, *, q_freqs: Array | None = None,
    key_mask: Array | None = None, scale: float | None = None, run: KernelRun | None = None, allow_tf32: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """`out` (B, Nq, H, Dv) and `lse` (B, H, Nq) of a table given as (query range, key ranges) pairs."""
    run, device = run or KernelRun(), _Device()
    fields = _attention_fields(device, dtype, q, k, v, table, q_freqs, key_mask, scale, run, allow_tf32)
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.zeros((q.shape[0], q.shape[2], q.shape[1]), np.float32)
    fields |= {"out": device.address(out, output=True), "lse": device.address(lse, output=True)}
    _run(plans().plan_attention_forward, fields, device, run)
    return out, lse


def attention_backward(
    dtype: str, q: Array, k: Array, v: Array, table: Table, out: Array, lse: Array, grad_out: Array, *,
    grad_lse: Array | None = None, q_freqs: Array | None = None, key_mask: Array | None = None,
    scale: float | None = None, wanted: Sequence[str] = ("q", "k", "v"), run: KernelRun | None = None,
    allow_tf32: bool = False,
) -> dict[str, Array]:  # fmt: skip
    """The `wanted` gradients, of "q", "k", "v" and "q_freqs", by name."""
    run, device = run or KernelRun(), _Device()
    fields = _attention_fields(device, dtype, q, k, v, table, q_freqs, key_mask, scale, run, allow_tf32)
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape}
    gradients: dict[str, Array] = {name: np.zeros(shapes[name], q.dtype) for name in wanted if name in shapes}
    if "q_freqs" in wanted and q_freqs is not None:
        gradients["q_freqs"] = np.zeros(q_freqs.shape, np.complex64)
    fields |= {f"grad_{name}": device.address(gradient, output=True) for name, gradient in gradients.items()}
    fields |= {
        "out": device.address(out),
        "lse": device.address(lse),
        "grad_out": device.address(grad_out),
        "grad_out_strides": _strides(grad_out),
        "grad_lse": device.address(grad_lse),
    }
    _run(plans().plan_attention_backward, fields, device, run)
    return gradients


def _tangent_fields(device: _Device, **tangents: Array | None) -> dict[str, Any]:
    """Of tangents with an axis of their number before those of the tensor."""
    fields: dict[str, Any] = {}
    for name, array in tangents.items():
        stride, *strides = (0, 0, 0, 0) if array is None else _strides(array)
        fields[name] = {"data": device.address(array), "stride": stride, "strides": strides}
    return fields


def attention_jvp(
    dtype: str, q: Array, k: Array, v: Array, table: Table, *, out: Array | None = None, lse: Array | None = None,
    q_tangents: Array | None = None, k_tangents: Array | None = None, v_tangents: Array | None = None,
    key_mask: Array | None = None, scale: float | None = None, run: KernelRun | None = None,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """`out` and `lse`, computed if they are not given, and their tangents along the given ones, stacked."""
    run, device = run or KernelRun(), _Device()
    known = out is not None and lse is not None
    if out is None or lse is None:
        out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
        lse = np.zeros((q.shape[0], q.shape[2], q.shape[1]), np.float32)
    n = next(len(tangents) for tangents in (q_tangents, k_tangents, v_tangents) if tangents is not None)
    out_tangents, lse_tangents = np.zeros((n, *out.shape), q.dtype), np.zeros((n, *lse.shape), np.float32)
    fields = _attention_fields(device, dtype, q, k, v, table, None, key_mask, scale, run, False)
    fields |= _tangent_fields(device, q_tangents=q_tangents, k_tangents=k_tangents, v_tangents=v_tangents)
    fields |= {
        "knows_value": known,
        "n_tangents": n,
        "out": device.address(out, output=not known),
        "lse": device.address(lse, output=not known),
        "out_tangents": device.address(out_tangents, output=True),
        "lse_tangents": device.address(lse_tangents, output=True),
    }
    _run(plans().plan_attention_jvp, fields, device, run)
    return out, lse, out_tangents, lse_tangents


def attention_double_backward(
    dtype: str, q: Array, k: Array, v: Array, table: Table, out: Array, lse: Array, grad_out: Array,
    out_tangent: Array, lse_tangent: Array, *, q_tangent: Array | None = None, k_tangent: Array | None = None,
    v_tangent: Array | None = None, grad_lse: Array | None = None, key_mask: Array | None = None,
    scale: float | None = None, wanted: Sequence[str] = ("q", "k", "v"), run: KernelRun | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Second derivatives of what is `wanted` along one direction; the tangents of out and lse are those along it."""
    run, device = run or KernelRun(), _Device()
    fields = _attention_fields(device, dtype, q, k, v, table, None, key_mask, scale, run, False)
    along = {"q_tangent": q_tangent, "k_tangent": k_tangent, "v_tangent": v_tangent}
    fields |= _tangent_fields(device, **{name: None if x is None else x[None] for name, x in along.items()})
    gradients: dict[str, Array] = {name: np.zeros(x.shape, q.dtype) for name, x in zip("qkv", (q, k, v), strict=True)}
    gradients = {name: gradient for name, gradient in gradients.items() if name in wanted}
    fields |= {f"grad_{name}": device.address(gradient, output=True) for name, gradient in gradients.items()}
    fields |= {
        "out": device.address(out),
        "lse": device.address(lse),
        "grad_out": device.address(grad_out),
        "grad_out_strides": _strides(grad_out),
        "grad_lse": device.address(grad_lse),
        "out_tangent": device.address(out_tangent),
        "lse_tangent": device.address(lse_tangent),
    }
    _run(plans().plan_attention_double_backward, fields, device, run)
    return gradients


def _rope_fields(device: _Device, dtype: str, x: Array, freqs: Array) -> dict[str, Any]:
    batch, tokens, heads, head_dim = x.shape
    return {
        "dtype": dtype, "x": device.address(x), "freqs": device.address(freqs), "x_strides": _strides(x),
        "freqs_strides": _freqs_strides(freqs), "batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim,
    }  # fmt: skip


def rope(dtype: str, x: Array, freqs: Array, *, run: KernelRun | None = None) -> Array:
    """x (B, N, H, D) rotated by freqs (B or 1, N, D / 2)."""
    device = _Device()
    out = np.zeros(x.shape, x.dtype)
    fields = _rope_fields(device, dtype, x, freqs) | {"out": device.address(out, output=True)}
    _run(plans().plan_rope, fields, device, run or KernelRun())
    return out


def rope_backward(
    dtype: str, x: Array, freqs: Array, grad_out: Array, *, run: KernelRun | None = None
) -> tuple[Array, Array]:
    """Gradients of x and of freqs."""
    device = _Device()
    grad_x = np.zeros(x.shape, x.dtype)
    grad_freqs = np.zeros(freqs.shape, np.complex64)
    fields = _rope_fields(device, dtype, x, freqs) | {
        "grad_out": device.address(grad_out),
        "grad_out_strides": _strides(grad_out),
        "grad_x": device.address(grad_x, output=True),
        "grad_freqs": device.address(grad_freqs, output=True),
    }
    _run(plans().plan_rope_backward, fields, device, run or KernelRun())
    return grad_x, grad_freqs


def to_storage(values: Array, dtype: str) -> Array:
    """Float values → what the kernels read."""
    if dtype == "float32":
        return values.astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_storage(stored: Array, dtype: str) -> NDArray[np.float64]:
    """What the kernels wrote → float64."""
    if dtype == "float32":
        return stored.astype(np.float64)
    if dtype == "float16":
        return stored.view(np.float16).astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def unit_roundoff(dtype: str) -> float:
    """Largest relative error of rounding to `dtype`."""
    return math.ldexp(1.0, {"bfloat16": -8, "float16": -11, "float32": -24}[dtype])
