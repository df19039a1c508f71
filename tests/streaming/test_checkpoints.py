"""A checkpoint is followed by the run that it belongs to, and by no other; kills leave nothing half done."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anchor_attention.streaming import Cache, Checkpoint, stream
from anchor_attention.streaming.fingerprints import fingerprint, weights_fingerprint

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


class Interrupted(Exception):
    pass


def double(cache: Any, chunk: Tensor) -> Tensor:
    return torch.cat((2 * chunk, chunk[..., :1]), dim=-1)


def interrupt(note: Path, out: Any, decode: Any = double, cache: Any = None, queries: Any = X, after: int = 2) -> None:
    """Runs a stream of chunks of 10 that ends behind some of them."""
    chunks = 0

    def ending(tree: Any, chunk: Any) -> Any:
        nonlocal chunks
        chunks += 1
        if chunks > after:
            raise Interrupted
        return decode(tree, chunk)

    with pytest.raises(Interrupted):
        stream(
            ending, cache, queries, out, checkpoint=note, **({} if hasattr(queries, "__next__") else {"chunk_size": 10})
        )
    assert note.exists()


def refused(message: str, note: Path, out: Any, decode: Any = double, cache: Any = None, queries: Any = X) -> None:
    """Checks that the checkpoint is refused, before anything is decoded, and left as it is."""
    before = note.read_bytes()

    def untouched(tree: Any, chunk: Any) -> Any:
        raise AssertionError("decoded")

    untouched.__wrapped__ = decode  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        stream(untouched, cache, queries, out, checkpoint=note)
    assert note.read_bytes() == before


def test_other_queries_of_equal_length_are_refused(tmp_path: Path) -> None:
    note, out = tmp_path / "note.json", torch.empty(40, 4)
    interrupt(note, out)
    other = X.clone()
    other[19, 2] += 1e-6
    refused("belongs to a run with other queries: continue with what that run had, or delete", note, out, queries=other)
    refused("with other queries", note, out, queries=X.double())
    refused("with other queries", note, out, queries=torch.cat((X, X), dim=1))
    # What is not yet decoded may change: it is decoded as it is now, whatever the size of the chunks.
    later = X.clone()
    later[20:] += 1
    assert stream(double, None, later.numpy(), out, checkpoint=note, chunk_size=7).points == 20
    assert torch.equal(out, double(None, later)) and not note.exists()


def test_another_cache_is_refused(tmp_path: Path) -> None:
    note, out = tmp_path / "note.json", torch.empty(40, 4)
    tree = {"layers": [{"a": {"k": torch.randn(1, 2, 3, 4), "v": torch.randn(1, 2, 3, 4)}}], "angle": 1.5}
    interrupt(note, out, cache=Cache(tree))
    other = copy.deepcopy(tree)
    other["layers"][0]["a"]["v"][0, 1, 2, 3] += 1e-6
    refused("belongs to a run with other contents of the cache", note, out, cache=other)
    refused("other contents of the cache", note, out, cache={**tree, "angle": 1.25})
    refused("other contents of the cache", note, out, cache=Cache(tree).to(dtype=torch.float64))
    Cache(tree).save(tmp_path / "cache.pt")
    stream(double, Cache.load(tmp_path / "cache.pt"), X, out, checkpoint=note)
    assert torch.equal(out, double(None, X))


def test_outputs_that_are_not_what_was_written_are_refused(tmp_path: Path) -> None:
    note = tmp_path / "note.json"

    def recreated() -> Any:
        return np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=(40, 4))

    interrupt(note, recreated())
    refused("belongs to a run with other rows in outputs than it wrote", note, recreated())
    note.unlink()
    out = recreated()
    interrupt(note, out)
    out[3, 1] += 1
    refused("other rows in outputs than it wrote", note, out)
    out[3, 1] -= 1
    out[:20] = double(None, X[:20]).numpy()
    refused("other rows in outputs", note, np.zeros((40, 4)))
    refused("outputs must hold an array for ''", note, {"p": np.zeros((40, 4))})
    # The rows behind are nobody's yet.
    out[25] = 7
    stream(double, None, X, np.load(tmp_path / "y.npy", mmap_mode="r+"), checkpoint=note)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), double(None, X).numpy())


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, chunk: Tensor) -> Tensor:
        out: Tensor = self.layer(chunk)
        return out

    def decode(self, cache: Any, chunk: Tensor) -> Tensor:
        return self(chunk)


GLOBAL = Decoder()


def decode_of_global(cache: Any, chunk: Tensor) -> Tensor:
    return torch.cat([GLOBAL(part) for part in (chunk,)])


def decode_with(model: nn.Module, cache: Any, chunk: Tensor) -> Any:
    return model(chunk)


class Wrapper:
    def __init__(self, model: nn.Module) -> None:
        self.models = {"decoder": [model]}

    def __call__(self, cache: Any, chunk: Tensor) -> Any:
        return self.models["decoder"][0](chunk)


def ways_to_reach(model: Decoder) -> list[Any]:
    def through(cache: Any, chunk: Tensor) -> Any:
        return model(chunk)

    def helper(chunk: Tensor) -> Any:
        return through(None, chunk)

    return [
        model.decode,
        through,
        lambda cache, chunk: helper(chunk),
        functools.partial(decode_with, model),
        torch.no_grad()(through),
        Wrapper(model),
        Wrapper(model).__call__,
        *([decode_of_global] if model is GLOBAL else []),
    ]


def test_other_weights_of_what_decode_reaches_are_refused(tmp_path: Path) -> None:
    note, out = tmp_path / "note.json", torch.empty(40, 4)
    for decode in ways_to_reach(GLOBAL):
        note.unlink(missing_ok=True)
        interrupt(note, out, decode=functools.partial(_call, decode))
        with torch.no_grad():
            GLOBAL.layer.bias[0] += 1
        refused("belongs to a run with other weights", note, out, decode=functools.partial(_call, decode))
        with torch.no_grad():
            GLOBAL.layer.bias[0] -= 1
    assert weights_fingerprint(double) == weights_fingerprint(lambda: None) != weights_fingerprint(GLOBAL)


def _call(decode: Any, cache: Any, chunk: Tensor) -> Any:
    return decode(cache, chunk)


def test_fingerprints_tell_what_differs() -> None:
    class Holder:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.me = tensor, self

    values: list[Any] = [
        None, 0, False, 0.0, "0", b"0", [], (), {}, [None], {"a": 1}, {"b": 1}, {"a": {"b": 1}}, [1, 2], [2, 1],
        torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).double(), torch.zeros(8).half(), torch.ones(4),
        torch.ones(2, dtype=torch.complex64).conj(), torch.full((2,), 1j).conj(), np.zeros(4), np.zeros(4, dtype="f4"),
        Holder(torch.zeros(4)), Holder(torch.ones(4)), torch.ones(3).to_sparse(), torch.empty(2, device="meta"),
    ]  # fmt: skip
    prints = [fingerprint(value) for value in values]
    assert len(set(prints)) == len(prints)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(torch.arange(6.0).view(2, 3).t()) == fingerprint(torch.arange(6.0).view(2, 3).t().contiguous())


def test_a_checkpoint_with_a_changed_or_missing_byte_is_refused(tmp_path: Path) -> None:
    note, out = tmp_path / "note.json", torch.empty(40, 4)
    interrupt(note, out)
    content = note.read_bytes()
    assert Checkpoint(note).read({"": 40}) == {"": 20}
    for i in range(len(content)):
        flipped = content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]
        others = (content[:i], content[:i] + content[i + 1 :], content[:i] + b" " + content[i:])
        for data in (flipped, *(others if i % 7 == 0 else ())):
            note.write_bytes(data)
            with pytest.raises(ValueError, match="checkpoint"):
                Checkpoint(note).read({"": 40})
    note.write_bytes(content)
    assert stream(double, None, X, out, checkpoint=note).points == 20
    # A partial file that a kill has left is of no account.
    note.with_name("note.json.partial").write_text("half a no")
    interrupt(note, out)
    assert json.loads(note.read_text())["rows"] == {"": 20}


@pytest.mark.parametrize("batch", [None, 2])
def test_a_run_of_branches_goes_on_whatever_the_chunks(batch: int | None, tmp_path: Path) -> None:
    note = tmp_path / "note.json"
    shape = () if batch is None else (batch,)
    queries = {"a": torch.randn(*shape, 33, 3), "b": torch.randn(*shape, 12, 3)}
    outputs = {f"{name}_p": torch.empty(*shape, x.shape[-2], 4) for name, x in queries.items()}

    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name}_p": double(cache, value) for name, value in chunk.items()}

    interrupt(note, outputs, decode=decode, queries=queries)
    swapped = {"a": queries["a"], "b": queries["b"] + 1}
    refused("other queries", note, outputs, decode=decode, queries=swapped)
    assert stream(decode, None, queries, outputs, checkpoint=note, chunk_size={"a": 4, "b": 9}).points == 13
    for name, x in queries.items():
        assert torch.equal(outputs[f"{name}_p"], double(None, x))


def test_an_iterator_is_read_again_and_must_be_the_same(tmp_path: Path) -> None:
    note, out = tmp_path / "note.json", torch.empty(40, 4)
    interrupt(note, out, queries=iter(X.split(10)))
    refused("other queries", note, out, queries=iter((X + 1).split(10)))
    assert stream(double, None, iter(X.split(10)), out, checkpoint=note).points == 20
    assert torch.equal(out, double(None, X))


# One run: a geometry on disk, outputs on disk, as docs/streaming.md has it.
RUN = """
    import sys, time
    import numpy as np, torch
    from anchor_attention import JointAnchorAttention, TokenSpec
    from anchor_attention.streaming import Cache, stream

    folder, pause = sys.argv[1], float(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    attention = JointAnchorAttention(dim=32, num_heads=2, branches=("a", "b"), init_weights="torch").eval()
    cache = Cache.load(folder + "/cache.pt")

    def decode(tree, chunk):
        time.sleep(pause)
        specs = [TokenSpec("a_anchors", None), TokenSpec("b_anchors", None), TokenSpec("a_queries", chunk.shape[1])]
        return attention(chunk, specs, kv_cache=tree)

    x = np.load(folder + "/x.npy", mmap_mode="r")
    y = np.load(folder + "/y.npy", mmap_mode="r+")
    print("begun", flush=True)
    report = stream(decode, cache, x, y, chunk_size=50, checkpoint=folder + "/note.json")
    print(report.points)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_kills_in_a_row_end_bit_identical(kills: int, tmp_path: Path) -> None:
    from anchor_attention import JointAnchorAttention, TokenSpec

    torch.manual_seed(0)
    attention = JointAnchorAttention(dim=32, num_heads=2, branches=("a", "b"), init_weights="torch").eval()
    with torch.no_grad():
        anchors = [TokenSpec("a_anchors", 20), TokenSpec("b_anchors", 30)]
        _, tree = attention(torch.randn(1, 50, 32), anchors, return_kv_cache=True)
    Cache(tree).save(tmp_path / "cache.pt")
    n = 400 * kills
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32))
    script, note = tmp_path / "run.py", tmp_path / "note.json"
    script.write_text(textwrap.dedent(RUN))

    def run(pause: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(pause)], stdout=subprocess.PIPE, text=True
        )

    np.save(tmp_path / "y.npy", np.full((n, 32), np.nan, dtype=np.float32))
    whole = run(0)
    assert whole.communicate(timeout=600)[0].split() == ["begun", str(n)]
    expected = (tmp_path / "y.npy").read_bytes()
    np.save(tmp_path / "y.npy", np.full((n, 32), np.nan, dtype=np.float32))

    moments, done = random.Random(0), 0
    for _ in range(kills):
        process = run(0.02)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        # Anywhere: before the first chunk, between data and note, in the middle of either.
        time.sleep(moments.uniform(0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = Checkpoint(note).read({"": n}).get("", 0) if note.exists() else 0
        assert done <= now <= n
        done = now
    last = run(0)
    assert last.communicate(timeout=600)[0].split() == ["begun", str(n - done)]
    assert (tmp_path / "y.npy").read_bytes() == expected and not note.exists()


def test_a_forked_process_streams_as_its_parent(tmp_path: Path) -> None:
    code = """
        import os, sys, torch
        from anchor_attention import JointAnchorAttention, TokenSpec
        from anchor_attention.streaming import record, replay, stream

        torch.manual_seed(0)
        torch.set_num_threads(1)
        attention = JointAnchorAttention(dim=32, num_heads=2, branches=("a", "b"))
        model = torch.nn.ModuleDict({"attention": attention})
        with torch.no_grad(), record(model) as caches:
            attention(torch.randn(1, 50, 32), [TokenSpec("a_anchors", 20), TokenSpec("b_anchors", 30)])

        def decode(cache, chunk):
            with replay(model, cache):
                return attention(chunk, [TokenSpec("a_queries", chunk.shape[1])])

        x = torch.randn(100, 32)
        expected = stream(decode, caches, x, chunk_size=30).outputs
        with replay(model, caches):
            child = os.fork()
            same = torch.equal(stream(decode, caches, x, chunk_size=30).outputs, expected)
        if child == 0:
            os._exit(0 if same else 1)
        print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["True", "0"], run.stderr
