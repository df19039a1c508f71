"""Audits what the library asks of its surroundings: only the stable ABI of libtorch, and system libraries of some age.

Usage: python scripts/audit_abi.py [LIBRARY] [--glibc 2.34]   (default: the library of the installed package)

Prints every undefined symbol's kind and count, and ends with status 1 if one is not allowed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Prefixes of unversioned symbols, and why they may be asked for. Everything else without a version is refused: mangled
# C++ names of c10::, at:: and torch::, whose ABI changes with every torch, and Python's.
STABLE_PREFIXES = {
    "aoti_torch_": "C interface of AOTInductor, which torch keeps stable",
    "torch_": "C interface for extensions, which torch keeps stable from 2.10 on",
    "_ITM_": "GCC's weak hooks of transactional memory",
    "__gmon_start__": "GCC's weak hook of the profiler",
    "__cxa_finalize": "GCC's weak call of destructors on unloading",
}

# Families of symbol versions that a wheel may ask for. How new those of GCC may be beside a glibc is for auditwheel to
# say, which gives the wheel its tag.
GLIBC = "GLIBC"
GCC_FAMILIES = ("GLIBCXX", "CXXABI", "GCC")

# libtorch_cpu.so has the stable interface in every build of torch; the CUDA runtime is linked in statically.
NEEDED_LIBRARIES = re.compile(r"lib(torch_cpu|stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so(\.\d+)?|ld-linux-[\w-]+\.so\.\d+")


def undefined_symbols(library: Path) -> list[tuple[str, str]]:
    """Returns (name, version) of every dynamic symbol that others must define; version is "" without one."""
    listing = _output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(library))
    symbols = []
    for line in listing.splitlines():
        name, _, version = line.split()[-1].partition("@")
        symbols.append((name, version.lstrip("@")))
    return symbols


def needed_libraries(library: Path) -> list[str]:
    """Returns the libraries that the loader loads with this one."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _output("readelf", "-d", str(library)))


def audit(library: Path, newest_glibc: tuple[int, ...]) -> tuple[Counter[str], list[str]]:
    """Returns how many symbols each rule allows, and what no rule does."""
    allowed: Counter[str] = Counter()
    findings = []
    for name, version in undefined_symbols(library):
        if version:
            family, _, numbers = version.partition("_")
            # Not GLIBC_PRIVATE, which belongs to one glibc.
            is_number = re.fullmatch(r"[\d.]+", numbers) is not None
            if family == GLIBC and is_number and tuple(map(int, numbers.split("."))) <= newest_glibc:
                allowed[f"{GLIBC} ≤ {'.'.join(map(str, newest_glibc))}"] += 1
            elif family in GCC_FAMILIES:
                allowed[family] += 1
            else:
                findings.append(f"{name} needs {version}")
            continue
        prefix = next((prefix for prefix in STABLE_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            findings.append(f"{name} ({_output('c++filt', name).strip()}) is in no stable interface")
        else:
            allowed[f"{prefix}: {STABLE_PREFIXES[prefix]}"] += 1
    findings += [
        f"{needed} is linked to" for needed in needed_libraries(library) if not NEEDED_LIBRARIES.fullmatch(needed)
    ]
    return allowed, findings


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path)
    parser.add_argument("--glibc", default="2.34", help="the oldest that the library must run with")
    arguments = parser.parse_args()
    library = arguments.library
    if library is None:
        from anchor_attention._library import library_path

        library = library_path()
    allowed, findings = audit(library, tuple(int(number) for number in arguments.glibc.split(".")))
    for rule, count in sorted(allowed.items()):
        print(f"{count:4d}  {rule}")
    for finding in findings:
        print(f"not allowed: {finding}", file=sys.stderr)
    if findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
