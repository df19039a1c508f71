"""Lists the operations that the kernels of some PTX files use and that other programs have not been run with.

PTX_EMULATOR_OPERATIONS=build/conformance.txt python -m pytest tests/tools/ptx_emulator
python -m tools.uncovered_operations build/ptx/*/*.ptx --known build/corpus/triton/*/*.ptx build/conformance.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from tools.ptx_emulator import Module
from tools.ptx_emulator.coverage import operations, read


def users(files: Iterable[Path]) -> dict[str, set[str]]:
    """The files, by name, that use an operation."""
    found: dict[str, set[str]] = {}
    for path in files:
        module = Module.from_ptx(path)
        for kernel in module.text.kernels:
            for operation in operations(module.lowered(kernel)):
                found.setdefault(operation, set()).add(path.stem)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptx", type=Path, nargs="+")
    described = "PTX of other programs, and lists that the emulator has written"
    parser.add_argument("--known", type=Path, nargs="*", default=[], help=described)
    arguments = parser.parse_args()
    known = set(users(path for path in arguments.known if path.suffix == ".ptx"))
    known.update(*(read(path) for path in arguments.known if path.suffix != ".ptx"))
    used = users(arguments.ptx)
    missing = sorted(used.keys() - known)
    print(f"{len(used)} operations, of which {len(missing)} are not known:")
    for operation in missing:
        print(f"  {operation}: {', '.join(sorted(used[operation]))}")


if __name__ == "__main__":
    main()
