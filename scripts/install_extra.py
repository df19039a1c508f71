"""Installs the packages of an optional group of pyproject.toml, and nothing that would touch the installed torch.

Usage: python scripts/install_extra.py GROUP
"""

import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from setuptools._vendor import tomli as tomllib


def main() -> None:
    group = sys.argv[1]
    metadata = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())
    groups = metadata["project"]["optional-dependencies"]
    if group not in groups:
        raise SystemExit(f"pyproject.toml has no optional group {group!r}, only {sorted(groups)}")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *groups[group]]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"Can't install the packages for {group!r}: {', '.join(groups[group])}. Is there a network?")


if __name__ == "__main__":
    main()
