"""Loads the library into a torch that is built with CUDA, on a machine that may have no GPU, and tries what needs none.

Usage: python -m tools.cuda_torch [--torch 2.14.1] [--environment FOLDER] [--keep]

Makes an environment of its own with that torch (some gigabytes, removed at the end), in which

- the package is imported, and asks for no library but torch's and the system's;
- the stream of a device is asked of torch's own part for CUDA, which Python loads for itself alone, and the answer is
  torch's, not that this torch has no CUDA;
- shapes of the operation's results on CUDA tensors are inferred, on fake tensors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from anchor_attention._library import library_path

from .cuda_host import run

ROOT = Path(__file__).resolve().parents[1]
# What the package index has for a machine without a GPU, too.
TORCH = "2.14.1"

IN_THE_ENVIRONMENT = """
import torch
assert torch.version.cuda is not None, f"torch {torch.__version__} has no CUDA"
import anchor_attention
from anchor_attention import KeyRangeTable
from torch._subclasses.fake_tensor import FakeTensorMode

table = KeyRangeTable.from_ranges([[0, 20], [20, 50]], [[0, 12], [5, 17]])
# The engine of gradients asks for a GPU, even of tensors that are none.
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
    q = torch.empty(2, 50, 3, 16, device="cuda", dtype=torch.bfloat16)
    k = torch.empty(2, 17, 3, 16, device="cuda", dtype=torch.bfloat16)
    out, lse = anchor_attention.anchor_attention(q, k, k, table, return_lse=True)
    assert out.device.type == lse.device.type == "cuda" and out.shape == q.shape and lse.dtype == torch.float32
print("shapes on CUDA tensors: right; torch", torch.__version__)
"""


def main() -> None:
    command = argparse.ArgumentParser(prog="python -m tools.cuda_torch", description=__doc__.splitlines()[0])
    command.add_argument("--torch", default=TORCH)
    command.add_argument("--environment", type=Path, default=ROOT / "build" / "cuda-torch")
    command.add_argument("--keep", action="store_true", help="leave the environment, and use it if it is there")
    arguments = command.parse_args()
    environment, begin = arguments.environment, time.monotonic()
    python = environment / "bin" / "python"
    try:
        if not (arguments.keep and python.is_file()):
            venv.create(environment, with_pip=True, clear=True)
            install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*install, f"torch=={arguments.torch}"], check=True)
            print(f"torch {arguments.torch} installed after {time.monotonic() - begin:.0f} s", flush=True)
        check(str(python))
    finally:
        if not arguments.keep:
            shutil.rmtree(environment, ignore_errors=True)
    print(f"passed after {time.monotonic() - begin:.0f} s")


def check(python: str) -> None:
    """Tries everything in an environment."""
    # Nothing of CUDA is among the libraries that it may be linked to.
    subprocess.run([sys.executable, str(ROOT / "scripts" / "audit_abi.py"), str(library_path())], check=True)
    # Torch finds no GPU and says so; the message that it has no CUDA would be ours.
    answer = run("answer = host.call_rope().decode()", torch_cuda="", python=python)
    assert "built without CUDA" not in answer, answer
    print(f"asked for the stream of a device, torch answers: {answer.splitlines()[0] if answer else 'a stream'}")
    variables = {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([python, "-c", IN_THE_ENVIRONMENT], check=True, env=os.environ | variables)


if __name__ == "__main__":
    main()
