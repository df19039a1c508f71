"""What the suite runs on: ``python -m benchmarks.gpu.environment --out FOLDER``."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import torch

from anchor_attention import _library

from ..machine import environment
from ..report import ENVIRONMENT
from .stages import write_json

PEER_PACKAGES = ("flash_attn.cute", "flash_attn_interface", "flash_attn", "xformers", "magi_attention", "triton")
SMI_FIELDS = ("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def describe(device: str) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers."""
    library = _library.library_path()
    result = environment(torch.get_num_threads()) | {
        "library": {"file": library.name, "sha256": hashlib.sha256(library.read_bytes()).hexdigest()},
        "torch_cuda": torch.version.cuda,
        "peers": {name: _is_installed(name) for name in PEER_PACKAGES},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nvidia_smi": _smi(),
        }
    return result


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def _smi() -> dict[str, str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"not_found": str(error)}
    return dict(zip(SMI_FIELDS, (value.strip() for value in line.split(",")), strict=False))


def main() -> None:
    """Runs the command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.environment", description=__doc__)
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--out", type=Path, required=True)
    arguments = command.parse_args()
    found = describe(arguments.device)
    write_json(arguments.out / ENVIRONMENT, found)
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
