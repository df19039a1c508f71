"""Pins the instruction set of everybody who computes: ours, torch's own kernels, MKL and oneDNN.

A machine with AVX-512 then also tells how those fare who have AVX2 alone. The variables are read when the libraries
load, so a set is measured in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

import anchor_attention

# By set of ours: what the others call the same instructions.
PINS: dict[str, dict[str, str]] = {
    "amx": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E4",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
OURS = "ANCHOR_ATTENTION_CPU_ISA"
CAPABILITIES = {"avx512": "AVX512", "avx2": "AVX2", "default": "DEFAULT"}
# Nobody buys a machine for it: measured where it is asked for.
NOT_BY_DEFAULT = ("baseline",)
# A product for MKL, a convolution for oneDNN.
_PROBE = """
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
torch.nn.functional.conv2d(torch.ones(1, 16, 16, 16), torch.ones(16, 16, 3, 3))
"""


def measured_sets() -> tuple[str, ...]:
    """The sets that a plain run measures, best first."""
    return tuple(name for name in anchor_attention.cpu_instruction_sets().runnable if name not in NOT_BY_DEFAULT)


def pinned_environment(instruction_set: str) -> dict[str, str]:
    """This process' environment with every library held to a set.

    Raises:
        ValueError: If the set is unknown.
    """
    if instruction_set not in PINS:
        raise ValueError(f"instruction_set must be one of {tuple(PINS)}, got {instruction_set!r}")
    return os.environ | PINS[instruction_set] | {OURS: instruction_set}


def run_pinned(instruction_set: str, arguments: Sequence[str]) -> None:
    """Runs a Python command line in a process that is held to a set.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, *arguments], env=pinned_environment(instruction_set), check=True)


def is_pinned(instruction_set: str) -> bool:
    """Whether this process was started with the set's pins."""
    pins = PINS[instruction_set] | {OURS: instruction_set}
    return all(os.environ.get(name) == value for name, value in pins.items())


def observed() -> dict[str, Any]:
    """What the libraries say that they use under this process' environment: the proof that the pins took effect.

    Raises:
        RuntimeError: If ours or torch's own kernels use another set than the one that is pinned.
    """
    selected = anchor_attention.cpu_instruction_sets().selected
    capability = torch.backends.cpu.get_cpu_capability()
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    if os.environ.get(OURS, selected) != selected:
        raise RuntimeError(f"{OURS} is {os.environ[OURS]!r}, but the kernels in use are {selected!r}")
    if wanted is not None and CAPABILITIES.get(wanted, capability) != capability:
        raise RuntimeError(f"ATEN_CPU_CAPABILITY is {wanted!r}, but torch's kernels are {capability!r}")
    verbose = os.environ | {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    said = subprocess.run([sys.executable, "-c", _PROBE], env=verbose, capture_output=True, text=True, check=True)
    text = said.stdout + said.stderr
    onednn = re.search(r"cpu,isa:(.+)", text)
    mkl = re.search(r"MKL_VERBOSE .*? for (.+?)(?:,|$)", text, re.MULTILINE)
    return {
        "anchor_attention": selected,
        "torch": capability,
        "onednn": onednn.group(1).strip() if onednn else None,
        "mkl": mkl.group(1).strip() if mkl else None,
    }
