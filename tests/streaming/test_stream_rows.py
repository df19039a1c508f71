"""Every row is written, or the stream says why not before it touches anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anchor_attention.streaming import chunk_size_for_budget, stream

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def double(cache: Any, chunk: Tensor) -> Tensor:
    return torch.cat((2 * chunk, chunk[..., :1]), dim=-1)


def by_branch(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_p": double(cache, value) for name, value in chunk.items()}


def refused(message: str, decode: Any, *arguments: Any, decoded: int = 0, **options: Any) -> None:
    """Checks that a stream is refused after so many chunks, and that its arrays hold these rows alone."""
    calls = 0

    def counting(cache: Any, chunk: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(cache, chunk)

    with pytest.raises(ValueError, match=message):
        stream(counting, None, *arguments, **options)
    assert calls == decoded


def test_arrays_that_can_not_take_every_row_are_refused_first() -> None:
    branches = {"a": X, "b": X[:10]}
    for message, arguments, options in (
        (r"branch_of\[''\] must be one of the branches \[''\], got 'pressure'", (X,), {"branch_of": {"": "pressure"}}),
        (
            r"branch_of\['total'\] must be one of the branches \['a', 'b'\], got 'c'",
            (branches,),
            {"branch_of": {"total": "c"}},
        ),
        (r"outputs\[''\] of shape \(35, 4\) must have 40 rows", (X, torch.empty(35, 4)), {}),
        (r"outputs\[''\] of shape \(50, 4\) must have 40 rows", (X, np.empty((50, 4))), {}),
        (r"outputs\['b_p'\] of shape \(40, 4\) must have 10 rows", (branches, {"b_p": torch.empty(40, 4)}), {}),
        (r"outputs\[''\] must be an array \(N, C\) or \(B, N, C\), got \(40,\)", (X, torch.empty(40)), {}),
        (r"outputs\[''\] must be an array, got the path 'y.npy'", (X, "y.npy"), {}),
        ("queries must be an array, got the path 'x.npy'", ("x.npy",), {}),
        (r"queries\['a'\] must be an array, got the path", ({"a": Path("x.npy")},), {}),
        ("queries must be arrays by names of branches, got float at 'a'", ({"a": 1.5},), {}),
        ("queries must all have one batch size", ({"a": X[None], "b": X.expand(2, -1, -1)},), {}),
        ("chunk_size must be positive and whole, got 10.0", (X,), {"chunk_size": 10.0}),
        ("chunk_size must be positive and whole, got True", (X,), {"chunk_size": True}),
        ("chunk_size must be positive and whole, got '64k'", (X,), {"chunk_size": {"": "64k"}}),
        ("memory_budget, in bytes, must be positive and whole, got '4GB'", (X,), {"memory_budget": "4GB"}),
        ("memory_budget, in bytes, must be positive and whole, got 4000000000.0", (X,), {"memory_budget": 4e9}),
        ("checkpoint must be a file in a folder that exists", (X, X), {"checkpoint": "no/such/folder/note.json"}),
    ):
        refused(message, by_branch if isinstance(arguments[0], dict) else double, *arguments, **options)
    with pytest.raises(ValueError, match=r"got the path 'cache.pt': use Cache.load\(path\)"):
        stream(double, "cache.pt", X)
    with pytest.raises(ValueError, match="memory_budget, in bytes,"):
        chunk_size_for_budget(double, None, X, "4GB")  # type: ignore[arg-type]
    assert stream(double, None, X, chunk_size=np.int64(10)).chunks == 4


def test_arrays_that_keep_nothing_are_refused_first(tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.zeros((40, 4), dtype=np.float32))
    refused("is read-only: open it for writing", double, X, np.load(tmp_path / "y.npy", mmap_mode="r"))
    refused("is never written to its file: use 'r", double, X, np.load(tmp_path / "y.npy", mmap_mode="c"))


def test_outputs_that_do_not_fit_are_refused_before_one_is_written() -> None:
    out = torch.full((40, 4), 7.0)
    two = {"a": X, "b": X}

    def first_only(cache: Any, chunk: Tensor) -> dict[str, Tensor]:
        return {"p": double(cache, chunk), **({"q": chunk} if torch.equal(chunk[0, 0], X[0]) else {})}

    def later_only(cache: Any, chunk: Tensor) -> dict[str, Tensor]:
        return {"p": double(cache, chunk), **({} if torch.equal(chunk[0, 0], X[0]) else {"q": chunk})}

    for decoded, message, decode, *arguments in (
        (1, r"decode must return \(1, 10, C\) for 'its output', got \(2, 10, 3\)", lambda c, x: x.expand(2, -1, -1), X),
        (1, r"decode must return \(2, 10, C\)", lambda c, x: x[:1], X.expand(2, -1, -1)),
        (1, r"a tensor \(B, n, C\) or a dictionary .*, got a tuple of 2", lambda c, x: (x, x), X),
        (1, "got a ndarray at 'p'", lambda c, x: {"p": x.numpy()}, X),
        (1, "got a NoneType", lambda c, x: None, X),
        (1, r"can't take the rows \[0, 10\) of shape \(10, 3\)", lambda c, x: x, X, out),
        (1, "must hold an array for 'p'", lambda c, x: {"p": x}, X, out),
        (1, "of torch.int32 can't hold what decode returns, torch.float32", double, X, torch.empty(40, 4).int()),
        (1, "of int64 can't hold what decode returns", double, X, np.empty((40, 4), dtype=np.int64)),
        (
            1,
            "of float32 can't hold what decode returns, torch.complex64",
            lambda c, x: double(c, x) + 0j,
            X,
            np.float32(out),
        ),
        (1, "decode returned no output for rows .0, 10. of 'b'", lambda c, x: {"a_p": x["a"]}, two),
        (1, "decode returned no output for rows .0, 10. of 'the queries'", lambda c, x: {}, X),
        (1, r"must return 'q' for rows \(0, 10\) too, got \['p'\]", lambda c, x: {"p": x}, X, {"p": X, "q": X}),
        (2, r"must return 'q' for rows \(10, 20\) too, got \['p'\]", first_only, X),
        (2, "decode returned 'q' only from row 10 on", later_only, X),
    ):
        refused(message, decode, *arguments, decoded=decoded, chunk_size=10)
    assert (out == 7).all()
    # What is given for both outputs is checked before either is written.
    p = torch.full((40, 4), 7.0)
    refused(
        r"outputs\['q'\] of shape \(40, 9\)",
        lambda c, x: {"p": double(c, x), "q": x},
        X,
        {"p": p, "q": torch.empty(40, 9)},
        decoded=1,
    )
    assert (p == 7).all()


def test_an_iterator_that_leaves_rows_unwritten_is_an_error() -> None:
    out = torch.empty(50, 4)
    refused(r"must have 40 rows", double, iter(X.split(10)), out, decoded=4)
    refused("queries gave no chunk at all", double, iter([]))
    exhausted = iter(X.split(10))
    assert stream(double, None, exhausted).points == 40
    refused("an iterator that was used before is empty", double, exhausted)
    refused("chunks must all be arrays or all dictionaries", double, iter([X, X[None]]), decoded=1)
    refused("chunks must all be arrays or all dictionaries", double, iter([X[None], X.expand(2, -1, -1)]), decoded=1)
    refused("a chunk must be an array, got the path 'x.npy'", double, iter(["x.npy"]))
    chunks = [{"a": X[:10]}, {"a": X[10:], "b": X[:0]}]
    outputs = stream(by_branch, None, iter(chunks)).outputs
    assert torch.equal(outputs["a_p"], double(None, X)) and outputs["b_p"].shape == (0, 4)


def cautious(cache: Any, chunk: Any) -> Any:
    """A model that can't be called with no rows."""
    (value,) = chunk.values() if isinstance(chunk, dict) else (chunk,)
    assert value.shape[1] > 0
    return by_branch(cache, chunk) if isinstance(chunk, dict) else double(cache, chunk)


