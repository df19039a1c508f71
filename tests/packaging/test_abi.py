"""The library asks for nothing but the stable interface of torch and system libraries of the wheel's age."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from scripts.audit_abi import audit, needed_libraries, undefined_symbols

from anchor_attention._library import library_path
from tests.installation import ROOT, installation

INCLUDE = Path(torch.__file__).parent / "include"


def promised_glibc() -> tuple[int, ...]:
    """What the tag of the wheel says that the library runs with."""
    return tuple(map(int, re.search(r"-manylinux_(\d+)_(\d+)_", installation().wheel.name).groups()))


def test_the_library_is_on_the_stable_abi() -> None:
    allowed, findings = audit(library_path(), promised_glibc())
    assert not findings
    assert sum(count for rule, count in allowed.items() if "torch_" in rule) > 20


def test_every_function_of_torch_is_declared_in_its_stable_headers() -> None:
    """The prefix alone is a habit of names; what torch keeps stable is what these headers declare."""
    headers = "".join(
        (INCLUDE / "torch" / "csrc" / name).read_text()
        for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/c/macros.h")
    )
    names = {name for name, version in undefined_symbols(library_path()) if not version and "torch_" in name}
    assert names
    assert not {name for name in names if f"{name}(" not in headers}


def test_the_library_names_itself_and_no_path() -> None:
    dynamic = subprocess.run(["readelf", "-d", library_path()], capture_output=True, text=True, check=True).stdout
    assert "Library soname: [libanchor_attention.so]" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libtorch_cpu.so" in needed_libraries(library_path())


FORBIDDEN = {
    "c10": ("namespace c10 { void warn(int); } void use() { c10::warn(1); }", "_ZN3c104warnEi (c10::warn(int))"),
    "at": (
        "namespace at { int get_num_threads(); } int use() { return at::get_num_threads(); }",
        "at::get_num_threads",
    ),
    "torch": ("namespace torch { void f(); } void use() { torch::f(); }", "torch::f()"),
    "python": ('extern "C" void PyErr_Clear(); void use() { PyErr_Clear(); }', "PyErr_Clear"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_forbidden_symbol_is_found(case: str, tmp_path: Path) -> None:
    code, message = FORBIDDEN[case]
    _, findings = audit(compiled(code, tmp_path), promised_glibc())
    assert len(findings) == 1 and message in findings[0]


def test_a_library_that_is_not_part_of_the_system_is_found(tmp_path: Path) -> None:
    compiled("void f() {}", tmp_path, name="libplanted")
    library = compiled("void f(); void use() { f(); }", tmp_path, f"-L{tmp_path}", "-lplanted")
    _, findings = audit(library, promised_glibc())
    assert "libplanted.so is linked to" in findings


def test_a_system_library_that_is_too_new_is_found() -> None:
    versions = {version for _, version in undefined_symbols(library_path()) if version.startswith("GLIBC_")}
    major, minor = max(tuple(map(int, version.removeprefix("GLIBC_").split(".")[:2])) for version in versions)
    assert not audit(library_path(), (major, minor))[1]
    findings = audit(library_path(), (major, minor - 1))[1]
    assert findings and all(finding.endswith(f"needs GLIBC_{major}.{minor}") for finding in findings)


def test_the_script_fails_on_what_it_finds(tmp_path: Path) -> None:
    library = compiled(FORBIDDEN["c10"][0], tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "audit_abi.py"), str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "not allowed: _ZN3c104warnEi (c10::warn(int)) is in no stable interface" in result.stderr


def compiled(code: str, directory: Path, *options: str, name: str = "library") -> Path:
    source, library = directory / f"{name}.cpp", directory / f"{name}.so"
    source.write_text(code)
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library), *options], check=True)
    return library
