"""Runs PTX on a GPU through the CUDA driver, so that the emulator's conformance tests can be put to the hardware."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
from tools.ptx_emulator.tensor_map import TensorMap

_TENSOR_MAP_BYTES, _TENSOR_MAP_ALIGNMENT = 128, 64
_MAX_DYNAMIC_SHARED_BYTES, _DEFAULT_SHARED_BYTES = 8, 48 * 1024
_COMPUTE_CAPABILITY = (75, 76)

_Dim = int | Sequence[int]


def _check(code: int, call: str) -> None:
    if code:
        raise RuntimeError(f"{call} failed with CUDA driver error {code}")


@cache
def _driver() -> ctypes.CDLL | None:
    """The initialised driver with a current context, or None without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    context = ctypes.c_void_p()
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return driver


def available() -> bool:
    return _driver() is not None


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU, None without one."""
    driver = _driver()
    if driver is None:
        return None
    device = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in zip((major, minor), _COMPUTE_CAPABILITY, strict=True):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
    return major.value, minor.value


def _encode(driver: ctypes.CDLL, tensor_map: TensorMap, address: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """The driver's tensor map: a buffer, and the aligned address within it."""
    buffer = ctypes.create_string_buffer(_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT)
    place = -(-ctypes.addressof(buffer) // _TENSOR_MAP_ALIGNMENT) * _TENSOR_MAP_ALIGNMENT
    rank = len(tensor_map.dims)
    steps = tensor_map.element_strides or [1] * rank
    _check(
        driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), tensor_map.data_type, rank, ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*tensor_map.dims), (ctypes.c_uint64 * rank)(*tensor_map.strides),
            (ctypes.c_uint32 * rank)(*tensor_map.box), (ctypes.c_uint32 * rank)(*steps),
            tensor_map.interleave, tensor_map.swizzle, tensor_map.l2_promotion, tensor_map.oob_fill,
        ),
        "cuTensorMapEncodeTiled",
    )  # fmt: skip
    return buffer, place


def launch(
    text: str,
    kernel: str,
    arrays: Sequence[np.ndarray],
    block: _Dim,
    grid: _Dim,
    shared_bytes: int,
    maps: Sequence[tuple[int, TensorMap]] = (),
) -> None:
    """Run a kernel whose parameters are pointers to the arrays, which it updates in place, then tensor maps.

    maps: the index of an array and the tensor map that begins at its first element.
    """
    driver = _driver()
    if driver is None:
        raise RuntimeError("no GPU is available")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), text.encode() + b"\0"), "cuModuleLoadData")
    pointers = [ctypes.c_uint64() for _ in arrays]
    try:
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()), "cuModuleGetFunction")
        for pointer, array in zip(pointers, arrays, strict=True):
            size = ctypes.c_size_t(max(array.nbytes, 1))
            _check(driver.cuMemAlloc_v2(ctypes.byref(pointer), size), "cuMemAlloc")
            host = ctypes.c_void_p(array.ctypes.data)
            _check(driver.cuMemcpyHtoD_v2(pointer, host, ctypes.c_size_t(array.nbytes)), "cuMemcpyHtoD")
        encoded = [_encode(driver, tensor_map, pointers[i].value) for i, tensor_map in maps]
        places = [*(ctypes.addressof(pointer) for pointer in pointers), *(place for _, place in encoded)]
        values = (ctypes.c_void_p * len(places))(*places)
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes), "cuFuncSetAttribute")
        extents = [[n] if isinstance(n, int) else list(n) for n in (grid, block)]
        dimensions = [ctypes.c_uint(n) for extent in extents for n in (*extent, 1, 1)[:3]]
        _check(
            driver.cuLaunchKernel(function, *dimensions, ctypes.c_uint(shared_bytes), None, values, None),
            "cuLaunchKernel",
        )
        _check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
        for pointer, array in zip(pointers, arrays, strict=True):
            host = ctypes.c_void_p(array.ctypes.data)
            _check(driver.cuMemcpyDtoH_v2(host, pointer, ctypes.c_size_t(array.nbytes)), "cuMemcpyDtoH")
    finally:
        for pointer in pointers:
            if pointer.value:
                driver.cuMemFree_v2(pointer)
        driver.cuModuleUnload(module)
