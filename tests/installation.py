"""The wheel, built from the library that the tests run with, and installed in an environment of its own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from scripts import build_wheel
from tools.locks import once_at_a_time

from anchor_attention._library import library_path

ROOT = Path(__file__).parents[1]
DIRECTORY = ROOT / "build" / "installation"
ENVIRONMENT = DIRECTORY / "environment"


@dataclass(frozen=True)
class Installation:
    """A wheel and an environment with it, where torch is the one of the tests and nothing else of theirs is."""

    wheel: Path
    sdist: Path
    environment: Path

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs the environment's Python, isolated from the checkout."""
        command = [str(self.python), "-I", *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.environment)


@functools.cache
def installation() -> Installation:
    """Builds and installs once a run, whichever of its processes asks first."""
    this_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    finished = DIRECTORY / "run"
    with once_at_a_time(DIRECTORY.with_suffix(".lock")):
        if not (finished.exists() and finished.read_text() == this_run):
            _install()
            finished.write_text(this_run)
    (wheel,), (sdist,) = DIRECTORY.glob("*.whl"), DIRECTORY.glob("*.tar.gz")
    return Installation(wheel, sdist, ENVIRONMENT)


def _install() -> None:
    """CMake finds the library built, so that little is left to do."""
    build_directory = library_path().resolve().parent
    built = (build_directory / "CMakeCache.txt").is_file()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    with mock.patch.dict(os.environ, {"ANCHOR_ATTENTION_BUILD_DIRECTORY": str(build_directory)} if built else {}):
        wheel = build_wheel.build_wheel(DIRECTORY)
        build_wheel.build_sdist(DIRECTORY)
    venv.create(ENVIRONMENT, symlinks=True)
    python = str(ENVIRONMENT / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run(
        [*pip, "install", "--quiet", "--ignore-installed", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # A .pth file is read here, but those beside torch are not: an editable installation of the checkout stays unseen.
    (site_packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (site_packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
