"""The machine: what it is, and the rates that it reaches without any attention."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import anchor_attention
from anchor_attention.benchmark import NotSupportedError, interleave
from anchor_attention.benchmark.timing import quartiles

from .instruction_sets import PINS, observed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REGISTER_SOURCE = Path(__file__).with_name("register_ceiling.cpp")
REGISTER_CEILINGS = {"float32": "fma_float32", "bfloat16": "dot_bfloat16"}
# A ceiling is that of the instruction set in use, which may be held below the processor's best.
COMPILED_FOR = {"baseline": "x86-64", "avx2": "haswell", "avx512": "skylake-avx512", "avx512_bf16": "cooperlake"}
# Long against the time that idle workers of torch spin on before they leave the cores to others.
REGISTER_ITERATIONS = 20_000_000
MATMUL_SIZE = 2048
# A product that is slower than this share of float32's is no ceiling of anything.
SLOWEST_SHARE = 0.1
VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def results_folder() -> Path:
    """Where the results of this processor on the instruction set in use live.

    Virtual machines name very different processors alike: family and model tell them apart.
    """
    name = " ".join((cpu_name(), _cpuinfo_line("cpu family"), _cpuinfo_line("model\t")))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / slug / anchor_attention.cpu_instruction_sets().selected


def write_results(name: str, results: Any, markdown: Callable[[Any], str], folder: Path) -> str:
    """Writes raw results as JSON and, made from what was written, a page beside them; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(results, indent=1)
    (folder / f"{name}.json").write_text(raw + "\n")
    page = markdown(json.loads(raw))
    (folder / f"{name}.md").write_text(page)
    return page


def listing(about: Mapping[str, Any]) -> list[str]:
    """Lines of a page that say what a run was made with, in a block of their own."""
    return ["```text", *(f"{key}: {value}" for key, value in about.items()), "```", ""]


def environment(threads: int) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers."""
    flags = set(re.findall(r"\w+", _cpuinfo_line("flags") or _cpuinfo_line("Features")))
    return {
        "device": cpu_name(),
        "family_model_stepping": [_cpuinfo_line(key) for key in ("cpu family", "model\t", "stepping")],
        "vector_extensions": [flag for flag in VECTOR_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "anchor_attention": anchor_attention.__version__,
        "instruction_sets": anchor_attention.cpu_instruction_sets()._asdict(),
        "libraries": observed(),
        "commit": _commit(),
        "settings": {
            name: value
            for name, value in os.environ.items()
            if name.startswith("ANCHOR_ATTENTION_") or name in PINS["baseline"]
        },
    }


def ceilings(threads: int, rounds: int) -> dict[str, Any]:
    """GFLOP/s of torch's matrix product by dtype, and of multiply-adds on registers, in the same rounds.

    Returns:
        Quartiles by name, and under ``"not_measured"`` the reasons for what is missing.
    """
    contestants: dict[str, Callable[[object], object]] = {}
    flops = {}
    reasons = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matmul_{str(dtype).removeprefix('torch.')}"
        try:
            contestants[name], flops[name] = matmul(dtype, MATMUL_SIZE)
        except NotSupportedError as error:
            reasons[name] = str(error)
    for name in REGISTER_CEILINGS.values():
        try:
            contestants[name], flops[name] = register_ceiling(name, threads)
        except NotSupportedError as error:
            reasons[name] = str(error)
    seconds = interleave(contestants, lambda: None, rounds=rounds)
    rates: dict[str, Any] = {name: quartiles([flops[name] / t / 1e9 for t in own]) for name, own in seconds.items()}
    return rates | {"not_measured": reasons}


def matmul(dtype: torch.dtype, size: int) -> tuple[Callable[[object], object], float]:
    """torch's matrix product.

    Args:
        dtype: Of the factors.
        size: Rows and columns.

    Returns:
        A contestant, and the floating-point operations of one call.

    Raises:
        NotSupportedError: If this torch has no product worth the name for this type on this processor: where there are
            no instructions for bfloat16, a product of the size measured here takes minutes.
    """
    rate, usual = _small_product_rate(dtype), _small_product_rate(torch.float32)
    if rate < SLOWEST_SHARE * usual:
        raise NotSupportedError(f"a product of 256 × 256 {dtype} reaches {rate:.1f} GFLOP/s, in float32 {usual:.0f}")
    return partial(_multiply, torch.randn(2, size, size).to(dtype)), 2.0 * size**3


@cache
def _small_product_rate(dtype: torch.dtype) -> float:
    size = 256
    factors = torch.randn(2, size, size).to(dtype)
    seconds = interleave({"product": partial(_multiply, factors)}, lambda: None, rounds=3)["product"]
    return 2.0 * size**3 / min(seconds) / 1e9


def register_ceiling(name: str, threads: int) -> tuple[Callable[[object], object], float]:
    """Multiply-adds on registers, on every thread at once.

    Args:
        name: One of the values of :data:`REGISTER_CEILINGS`.
        threads: How many run them.

    Returns:
        A contestant, and the floating-point operations of one call.

    Raises:
        NotSupportedError: If there is no compiler, or the processor has no such instruction.
    """
    try:
        library = register_library()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotSupportedError(f"no compiler for it: {error}") from error
    chains = library[name]
    chains.restype = ctypes.c_double
    chains.argtypes = (ctypes.c_long, ctypes.POINTER(ctypes.c_float))

    def run_chains(_: object = None) -> float:
        operations: float = chains(REGISTER_ITERATIONS, (ctypes.c_float * 1)())
        return operations

    operations = run_chains()
    if operations == 0:
        raise NotSupportedError("the processor has no such instruction")
    # Its threads wait on a lock when idle: they take nothing from the contestants of the other rounds.
    pool = ThreadPoolExecutor(threads)
    return lambda _: list(pool.map(run_chains, range(threads))), threads * operations


@cache
def register_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "register_ceiling.so"
        selected = anchor_attention.cpu_instruction_sets().selected
        target = COMPILED_FOR.get(selected, "native") if platform.machine() == "x86_64" else "native"
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O3", f"-march={target}", "-shared", "-fPIC"]
        subprocess.run([*command, str(REGISTER_SOURCE), "-o", str(library)], check=True, capture_output=True)
        return ctypes.CDLL(str(library))


def _multiply(factors: Tensor, _: object) -> Tensor:
    return factors[0] @ factors[1]


def _cpuinfo_line(key: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "csrc", "python")
    except (OSError, subprocess.CalledProcessError):
        return "uncommitted"
    return commit + (" and uncommitted changes" if changed else "")
