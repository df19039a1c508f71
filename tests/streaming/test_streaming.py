"""Streaming: the result does not depend on chunks, interruptions or where things are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anchor_attention import AttentionPattern, TokenSpec
from anchor_attention.modules import CrossAnchorAttention, JointAnchorAttention, MixedAttention, SelfAnchorAttention
from anchor_attention.streaming import Cache, Checkpoint, Progress, chunk_size_for_budget, record, replay, stream
from anchor_attention.streaming.memory import peak_of
from anchor_attention.streaming.progress import ProgressBar
from tests.module_cases import DIM, make, specs, unit_freqs

# Float64 results of order one that went through three layers of some hundred terms.
TOLERANCE = 1e-11


class Layers(nn.Module):
    """Three layers of anchor attention; queries come with their rotary angles in the last features."""

    def __init__(self) -> None:
        super().__init__()
        classes = (SelfAnchorAttention, CrossAnchorAttention, JointAnchorAttention)
        self.layers = nn.ModuleList(make(module_class, use_rope=True) for module_class in classes)

    def forward(self, groups: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([points[..., :DIM] for points in groups.values()], dim=1)
        angles = torch.cat([points[..., DIM:] for points in groups.values()], dim=1)
        freqs = torch.polar(torch.ones_like(angles), angles)
        token_specs = [TokenSpec(name, points.shape[1]) for name, points in groups.items()]
        for layer in self.layers:
            x = x + layer(x, token_specs, freqs)
        return dict(zip(groups, x.split([points.shape[1] for points in groups.values()], dim=1), strict=True))


FEATURES = DIM + 8
CHUNK_SIZES = st.integers(1, 50)
ANCHORS = {"surface_anchors": 6, "volume_anchors": 5}


def points(batch: int, n: int) -> Tensor:
    return torch.randn(batch, n, FEATURES, dtype=torch.float64)


def decode_with(model: nn.Module) -> Any:
    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        with replay(model, cache):
            outputs = model({f"{branch}_queries": queries for branch, queries in chunk.items()})
        return {name.removesuffix("_queries"): value for name, value in outputs.items()}

    return decode


def setup(batch: int, sizes: dict[str, int]) -> tuple[Layers, Cache, dict[str, Tensor], dict[str, Tensor]]:
    """A model, its cache, queries, and what one pass gives for them."""
    torch.manual_seed(0)
    model = Layers().double().eval()
    anchors = {name: points(batch, n) for name, n in ANCHORS.items()}
    queries = {branch: points(batch, n) for branch, n in sizes.items()}
    groups: dict[str, Tensor] = {}
    for branch, tokens in queries.items():
        groups |= {f"{branch}_anchors": anchors[f"{branch}_anchors"], f"{branch}_queries": tokens}
    with torch.no_grad():
        outputs = model(groups)
        with record(model) as caches:
            model(anchors)
    return model, Cache(caches), queries, {branch: outputs[f"{branch}_queries"] for branch in sizes}


def chunks_of(queries: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    """Cuts both branches at the same random places."""
    chunks, begin = [], 0
    longest = max(tokens.shape[1] for tokens in queries.values())
    for size in [*sizes, longest]:
        chunks.append({name: tokens[:, begin : begin + size] for name, tokens in queries.items()})
        begin += size
    return chunks


@given(
    surface=st.integers(0, 40),
    volume=st.integers(1, 40),
    size=st.one_of(
        st.integers(1, 50), st.fixed_dictionaries({"surface": st.integers(1, 50), "volume": st.integers(1, 50)})
    ),
    pad_last=st.booleans(),
    batch=st.sampled_from([1, 2]),
)
@settings(max_examples=40)
def test_any_chunking_equals_one_pass(surface: int, volume: int, size: Any, pad_last: bool, batch: int) -> None:
    model, cache, queries, expected = setup(batch, {"surface": surface, "volume": volume})
    report = stream(decode_with(model), cache, queries, chunk_size=size, pad_last=pad_last)
    assert report.points == surface + volume
    for name, tokens in expected.items():
        if tokens.shape[1]:
            torch.testing.assert_close(report.outputs[name], tokens, rtol=0, atol=TOLERANCE)


@given(sizes=st.lists(st.integers(0, 20), max_size=6))
@settings(max_examples=20)
def test_an_iterator_of_any_chunks_equals_one_pass(sizes: list[int]) -> None:
    model, cache, queries, expected = setup(2, {"surface": 13, "volume": 31})
    report = stream(decode_with(model), cache, (chunk for chunk in chunks_of(queries, sizes)))
    for name, tokens in expected.items():
        torch.testing.assert_close(report.outputs[name], tokens, rtol=0, atol=TOLERANCE)


def double(cache: Any, chunk: Tensor) -> Tensor:
    """Another model, without any attention: rows are independent of each other."""
    return torch.cat((2 * chunk, chunk[..., :1] ** 2), dim=-1)


def doubled(x: Any) -> Any:
    return np.concatenate((2 * np.asarray(x), np.asarray(x)[..., :1] ** 2), axis=-1)


def test_memory_maps_in_and_out(tmp_path: Path) -> None:
    queries = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(1003, 3))
    queries[:] = np.random.default_rng(0).normal(size=queries.shape)
    queries.flush()
    read_only = np.load(tmp_path / "x.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "y.npy", mode="w+", dtype=np.float32, shape=(1003, 4))
    report = stream(double, None, read_only, out, chunk_size=100)
    assert report.outputs is out and report.chunks == 11
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), doubled(queries))
    half = np.zeros((1003, 4), dtype=np.float16)
    stream(lambda cache, x: double(cache, x).bfloat16(), None, read_only, half, chunk_size=64)
    np.testing.assert_array_equal(half, torch.from_numpy(doubled(queries)).bfloat16().half().numpy())


def test_a_function_gets_every_row_once_and_in_order() -> None:
    queries = {"a": torch.randn(2, 25, 3), "b": torch.randn(2, 10, 3)}
    seen: list[dict[str, tuple[int, int]]] = []
    parts: dict[str, list[Tensor]] = {"a": [], "b": []}

    def keep(outputs: dict[str, Tensor], rows: dict[str, tuple[int, int]]) -> None:
        seen.append(rows)
        for name, value in outputs.items():
            parts[name].append(value)

    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: double(cache, value) for name, value in chunk.items()}

    assert stream(decode, None, queries, keep, chunk_size=10).outputs is None
    assert seen == [{"a": (0, 10), "b": (0, 10)}, {"a": (10, 20)}, {"a": (20, 25)}]
    for name, values in parts.items():
        assert torch.equal(torch.cat(values, dim=1), double(None, queries[name]))


def test_outputs_find_their_branch() -> None:
    queries = {"wind": torch.randn(7, 3), "window": torch.randn(4, 3)}

    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = {f"query_{name}_pressure": value for name, value in chunk.items()}
        return outputs | ({"total": 3 * chunk["wind"]} if "wind" in chunk else {})

    outputs = stream(decode, None, queries, chunk_size=3, branch_of={"total": "wind"}).outputs
    assert torch.equal(outputs["query_wind_pressure"], queries["wind"])
    assert torch.equal(outputs["query_window_pressure"], queries["window"])
    assert torch.equal(outputs["total"], 3 * queries["wind"])
    with pytest.raises(ValueError, match=r"output 'total' belongs to none of the branches \['wind', 'window'\]"):
        stream(decode, None, queries, chunk_size=3)


def test_padded_chunks_have_one_shape() -> None:
    shapes = set()

    def decode(cache: Any, chunk: Tensor) -> Tensor:
        shapes.add(tuple(chunk.shape))
        return double(cache, chunk)

    queries = torch.randn(2, 47, 3)
    out = stream(decode, None, queries, chunk_size=10, pad_last=True).outputs
    assert shapes == {(2, 10, 3)} and torch.equal(out, double(None, queries))


def test_nan_ends_the_run_before_its_chunk_is_written(tmp_path: Path) -> None:
    queries = torch.randn(40, 3)
    queries[33, 1] = torch.nan
    out = torch.full((40, 4), -1.0)
    note = tmp_path / "note.json"
    with pytest.raises(FloatingPointError, match="NaN in 1 rows, first in row 33"):
        stream(double, None, queries, out, chunk_size=10, raise_on_nan=True, checkpoint=note)
    assert torch.equal(out[:30], double(None, queries[:30])) and (out[30:] == -1).all()

    queries[33, 1] = 5.0
    report = stream(double, None, queries, out, chunk_size=7, raise_on_nan=True, checkpoint=note)
    assert report.points == 10 and not note.exists()
    assert torch.equal(out, double(None, queries))

    queries[0, 0] = torch.nan
    assert stream(double, None, queries, chunk_size=10).outputs.isnan().any()


@given(stop=st.integers(0, 5), first=st.integers(1, 12), second=st.integers(1, 12))
@settings(max_examples=20)
def test_an_interrupted_run_goes_on_behind_the_last_whole_chunk(stop: int, first: int, second: int) -> None:
    queries = {"a": torch.randn(30, 3), "b": torch.randn(11, 3)}
    outputs = {name: torch.full((len(x), 4), -1.0) for name, x in queries.items()}
    calls = 0

    def decode(cache: Any, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise KeyboardInterrupt
        return {name: double(cache, value) for name, value in chunk.items()}

    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note.json"
        points = 0
        try:
            points += stream(decode, None, queries, outputs, chunk_size=first, checkpoint=note).points
        except KeyboardInterrupt:
            done = {name: min(stop * first, len(x)) for name, x in queries.items()}
            for name, x in queries.items():
                assert torch.equal(outputs[name][: done[name]], double(None, x[: done[name]]))
                assert (outputs[name][done[name] :] == -1).all()
            calls = 100
            report = stream(decode, None, queries, outputs, chunk_size=second, checkpoint=note)
            assert report.points == 41 - sum(done.values())
        for name, x in queries.items():
            assert torch.equal(outputs[name], double(None, x))
        assert not note.exists()


def test_an_iterator_is_resumed_at_its_own_chunks(tmp_path: Path) -> None:
    queries = torch.randn(40, 3)
    out, note = torch.empty(40, 4), tmp_path / "note.json"

    def failing(cache: Any, chunk: Tensor) -> Tensor:
        if torch.equal(chunk[0], queries[20:30]):
            raise KeyboardInterrupt
        return double(cache, chunk)

    with pytest.raises(KeyboardInterrupt):
        stream(failing, None, iter(queries.split(10)), out, checkpoint=note)
    with pytest.raises(ValueError, match="no chunk of the iterator ends where the earlier run stopped"):
        stream(double, None, iter(queries.split(7)), out, checkpoint=note)
    with pytest.raises(ValueError, match="before the rows"):
        stream(double, None, iter(queries[:10].split(10)), out, checkpoint=note)
    assert stream(double, None, iter(queries.split(10)), out, checkpoint=note).points == 20
    assert torch.equal(out, double(None, queries))


SLOW_RUN = """
    import sys, time
    import numpy as np, torch
    from anchor_attention.streaming import stream

    folder, delay = sys.argv[1], float(sys.argv[2])

    def decode(cache, chunk):
        time.sleep(delay)
        return torch.cat((2 * chunk, chunk[..., :1] ** 2), dim=-1)

    queries = np.load(folder + "/x.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(folder + "/y.npy", mode="r+")
    print(stream(decode, None, queries, out, chunk_size=100, checkpoint=folder + "/note.json").points)
"""


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.full((2000, 4), np.nan, dtype=np.float32))
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SLOW_RUN))
    note = tmp_path / "note.json"
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), "0.05"])
    deadline = time.monotonic() + 300
    while not note.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.12)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    done = Checkpoint(note).read({"": 2000})[""]
    assert 0 < done < 2000 and done % 100 == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy")[:done], doubled(x[:done]))
    assert np.isnan(np.load(tmp_path / "y.npy")[done + 100 :]).all()

    again = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"], capture_output=True, text=True, check=True
    )
    assert int(again.stdout) == 2000 - done
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), doubled(x))
    assert not note.exists()


def test_a_checkpoint_of_another_stream_is_refused(tmp_path: Path) -> None:
    note = tmp_path / "note.json"
    note.write_text('{"rows": {"": 10}, "totals": {"": 30}}')
    with pytest.raises(ValueError, match=r"to a stream of \{'': 30\} rows, not of \{'': 40\}"):
        stream(double, None, torch.randn(40, 3), torch.empty(40, 4), checkpoint=note)
    note.write_text("half a no")
    with pytest.raises(ValueError, match="can't be read"):
        stream(double, None, torch.randn(40, 3), torch.empty(40, 4), checkpoint=note)
    with pytest.raises(ValueError, match="outputs that outlive an interruption"):
        stream(double, None, torch.randn(40, 3), checkpoint=note)


def test_errors_name_the_argument() -> None:
    x = torch.randn(40, 3)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (r"queries must all be \(N, F\) or all \(B, N, F\)", (x[0],), {}),
        ("queries must be an array", (7,), {}),
        ("chunk_size must be positive", (x,), {"chunk_size": 0}),
        (r"chunk_size must be positive for each of \['a'\]", ({"a": x},), {"chunk_size": {"b": 1}}),
        ("give chunk_size or memory_budget", (x,), {"chunk_size": 1, "memory_budget": 1}),
        ("an iterable decides on the chunks", (iter([x]),), {"chunk_size": 1}),
        (r"outputs\[''\] of shape \(35, 4\) must have 40 rows", (x, torch.empty(35, 4)), {"chunk_size": 10}),
        (r"must hold an array for ''", (x, {"y": torch.empty(40, 4)}), {}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ValueError, match=message):
            stream(double, None, *arguments, **options)
    with pytest.raises(ValueError, match=r"decode must return \(1, 40, C\) for 'its output', got \(1, 1, 3\)"):
        stream(lambda cache, chunk: chunk[:, :1], None, x)


@pytest.mark.parametrize("budget", [2**20, 2**22, 2**24])
def test_the_chunk_size_keeps_the_budget(budget: int) -> None:
    layer = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 4))
    queries = torch.randn(100_000, 16)

    def decode(cache: Any, chunk: Tensor) -> Tensor:
        return layer(chunk)

    size = chunk_size_for_budget(decode, None, queries, budget)
    with torch.no_grad():
        peak = peak_of(lambda: decode(None, queries[None, :size]), torch.device("cpu"))
    assert peak <= budget
    # Two hidden layers of 256 floats and the output are alive at once, so the budget is used and not wasted.
    assert size == 100_000 or peak > 0.7 * budget
    report = stream(decode, None, queries, memory_budget=budget)
    assert report.chunk_size == size
    with torch.no_grad():
        torch.testing.assert_close(report.outputs, layer(queries), rtol=1e-5, atol=1e-6)


def test_a_budget_for_less_than_a_query_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_budget must hold at least one query"):
        chunk_size_for_budget(double, None, torch.randn(4000, 16), 10)


def test_progress_says_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    states: list[Progress] = []
    stream(double, None, torch.randn(40, 3), chunk_size=15, progress=states.append)
    assert [(state.points, state.total, state.new_points) for state in states] == [
        (15, 40, 15),
        (30, 40, 30),
        (40, 40, 40),
    ]
    state = Progress(points=250, total=1000, new_points=50, seconds=2.0)
    assert state.points_per_second == 25 and state.seconds_left == 30
    assert "25%" in str(state) and "25 points/s" in str(state) and "0:30 left" in str(state)
    assert Progress(points=5, total=None, new_points=5, seconds=1.0).seconds_left is None
    bar = ProgressBar()
    bar(state)
    bar(Progress(points=1000, total=1000, new_points=800, seconds=4.0))
    bar.close()
    shown = capsys.readouterr().err
    assert shown.count("\r") == 2 and shown.endswith("\n") and "100%" in shown
    stream(double, None, iter(torch.randn(40, 3).split(15)), progress=True)
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3 and shown.endswith("\n") and "40 points" in shown


def test_replay_needs_a_recording() -> None:
    model, cache, queries, _ = setup(1, {"surface": 3, "volume": 2})
    with replay(model, {name: calls for name, calls in cache.tree.items() if name != "layers.1"}):
        with pytest.raises(ValueError, match=r"module 'layers.1' was not recorded"):
            model({f"{name}_queries": tokens for name, tokens in queries.items()})
    # Both leave the model as it was.
    with pytest.raises(ValueError):
        model({f"{name}_queries": tokens for name, tokens in queries.items()})


def test_a_module_that_is_called_twice_replays_both_calls_again_and_again() -> None:
    torch.manual_seed(0)
    module = MixedAttention(dim=DIM, num_heads=2, use_rope=True, init_weights="torch").double()
    patterns = [AttentionPattern(["anchors", "queries"], ["anchors"])]
    x, freqs = torch.randn(2, 9, DIM, dtype=torch.float64), unit_freqs(2, 9, torch.float64)
    mask = torch.rand(2, 9) < 0.7

    def twice(tokens: Tensor, token_specs: list[TokenSpec], rows: slice) -> Tensor:
        # Positional arguments, as a caller may give them.
        tokens = tokens + module(tokens, token_specs, patterns, mask[:, rows], freqs[:, rows])
        return module(tokens, token_specs, patterns, mask[:, rows], freqs[:, rows])

    expected = twice(x, specs(anchors=4, queries=5), slice(None))
    with record(module) as caches:
        recorded = twice(x, specs(anchors=4, queries=5), slice(None))
    assert torch.equal(recorded, expected)
    with replay(module, caches):
        for begin, end in ((4, 6), (6, 7), (7, 9)):
            out = twice(x[:, begin:end], specs(queries=end - begin), slice(begin, end))
            torch.testing.assert_close(out, expected[:, begin:end], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_normalised_queries_and_keys_are_cached_normalised(qk_norm: bool) -> None:
    torch.manual_seed(0)
    module = make(JointAnchorAttention, use_rope=True, qk_norm=qk_norm).double()
    token_specs = specs(surface_anchors=3, volume_anchors=4, volume_queries=5)
    x, freqs = torch.randn(2, 12, DIM, dtype=torch.float64), unit_freqs(2, 12, torch.float64)
    y, cache = module(x, token_specs, freqs, return_kv_cache=True)
    alone = specs(surface_anchors=None, volume_anchors=None, volume_queries=5)
    out = module(x[:, 7:], alone, freqs[:, 7:], kv_cache=cache)
    torch.testing.assert_close(out, y[:, 7:], rtol=0, atol=TOLERANCE)
    norms = torch.cat([entry["k"] for entry in cache.values()], dim=2).square().mean(-1)
    assert torch.allclose(norms, torch.ones_like(norms), rtol=1e-9) == qk_norm
    # Only a normalised module does not see the length of its queries' projections.
    with torch.no_grad():
        module.mixed_attention.qkv.weight[:DIM] *= 3
        module.mixed_attention.qkv.bias[:DIM] *= 3
    assert torch.allclose(module(x, token_specs, freqs), y, rtol=0, atol=1e-9) == qk_norm
