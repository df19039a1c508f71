"""Puts a release of the package ``emmiai-noether`` and what it imports under build/noether, for the tests against it.

    python scripts/fetch_noether.py 2026.4.0        # prints the folders to put on the path, with ":" between them

The package is of non-production licence: nothing of it is committed, and nothing here depends on it. It pins torch and
NumPy; it is unpacked, not installed, so that it runs with those that are there. Its wheels ask for Python 3.12 for the
sake of one piece of syntax, type parameters in brackets; for an older Python those headers are rewritten to the older
spelling of the same.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "noether"
VERSIONS = ("1.1.0", "2.0.0", "2026.4.0")
# What its modules import when they are loaded, besides torch and NumPy.
IMPORTS = ("pydantic", "einops", "loguru", "hydra-core", "psutil")

PARAMETERS = r"\[(?P<parameters>[^\[\]]+)\]"
CLASS = re.compile(rf"^class (?P<name>\w+){PARAMETERS}(?:\((?P<bases>[^()]*)\))?:", re.MULTILINE)
FUNCTION = re.compile(rf"^(?P<head>(?:async )?def \w+){PARAMETERS}\(", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", choices=VERSIONS)
    version = parser.parse_args().version
    print(":".join(str(folder) for folder in fetch(version)))


def fetch(version: str) -> tuple[Path, Path]:
    """Returns the folders of a release and of what it imports, and fills them where they are missing.

    Raises:
        OSError: If they can't be had, for want of a network for example.
    """
    package, imports = FOLDER / version, FOLDER / "imports"
    if not (imports / ".complete").exists():
        _pip("install", "--target", str(imports), "--upgrade", *IMPORTS)
        (imports / ".complete").touch()
    if not (package / ".complete").exists():
        package.mkdir(parents=True, exist_ok=True)
        arguments = ("--no-deps", "--ignore-requires-python", "--dest", str(package))
        _pip("download", *arguments, f"emmiai-noether=={version}")
        (wheel,) = package.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(package)
        wheel.unlink()
        if sys.version_info < (3, 12):
            for path in package.rglob("*.py"):
                text = path.read_text()
                spelt = without_brackets(text)
                if spelt != text:
                    path.write_text(spelt)
        (package / ".complete").touch()
    return package, imports


def without_brackets(source: str) -> str:
    """Rewrites the type parameters in the headers of classes and functions as module-level type variables."""
    variables: set[str] = set()

    def names(match: re.Match[str]) -> list[str]:
        found = [part.split(":")[0].strip() for part in match["parameters"].split(",")]
        variables.update(found)
        return found

    def class_header(match: re.Match[str]) -> str:
        bases = [base for base in (match["bases"] or "").split(",") if base.strip()]
        bases.append(f"typing.Generic[{', '.join(names(match))}]")
        return f"class {match['name']}({', '.join(base.strip() for base in bases)}):"

    def function_header(match: re.Match[str]) -> str:
        names(match)
        return f"{match['head']}("

    rewritten = FUNCTION.sub(function_header, CLASS.sub(class_header, source))
    if not variables:
        return source
    lines = "".join(f'{name} = typing.TypeVar("{name}")\n' for name in sorted(variables))
    future = re.search(r"^from __future__ .*\n", rewritten, re.MULTILINE)
    at = future.end() if future else 0
    return f"{rewritten[:at]}import typing\n{lines}{rewritten[at:]}"


def _pip(command: str, *arguments: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:")
    result = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise OSError(f"pip {command} {arguments[-1]} failed: {result.stderr.strip()[-500:]}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"fetch_noether: {error}")
