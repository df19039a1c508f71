"""The GPU suite: ``python -m benchmarks.gpu``.

Checks and times the operation and the modules on the GPU of this machine, within ``--minutes`` and without a network.
Every stage's result is on disk as soon as it is there; a page that sums them up is printed last. The exit status is 1
if a check failed or did not end. A library that was built elsewhere is named by ``$ANCHOR_ATTENTION_LIBRARY``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .small_shape_sizes import HEAD_DIMS, QUICK_HEAD_DIMS
from .stages import KERNELS_VARIABLE, PASSED, ROOT, Outcome, Stage, run_stages
from .summary import CASES, ENVIRONMENT, write_summary

SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 86
# Conformance tests that run small programs on the emulator and on a GPU.
CONFORMANCE_TESTS = tuple(
    f"tests/tools/ptx_emulator/test_emulator_{name}.py"
    for name in ("arithmetic", "floating", "memory", "tensor_core", "warp", "bulk_copy", "warpgroup", "rare_operations")
)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=50")


def find(tool: str, *, variable: str = "") -> str | None:
    """Path of a tool of the CUDA toolkit, ``None`` where there is none."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / tool
    return os.environ.get(variable) or shutil.which(tool) or (str(toolkit) if toolkit.is_file() else None)


def sanitizer_filter(sanitizer: str) -> tuple[str, ...]:
    """The option, whose name changed, with which compute-sanitizer checks our kernels only; none if it has none."""
    text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    name = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in text), None)
    return (name, "kns=anchor_attention") if name else ()


def suite(device: str, quick: bool, folder: Path) -> list[Stage]:
    """The stages, the checks first: what they leave of their time goes to the benchmarks."""
    options = ("--device", device, *(("--quick",) if quick else ()))
    profile = {"HYPOTHESIS_PROFILE": "brief"}
    apart = ("-m", "benchmarks.gpu.apart", "--case-seconds")
    # Tiny inputs: what takes seconds on a GPU hangs. A busy CPU shows no more than that the suite works.
    small, large = ("10", "40") if device == "cuda" else ("120", "120")
    small_shapes = (*apart, small, "benchmarks.gpu.small_shapes", *options)
    # A process of its own for each head size: an illegal access takes all that comes after it in its process.
    head_dims = QUICK_HEAD_DIMS if quick else HEAD_DIMS
    stages = [
        Stage(
            "environment",
            ("-m", "benchmarks.gpu.environment", "--device", device, "--out", str(folder)),
            80,  # the first to load torch, from a disk that nobody has read
            makes=(ENVIRONMENT,),
        ),
        *(
            Stage(f"small_shapes_{size}", (*small_shapes, "--head-dims", str(size)), 30, decides=True)
            for size in head_dims
        ),
        Stage(
            "correctness",
            (*PYTEST, "tests/ops/test_devices.py", "-k", "cpu" if device == "cpu" else "cuda or on_a_gpu"),
            130,
            decides=True,
            variables=profile,
        ),
        # A Hopper GPU has kernels of its own: those for every architecture have to be right there, too.
        Stage(
            "small_shapes_sm80",
            small_shapes,
            60,
            decides=True,
            missing="" if device == "cuda" else "the device is no GPU",
            variables={KERNELS_VARIABLE: "sm80"},
        ),
        # One process for each GPU, at least one, joined by the collectives of GPUs.
        Stage(
            "distributed",
            (*PYTEST, "tests/distributed/test_backends.py", "-k", device),
            60,
            decides=True,
        ),
        *_conformance(device),
    ]
    sanitizer = find("compute-sanitizer") if device == "cuda" else None
    for tool in SANITIZERS:
        # Its checks are many times slower than the kernels: the fewest shapes, and no kernel of others, have to do.
        command = ("-m", "benchmarks.gpu.small_shapes", "--device", device, "--quick")
        only_ours = sanitizer_filter(sanitizer) if sanitizer else ()
        program = (sanitizer or "", "--tool", tool, *only_ours, "--target-processes", "all", "--error-exitcode")
        stages.append(
            Stage(
                tool,
                command,
                50,
                # It does not know what orders copies of the copy engine, and reports them as races.
                decides=tool != "racecheck",
                missing="" if sanitizer else "compute-sanitizer was not found, or the device is no GPU",
                program=(*program, str(SANITIZER_ERROR)),
            )
        )
    return [
        *stages,
        Stage(
            "benchmarks",
            (*apart, large, "benchmarks.gpu.table", *options, "--out", str(folder)),
            200,
            keeps_time=True,
            makes=(CASES,),
        ),
        Stage("report", ("-m", "benchmarks.gpu.report", str(folder)), 30, makes=("table.md",)),
    ]


