"""The wheel and the source distribution: what is in them, what they are called, and that they work."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from scripts import test_wheel as matrix
from scripts.build_wheel import tool_environment

import anchor_attention
from tests.installation import ROOT, installation

PACKAGE = ROOT / "python" / "anchor_attention"


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_one_wheel_serves_every_python() -> None:
    version = re.escape(anchor_attention.__version__)
    name = installation().wheel.name
    assert re.fullmatch(rf"anchor_attention-{version}-py3-none-manylinux_\d+_\d+_{platform.machine()}\.whl", name)


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    expected = {f"anchor_attention/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    expected |= {
        "anchor_attention/py.typed",
        "anchor_attention/libanchor_attention.so",
        "anchor_attention/share/cmake/anchor_attention/anchor_attention-config.cmake",
        "anchor_attention/share/cmake/anchor_attention/anchor_attention-config-version.cmake",
    }
    names = {name for name in members(installation().wheel) if ".dist-info/" not in name}
    assert names == expected


def test_the_version_has_one_source() -> None:
    files = members(installation().wheel)
    version = anchor_attention.__version__
    (metadata,) = (text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {version}\n" in metadata
    (cmake,) = (text.decode() for name, text in files.items() if name.endswith("config-version.cmake"))
    assert f'set(PACKAGE_VERSION "{version}")' in cmake
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)
    sources = ["pyproject.toml", "setup.py", "CMakeLists.txt", "cmake/anchor_attention-config.cmake"]
    assert not any(re.search(rf"\b{re.escape(version)}\b", (ROOT / source).read_text()) for source in sources)


def test_it_works_where_it_is_installed() -> None:
    result = installation().run(ROOT / "scripts" / "smoke_test.py")
    assert result.returncode == 0, result.stderr
    assert re.search(
        rf"anchor-attention .* works: .* installed in {re.escape(str(installation().environment))}/", result.stdout
    )


def test_it_says_what_is_installed() -> None:
    result = installation().run("-m", "anchor_attention")
    assert result.returncode == 0, result.stderr
    environment = str(installation().environment)
    for line in (
        rf"anchor-attention +{re.escape(anchor_attention.__version__)}",
        rf"library +{re.escape(environment)}/.*/libanchor_attention\.so",
        rf"CPU kernels +{anchor_attention.cpu_instruction_sets().selected} ",
        "CUDA kernels +(not )?compiled in",
    ):
        assert re.search(rf"^{line}", result.stdout, flags=re.M), result.stdout
    library = installation().run("-m", "anchor_attention", "--library").stdout.strip()
    assert Path(library).is_file() and library.startswith(environment)


def test_without_an_installation_there_is_no_cmake_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "anchor_attention" / "_library.py"
    monkeypatch.setattr(anchor_attention._library, "__file__", str(module))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/anchor_attention has no share/cmake.*pip install"):
        anchor_attention._library.cmake_prefix()


def test_an_editable_installation_has_a_cmake_prefix(tmp_path: Path) -> None:
    """What CMake installs gets into the source tree; a stand-in for CMake builds nothing."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "python" / "anchor_attention", ignore=shutil.ignore_patterns("*.so", "share"))
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(
        """#!/bin/sh
[ "$1" = --install ] || exit 0
mkdir -p "$4/anchor_attention/share/cmake/anchor_attention"
touch "$4/anchor_attention/libanchor_attention.so"
touch "$4/anchor_attention/share/cmake/anchor_attention/anchor_attention-config.cmake"
"""
    )
    cmake.chmod(0o755)
    environment = os.environ | {"PATH": f"{cmake.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    package = tmp_path / "python" / "anchor_attention"
    assert (package / "libanchor_attention.so").is_file()
    assert (package / "share" / "cmake" / "anchor_attention" / "anchor_attention-config.cmake").is_file()


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    """Every source is in it, and it configures: CMake checks that what CMakeLists.txt names is there."""
    with tarfile.open(installation().sdist) as archive:
        archive.extractall(tmp_path)
    (tree,) = tmp_path.iterdir()
    assert tree.name == f"anchor_attention-{anchor_attention.__version__}"
    sources = [path for folder in ("csrc", "cmake") for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources += [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
    sources += [ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE")]
    for source in sources:
        assert (tree / source.relative_to(ROOT)).read_bytes() == source.read_bytes()
    assert not list(tree.rglob("*.so"))
    options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DANCHOR_ATTENTION_CUDA=OFF"]
    command = ["cmake", "-S", tree, "-B", tmp_path / "build", *options]
    subprocess.run(command, env=tool_environment(), check=True, capture_output=True)


def test_the_table_of_environments_comes_from_its_raw_file() -> None:
    results = json.loads(matrix.RESULTS.read_text())
    page = matrix.PAGE.read_text()
    assert page.split(matrix.BEGIN)[1].split(matrix.END)[0].strip() == matrix.table(results)
    tested = {entry["torch"].split("+")[0] for entry in results["environments"]}
    assert tested >= set(matrix.TORCH_VERSIONS)


def test_every_python_is_found_once() -> None:
    versions = [
        subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
        ).stdout
        for python in matrix.pythons()
    ]
    assert len(set(versions)) == len(versions)
    assert f"{sys.version_info.major} {sys.version_info.minor}\n" in versions
