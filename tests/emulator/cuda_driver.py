"""Runs PTX on a GPU through the CUDA driver, so that the emulator's conformance tests can be put to the hardware."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np

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


def launch(text: str, kernel: str, arrays: Sequence[np.ndarray], block: _Dim, grid: _Dim, shared_bytes: int) -> None:
    """Run a kernel whose parameters are pointers to the arrays, which it updates in place."""
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
        values = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
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
