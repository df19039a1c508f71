"""Makes the archive that travels to a machine with a GPU, beside the checkout; prints the first commands there.

Usage: python -m benchmarks.gpu.package [FOLDER] [--limit-mib 64]   (default: build/gpu-package)

That machine may have no network, no compiler and few minutes: it gets the library as it was built here, and those of
`variants` where they were made. Ends with status 1 where the library holds no GPU code, or where the checkout and the
archive are larger together than what may travel.
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
from pathlib import Path

from tools.device_code import images

from .variants import LIBRARIES, LIBRARY, ROOT

ARCHIVE = "gpu-package.tar.xz"
# In the archive.
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


def pack(library: Path, variants: Path, archive: Path) -> None:
    """Compresses the libraries: most of one is text of PTX, and variants differ in little."""
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(library, LIBRARY)
        for variant in sorted(variants.glob("*.so")):
            tar.add(variant, f"{VARIANTS}/{variant.name}")


def _place(folder: Path) -> tuple[str, str]:
    """The folder in a command, and the command that unpacks the archive there."""
    where = f"$PWD/{folder.relative_to(ROOT)}" if folder.is_relative_to(ROOT) else str(folder)
    return where, f"python3 -m tarfile -e {where}/{ARCHIVE} {where} && "


def commands(folder: Path) -> list[str]:
    """The first three, to be given from the checkout's root. Each unpacks: it may be on another machine."""
    where, unpack = _place(folder)
    start = f"{unpack}ANCHOR_ATTENTION_LIBRARY={where}/{LIBRARY} PYTHONPATH=python python3 -m benchmarks.gpu"
    return [
        f"# {question}\n{start} --minutes {minutes} --out build/gpu{i} --archive ${{OUT:-build}} --stages {stages}"
        for i, (question, stages, minutes) in enumerate(CALLS, start=1)
    ]


def sweep_command(folder: Path) -> str:
    """What measures the libraries of variants, where the archive has them."""
    where, unpack = _place(folder)
    measure = f"{unpack}PYTHONPATH=python python3 -m benchmarks.gpu.sweep {where}/{VARIANTS} --minutes 8"
    return f"# which tiles and rules are best?\n{measure} --out ${{OUT:-build}}/sweep"


def main() -> None:
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.package", description=__doc__.splitlines()[0])
    command.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "gpu-package")
    command.add_argument("--library", type=Path, default=ROOT / "python" / "anchor_attention" / LIBRARY)
    command.add_argument("--limit-mib", type=float, default=64.0, help="of the checkout and the archive together")
    command.add_argument("--variants", type=Path, default=LIBRARIES, help="folder of the libraries of variants")
    arguments = command.parse_args()
    folder = arguments.folder.resolve()
    targets = sorted({image.target for image in images(arguments.library)})
    if not targets:
        raise SystemExit(f"{arguments.library} holds no GPU code: build it where nvcc is found")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    pack(arguments.library, arguments.variants, archive)
    carried, checkout = archive.stat().st_size, checkout_bytes()
    print(f"{archive}: {carried / MIB:.1f} MiB, GPU code for {', '.join(targets)}")
    print(
        f"with the checkout's {checkout / MIB:.1f} MiB: {(carried + checkout) / MIB:.1f} of {arguments.limit_mib:g} MiB"
    )
    if carried + checkout > arguments.limit_mib * MIB:
        raise SystemExit("too large to travel")
    calls = commands(folder)
    if any(arguments.variants.glob("*.so")):
        calls.append(sweep_command(folder))
    print("\n" + "\n\n".join(calls))


if __name__ == "__main__":
    main()
