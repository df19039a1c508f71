"""Says what is installed: ``python -m anchor_attention``, for bug reports and for builds.

``--cmake-prefix`` prints only what goes into ``CMAKE_PREFIX_PATH``, ``--library`` only the path of the shared library.
"""

from __future__ import annotations

import argparse
import platform

import torch

from . import __version__, cpu_instruction_sets
from ._library import cmake_prefix, library_path


def describe() -> str:
    """Returns versions, the library, and the instruction sets of the CPU kernels, one line each."""
    sets = cpu_instruction_sets()
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("anchor_attention::attention", "CUDA")
    return "\n".join(
        (
            f"anchor-attention  {__version__}",
            f"torch             {torch.__version__}",
            f"Python            {platform.python_version()}, {platform.platform()}",
            f"library           {library_path()}",
            f"CPU kernels       {sets.selected} (runnable: {', '.join(sets.runnable)})",
            f"CUDA kernels      {'compiled in' if has_cuda else 'not compiled in'}",
        )
    )


def main() -> None:
    """Entry point of ``python -m anchor_attention``."""
    parser = argparse.ArgumentParser(prog="python -m anchor_attention", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--cmake-prefix", action="store_true", help="print the entry for CMAKE_PREFIX_PATH")
    choice.add_argument("--library", action="store_true", help="print the path of the shared library")
    arguments = parser.parse_args()
    if arguments.cmake_prefix:
        print(cmake_prefix())
    elif arguments.library:
        print(library_path())
    else:
        print(describe())


if __name__ == "__main__":
    main()
