"""Makes the folder that travels to a machine with a GPU, beside the checkout; prints the first three commands there.

Usage: python -m benchmarks.gpu.package [FOLDER] [--limit-mib 64]   (default: build/gpu-package)

That machine may have no network, no compiler and few minutes: it gets the library as it was built here. Ends with
status 1 where that holds no GPU code, or where the checkout and the folder are larger together than what may travel.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from tools.device_code import images

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libanchor_attention.so"
# In the folder, where `python -m benchmarks.gpu.variants` has made them.
VARIANTS = "variants"
MIB = 2**20
# What decides whether to go on comes first; each fits a command of ten minutes.
CALLS = (
    ("does it load, launch, and is it right?", "environment small_shapes_64 small_shapes_128 correctness", 5),
    ("is every head size right, and clean?", "small_shapes_96 small_shapes_48 small_shapes_32 small_shapes_40 "
     "small_shapes_256 small_shapes_sm80 memcheck synccheck racecheck", 8),
    ("how fast is it?", "environment benchmarks report", 9),
)  # fmt: skip


def checkout_bytes() -> int:
    """Of the files that git knows, or would not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    paths = [ROOT / name for name in listing.split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def commands(folder: Path) -> list[str]:
    """The first three, to be given from the checkout's root."""
    where = f"$PWD/{folder.relative_to(ROOT)}" if folder.is_relative_to(ROOT) else folder
    start = f"ANCHOR_ATTENTION_LIBRARY={where}/{LIBRARY} PYTHONPATH=python python3 -m benchmarks.gpu"
    return [
        f"# {question}\n{start} --minutes {minutes} --out build/gpu{i} --archive ${{OUT:-build}} --stages {stages}"
        for i, (question, stages, minutes) in enumerate(CALLS, start=1)
    ]


def sweep_command(folder: Path) -> str:
    """What measures the libraries of variants, where the folder has them."""
    where = f"$PWD/{folder.relative_to(ROOT)}" if folder.is_relative_to(ROOT) else folder
    measure = f"PYTHONPATH=python python3 -m benchmarks.gpu.sweep {where}/{VARIANTS} --minutes 8"
    return f"# which tiles and rules are best?\n{measure} --out ${{OUT:-build}}/sweep"


def main() -> None:
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.package", description=__doc__.splitlines()[0])
    command.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "gpu-package")
    command.add_argument("--library", type=Path, default=ROOT / "python" / "anchor_attention" / LIBRARY)
    command.add_argument("--limit-mib", type=float, default=64.0, help="of the checkout and the folder together")
    arguments = command.parse_args()
    folder = arguments.folder.resolve()
    targets = sorted({image.target for image in images(arguments.library)})
    if not targets:
        raise SystemExit(f"{arguments.library} holds no GPU code: build it where nvcc is found")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.library, folder / LIBRARY)
    carried = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    checkout = checkout_bytes()
    print(f"{folder}: {carried / MIB:.1f} MiB, GPU code for {', '.join(targets)}")
    print(
        f"with the checkout's {checkout / MIB:.1f} MiB: {(carried + checkout) / MIB:.1f} of {arguments.limit_mib:g} MiB"
    )
    if carried + checkout > arguments.limit_mib * MIB:
        raise SystemExit("too large to travel")
    calls = commands(folder)
    if (folder / VARIANTS).is_dir():
        calls.append(sweep_command(folder))
    print("\n" + "\n\n".join(calls))


if __name__ == "__main__":
    main()
