"""Puts the package ``nvidia-physicsnemo`` and what it imports under build/physicsnemo, for the tests against it.

    python scripts/fetch_physicsnemo.py        # prints the folder to put on the path

Nothing here depends on the package, which asks for a gigabyte of others: only what its models import is fetched, and it
runs with the torch that is there. It needs Python 3.11.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

VERSION = "2.2.2"
FOLDER = Path(__file__).resolve().parents[1] / "build" / "physicsnemo"
# What its models import when they are loaded, and what that imports: by name, as pip takes minutes to find them.
IMPORTS = """
    aiobotocore aiohappyeyeballs aiohttp aioitertools aiosignal antlr4-python3-runtime==4.9.3 attrs botocore certifi
    charset-normalizer cloudpickle einops frozenlist fsspec gitdb gitpython hydra-core idna importlib-metadata
    jaxtyping jmespath multidict nvtx omegaconf orjson packaging propcache python-dateutil pyvers pyyaml requests
    s3fs six smmap tensordict termcolor timm tqdm treelib urllib3 wadler-lindig warp-lang wrapt yarl zipp
""".split()


def fetch() -> Path:
    """Returns the folder of the package and of what it imports, and fills it where it is missing.

    Raises:
        OSError: If they can't be had, for want of a network for example.
    """
    folder = FOLDER / VERSION
    if not (folder / ".complete").exists():
        # A release of torchvision belongs to one of torch.
        torchvision = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"
        _install(folder, f"nvidia-physicsnemo=={VERSION}", torchvision, *IMPORTS)
        if torch.version.cuda is None:
            _without_operators(folder / "torchvision" / "_meta_registrations.py")
        (folder / ".complete").touch()
    return folder


def _without_operators(path: Path) -> None:
    # torchvision on PyPI is built for CUDA. A torch without CUDA can't load its operators, and then can't find those
    # that these lines describe; the models call none.
    text, found = re.subn(r'^@torch\.library\.register_fake\("torchvision::\w+"\)\n', "", path.read_text(), flags=re.M)
    if not found:
        raise OSError(f"{path} does not describe its operators as it used to")
    path.write_text(text)


def _install(folder: Path, *packages: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run(
        [*command, "--upgrade", "--target", str(folder), *packages], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise OSError(f"pip install of {packages[0]} and what it imports failed: {result.stderr.strip()[-500:]}")


if __name__ == "__main__":
    try:
        print(fetch())
    except OSError as error:
        print(f"left out nvidia-physicsnemo {VERSION}: {error}", file=sys.stderr)
        sys.exit(3)