@pytest.mark.parametrize("decode", ["any", "cautious"])
def test_no_rows_give_outputs_with_no_rows(decode: str) -> None:
    one, many = (cautious, cautious) if decode == "cautious" else (double, by_branch)
    for queries in (X[:0], X[:0].numpy(), iter([X[:0]])):
        report = stream(one, None, queries)
        assert report.outputs.shape == (0, 4) and report.outputs.dtype == torch.float32 and report.points == 0
    assert stream(one, None, X[None, :0].expand(2, -1, -1).double()).outputs.shape == (2, 0, 4)
    outputs = stream(many, None, {"surface": X, "volume": X[:0]}, chunk_size=15).outputs
    assert torch.equal(outputs["surface_p"], double(None, X)) and outputs["volume_p"].shape == (0, 4)
    # What is given needs no call.
    calls: list[Any] = []
    empty = torch.empty(0, 4)
    assert stream(lambda cache, chunk: calls.append(chunk), None, X[:0], empty).outputs is empty
    assert stream(lambda cache, chunk: calls.append(chunk), None, X[:0], lambda values, rows: None).outputs is None
    assert not calls


def test_models_that_refuse_empty_branches() -> None:
    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"surface_p": chunk["surface"]}

    with pytest.warns(UserWarning, match=r"can't be called for the branches \['volume'\]"):
        assert set(stream(decode, None, {"surface": X, "volume": X[:0]}).outputs) == {"surface_p"}
    with pytest.raises(
        ValueError, match=r"can't be called for the branches \['volume'\], which have no rows \(KeyError"
    ):
        stream(decode, None, {"volume": X[:0]})


