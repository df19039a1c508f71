"""The C++ programs: built as docs/cpp.md says, against the installed wheel, and compared with Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scripts.build_wheel import tool_environment

import anchor_attention
from anchor_attention import KeyRangeTable
from tests.installation import ROOT, installation

PAGE = (ROOT / "docs" / "cpp.md").read_text()
POINT_FEATURES, POINTS, FIELDS = 3, 100_000, 4


class Session(NamedTuple):
    """A directory in which the commands of the page were run, and what they printed."""

    directory: Path
    output: str

    @property
    def programs(self) -> Path:
        return self.directory / "build" / "examples-cpp"

    @property
    def decoder(self) -> Path:
        return self.directory / "build" / "decoder"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Runs every command of the page, in order, where `python` is the environment with the wheel."""
    directory = tmp_path_factory.mktemp("cpp")
    (directory / "examples").symlink_to(ROOT / "examples")
    environment = {name: value for name, value in tool_environment().items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{installation().python.parent}{os.pathsep}{environment['PATH']}"
    # What the linkers of many distributions do on their own.
    environment["LDFLAGS"] = "-Wl,--as-needed"
    script = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S))
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Session(directory, ran.stdout)


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *(str(argument) for argument in arguments)], capture_output=True, text=True)


def fields(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(-1, FIELDS)


@pytest.mark.parametrize("language, files", [("cmake", ("CMakeLists.txt",)), ("cpp", ("*.cpp",))])
def test_code_of_the_page_is_in_the_examples(language: str, files: tuple[str, ...]) -> None:
    sources = [path.read_text() for pattern in files for path in (ROOT / "examples" / "cpp").glob(pattern)]
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    assert blocks
    for block in blocks:
        assert any(block in source for source in sources), block


def test_programs_link_libtorch_and_the_library_only(session: Session) -> None:
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    for program in ("stream_queries", "call_operation"):
        listing = subprocess.run(
            ["readelf", "-d", session.programs / program], capture_output=True, text=True, check=True
        )
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout))
        assert needed - system == {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libanchor_attention.so"}


def test_streamed_fields_are_those_of_python(session: Session) -> None:
    printed = re.search(
        r"^(\d+) points in chunks of 4096: .* s in the model; ([\d.e+]+) points/s$", session.output, re.M
    )
    assert int(printed.group(1)) == POINTS and float(printed.group(2)) > 0
    expected = fields(session.decoder / "fields_of_python.f32")
    assert expected.shape == (POINTS, FIELDS) and expected.std(0).min() > 0
    torch.testing.assert_close(fields(session.decoder / "fields.f32"), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n_points, chunk", [(1000, 1), (1000, 999), (1000, 1000), (1000, 10**12), (0, 5)])
def test_any_chunk_size_gives_the_same(session: Session, n_points: int, chunk: int, tmp_path: Path) -> None:
    points, output = tmp_path / "points.f32", tmp_path / "fields.f32"
    points.write_bytes((session.decoder / "points.f32").read_bytes()[: 4 * POINT_FEATURES * n_points])
    ran = run(session.programs / "stream_queries", session.decoder / "decoder.pt2", points, output, chunk)
    assert ran.returncode == 0, ran.stderr
    expected = fields(session.decoder / "fields_of_python.f32")[:n_points]
    torch.testing.assert_close(fields(output), expected, rtol=0, atol=2e-6)


def test_wrong_arguments_are_named(session: Session, tmp_path: Path) -> None:
    stream, model = session.programs / "stream_queries", session.decoder / "decoder.pt2"
    points, output = session.decoder / "points.f32", tmp_path / "fields.f32"
    short = tmp_path / "short.f32"
    short.write_bytes(b"\0" * 25)
    for arguments, status, message in (
        ((), 2, "Usage: stream_queries MODEL.pt2 POINTS OUTPUT"),
        ((model, tmp_path / "none.f32", output), 1, f"can't read {tmp_path}/none.f32"),
        ((model, short, output), 1, f"{short} has 25 bytes, which is no multiple of 12"),
        ((model, points, tmp_path / "none" / "fields.f32"), 1, f"can't write {tmp_path}/none/fields.f32"),
        ((model, points, output, "many"), 1, "POINTS PER CHUNK must be a positive integer, got 'many'"),
        ((model, points, output, "-3"), 1, "POINTS PER CHUNK must be a positive integer, got '-3'"),
        ((short, points, output), 1, "stream_queries: "),
    ):
        ran = run(stream, *arguments)
        assert ran.returncode == status, ran
        assert message in ran.stderr


def test_the_operation_called_from_cpp_is_that_of_python(session: Session) -> None:
    assert "agrees with a plain softmax in float64" in session.output
    batch, n_queries, n_keys, heads, head_dim = 2, 300, 160, 3, 64
    shapes = [(batch, n, heads, head_dim) for n in (n_queries, n_keys, n_keys)]
    raw = torch.from_numpy(np.fromfile(session.directory / "build" / "operation.f32", dtype=np.float32))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    q, k, v, out, *grads = raw.split([*sizes, sizes[0], *sizes])
    inputs = [tensor.reshape(shape).requires_grad_() for tensor, shape in zip((q, k, v), shapes, strict=True)]
    table = KeyRangeTable.from_ranges([[0, 200], [200, 300], [200, 300]], [[0, 128], [0, 64], [128, 160]])
    expected = anchor_attention.anchor_attention(*inputs, table)
    torch.testing.assert_close(out.view_as(expected), expected, rtol=0, atol=1e-6)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(grad.view_as(expected_grad), expected_grad, rtol=0, atol=1e-5)


def test_cmake_says_what_does_not_fit(tmp_path: Path) -> None:
    installed = Path(installation().run("-m", "anchor_attention", "--cmake-prefix").stdout.strip())
    script = tmp_path / "find.cmake"

    def find(version: str, prefix: Path) -> str:
        script.write_text(f"find_package(anchor_attention {version} REQUIRED)")
        command = ["cmake", f"-DCMAKE_PREFIX_PATH={prefix}", "-P", script]
        ran = subprocess.run(command, env=tool_environment(), capture_output=True, text=True)
        assert ran.returncode != 0
        return " ".join(ran.stderr.split())

    assert f"version: {anchor_attention.__version__}" in find("77.0", installed)
    shutil.copytree(installed / "share", tmp_path / "share")
    assert f"the library {tmp_path}/libanchor_attention.so is missing: reinstall" in find("", tmp_path)