def _conformance(device: str) -> list[Stage]:
    """Primitives and instructions on the hardware; without any, on the emulator."""
    where = "not emulated" if device == "cuda" else "emulated"
    no_compiler = "a C++ compiler, which the emulator is built with, was not found: set CXX"
    if shutil.which(os.environ.get("CXX", "c++")):
        no_compiler = ""
    no_nvcc = "" if find("nvcc", variable="NVCC") else "nvcc was not found: set NVCC"
    return [
        Stage(
            "primitives",
            (*PYTEST, "tests/cuda/test_cuda_primitives.py", "tests/cuda/test_cuda_primitives_sm90.py", "-k", where),
            80,
            decides=True,
            missing=no_nvcc or no_compiler,
        ),
        Stage(
            "instructions",
            (*PYTEST, *(CONFORMANCE_TESTS if device == "cuda" else CONFORMANCE_TESTS[:1]), "-k", where),
            60,
            decides=True,
            missing=no_compiler,
        ),
    ]


def default_folder(device: str) -> Path:
    """``$OUT/gpu`` where that is set; else a dry run's folder, or that of the GPU."""
    if "OUT" in os.environ:
        return Path(os.environ["OUT"]) / "gpu"
    if device == "cpu":
        return ROOT / "build" / "gpu-dry-run"
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        names = []
    name = re.sub(r"[^a-z0-9]+", "-", (names or ["gpu"])[0].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Runs the GPU suite.")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu shows that the suite works")
    result.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
    result.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="only these stages")
    result.add_argument("--minutes", type=float, default=9.0, help="time for all stages")
    result.add_argument("--out", type=Path, default=None, help="folder of the results")
    result.add_argument("--archive", type=Path, default=None, help="folder of their archive (default: beside them)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; see ``--help``."""
    command = parser()
    arguments = command.parse_args(argv)
    folder = (arguments.out or default_folder(arguments.device)).resolve()
    stages = suite(arguments.device, arguments.quick, folder)
    unknown = set(arguments.stages) - {stage.name for stage in stages}
    if unknown:
        command.error(f"stages must be among {[stage.name for stage in stages]}, got {sorted(unknown)}")
    if arguments.minutes <= 0:
        command.error(f"minutes must be positive, got {arguments.minutes}")
    folder.mkdir(parents=True, exist_ok=True)
    place = (arguments.archive or folder.parent).resolve()
    place.mkdir(parents=True, exist_ok=True)

    def report(outcome: Outcome) -> None:
        _print(outcome)
        # Whoever is stopped between stages has what there was until then.
        archive(folder, place)

    chosen = [stage for stage in stages if not arguments.stages or stage.name in arguments.stages]
    outcomes = run_stages(chosen, folder, 60 * arguments.minutes, report)
    print("\n" + write_summary(folder, outcomes), flush=True)
    print(f"all of it: {archive(folder, place)}", flush=True)
    return int(any(outcome.fails_suite for outcome in outcomes))


def archive(folder: Path, place: Path) -> Path:
    """Everything in one file: results may have to travel as few files."""
    path = place / f"{folder.name}.tar.gz"
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:gz") as file:
        file.add(folder, folder.name)
    return unfinished.replace(path)


def _print(outcome: Outcome) -> None:
    words = outcome.last_lines[-1] if outcome.last_lines and outcome.status != PASSED else ""
    print(f"{outcome.name}: {outcome.status} after {outcome.seconds:.0f} s {words}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