ROWS_FILE = """
    import os, sys, numpy as np, torch
    from anchor_attention.streaming import stream

    path, what = sys.argv[1:]
    x = np.lib.format.open_memmap(path + ".x", mode="w+", dtype=np.float32, shape=(4096, 3))
    y = np.lib.format.open_memmap(path + ".y", mode="w+", dtype=np.float32, shape=(4096, 3))
    if what == "torch":
        x, y = (torch.from_file(f"{path}.{name}", shared=True, size=12288).view(4096, 3) for name in "xy")
    chunks = 0

    def decode(cache, chunk):
        global chunks
        chunks += 1
        if chunks == 2:
            os.truncate(path + (".x" if what == "queries" else ".y"), 4096)
        return 2 * chunk

    try:
        stream(decode, None, x, y[:] if what == "view" else y, chunk_size=1024)
    except OSError as error:
        print(chunks, error)
"""


@pytest.mark.parametrize("what", ["queries", pytest.param("outputs", marks=pytest.mark.slow), "view", "torch"])
def test_a_mapped_file_that_is_cut_is_an_error_and_no_signal(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ROWS_FILE), str(tmp_path / "f"), what]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    name = r"queries['']" if what == "queries" else "outputs['']"
    assert f"2 [Errno 5] {name} maps " in run.stdout and "of a file that was truncated to 4096 bytes" in run.stdout


def test_a_mapped_output_that_outgrows_its_disk_is_refused_first(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    rows = free // 4 + (1 << 28)
    path = tmp_path / "y.dat"
    try:
        out = np.memmap(path, mode="w+", dtype=np.float32, shape=(rows, 1))
    except OSError:
        pytest.skip("no sparse file of that length")
    # A tensor of one row that stands for all: nothing of that size is made.
    queries = torch.zeros(1, 1).expand(rows, 1)
    try:
        with pytest.raises(
            OSError, match=r"outputs\[''\] maps \d+ bytes of a file, for the rest of which its disk has"
        ):
            stream(lambda cache, chunk: chunk, None, queries, out)
    finally:
        path.unlink()


def test_a_reserved_output_keeps_what_it_holds(tmp_path: Path) -> None:
    out = np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=(1 << 20, 4))
    assert (tmp_path / "y.npy").stat().st_blocks * 512 < out.nbytes / 2
    out[-1] = 5
    with pytest.raises(FloatingPointError):
        stream(
            lambda c, x: torch.full((1, x.shape[1], 4), torch.nan), None, np.zeros((1 << 20, 1)), out, raise_on_nan=True
        )
    assert (tmp_path / "y.npy").stat().st_blocks * 512 >= out.nbytes
    assert (out[-1] == 5).all() and (out[:-1] == 0).all()
    os.remove(tmp_path / "y.npy")
    with pytest.raises(OSError, match="maps a file that is gone"):
        stream(double, None, np.zeros((1 << 20, 3)), out)


def test_checkpoints_with_rows_that_can_not_be(tmp_path: Path) -> None:
    note = tmp_path / "note.json"
    for rows in ({"": 130}, {"": -5}, {"other": 10}, {"": 10, "other": 0}):
        note.write_text(json.dumps({"rows": rows, "totals": {"": 40}}))
        refused("rows are done", double, X, torch.empty(40, 4), checkpoint=note)
    for text in ("[]", "{}", "3", '{"rows": 3, "totals": null}', '{"rows": {"": "x"}, "totals": {"": 40}}'):
        note.write_text(text)
        refused("can't be read", double, X, torch.empty(40, 4), checkpoint=note)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    refused(r"device must be one of this machine, got 'cuda:1': torch finds no GPU", double, X, device="cuda:1")
