"""Installs the wheel in clean environments, with every torch and every Python here, and runs the smoke test in each.

Usage: python scripts/test_wheel.py WHEEL [--torch VERSION ...] [--python EXECUTABLE ...]

Writes docs/wheels.json and the table of docs/wheels.md that is made from it. Whatever build of torch the package index
has for a version is taken: gigabytes for one with CUDA, of which only the newest stay on the disk while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "wheel-test"
RESULTS = ROOT / "docs" / "wheels.json"
PAGE = ROOT / "docs" / "wheels.md"
TORCH_VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "2.13.0")
OLDEST_PYTHON = (3, 10)
NO_BUILD = "no such build"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"

Result = dict[str, str]


def pythons() -> list[Path]:
    """Every CPython from 3.10 on, the newest patch of each: on PATH, and those that pyenv manages."""
    candidates = [Path(sys.executable)]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for directory in map(Path, os.environ.get("PATH", "").split(os.pathsep)):
        # pyenv's shims answer only for the versions that are selected, and slowly.
        if directory != pyenv / "shims":
            # Beside an interpreter lie scripts that begin with its name: python3.11-config, python3.11-gdb.py.
            candidates += sorted(path for path in directory.glob("python3.*") if path.suffix[1:].isdigit())
    candidates += sorted(pyenv.glob("versions/*/bin/python3"))
    found: dict[tuple[int, ...], tuple[tuple[int, ...], Path]] = {}
    script = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:3])"
    for candidate in candidates:
        answer = subprocess.run([str(candidate), "-c", script], capture_output=True, text=True)
        match = re.fullmatch(r"CPython (\d+) (\d+) (\d+)\n", answer.stdout) if answer.returncode == 0 else None
        if match is None:
            continue
        version = tuple(int(part) for part in match.groups())
        if version[:2] >= OLDEST_PYTHON and version > found.get(version[:2], ((), candidate))[0]:
            found[version[:2]] = version, candidate
    return [found[minor][1] for minor in sorted(found)]


def uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uv", *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"UV_CACHE_DIR": str(SCRATCH / "cache")}
    )


def test_environment(wheel: Path, python: Path, torch_version: str) -> Result:
    """Installs torch and the wheel into a fresh environment, runs the smoke test, and says how it went."""
    environment = SCRATCH / "environment"
    begin = time.monotonic()
    uv("venv", "--clear", "--python", python, environment).check_returncode()
    interpreter = environment / "bin" / "python"
    # As pip does with the same setting; uv has a name of its own for it.
    links = [f"--find-links={link}" for link in shlex.split(os.environ.get("PIP_FIND_LINKS", ""))]
    installed = uv("pip", "install", "--python", interpreter, *links, f"torch=={torch_version}", wheel)
    if installed.returncode != 0:
        outcome = f"can't be installed: {' '.join(installed.stderr.split())}"
        reported = torch_version
    else:
        smoke_test = [str(interpreter), "-I", str(ROOT / "scripts" / "smoke_test.py")]
        ran = subprocess.run(smoke_test, capture_output=True, text=True, cwd=SCRATCH)
        outcome = "passed" if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["no message"])[-1]
        version = [str(interpreter), "-I", "-c", "import torch; print(torch.__version__)"]
        reported = subprocess.run(version, capture_output=True, text=True).stdout.strip()
    full_version = subprocess.run([str(python), "-V"], capture_output=True, text=True).stdout.split()[-1]
    shutil.rmtree(environment)
    seconds = f"{time.monotonic() - begin:.0f}"
    return {"python": full_version, "torch": reported, "outcome": outcome, "seconds": seconds}


def is_missing(result: Result) -> bool:
    """Whether the package index has no build of that torch for that Python."""
    return "has no wheels with a matching Python" in result["outcome"]


def table(results: dict[str, object]) -> str:
    """Renders the results as a table: a row for each torch, a column for each Python."""
    entries: list[Result] = results["environments"]  # type: ignore[assignment]
    columns = list(dict.fromkeys(entry["python"] for entry in entries))
    rows: dict[str, dict[str, str]] = {}
    for entry in entries:
        release, _, build = entry["torch"].partition("+")
        # The installer's own words, which say more, are in the raw file.
        outcome = NO_BUILD if is_missing(entry) else entry["outcome"]
        cell = f"{outcome} ({build})" if build else outcome
        rows.setdefault(release, {})[entry["python"]] = cell
    lines = [
        f"`{results['wheel']}` on {results['system']}, each in a fresh environment:",
        "",
        "| torch | " + " | ".join(f"Python {column}" for column in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for release, cells in rows.items():
        lines.append(f"| {release} | " + " | ".join(cells.get(column, "not run") for column in columns) + " |")
    return "\n".join(lines)


def write_table(results: dict[str, object]) -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=TORCH_VERSIONS, metavar="VERSION")
    parser.add_argument("--python", nargs="+", type=Path, default=None, metavar="EXECUTABLE")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    environments = []
    for torch_version in arguments.torch:
        for python in arguments.python or pythons():
            result = test_environment(wheel, python, torch_version)
            environments.append(result)
            print(
                f"Python {result['python']}, torch {result['torch']}: {result['outcome']} ({result['seconds']} s)",
                flush=True,
            )
        uv("cache", "clean", "torch").check_returncode()
    shutil.rmtree(SCRATCH / "cache")
    system = f"{platform.machine()}, {' '.join(platform.libc_ver())}"
    results: dict[str, object] = {"wheel": wheel.name, "system": system, "environments": environments}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_table(results)
    if any(result["outcome"] != "passed" and not is_missing(result) for result in environments):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
