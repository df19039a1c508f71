"""Each process decodes its share: into one file or a shard each, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor.parallel import parallelize_module

from anchor_attention import JointAnchorAttention, TokenSpec
from anchor_attention.distributed import SequenceParallelAttention, stream_sharded
from tests.distributed.processes import Processes, processes
from tests.module_cases import DIM, make

N_ANCHORS, N_QUERIES = [5, 0, 8], [23, 9, 0]


def attention() -> JointAnchorAttention:
    torch.manual_seed(0)
    return make(JointAnchorAttention).eval()


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, DIM, generator=generator) for n in (sum(N_ANCHORS), sum(N_QUERIES)))


def own(values: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    begin = sum(counts[:rank])
    return values[begin : begin + counts[rank]]


def streamed(mesh: Any, path: str, shards: bool, fault: str, dtype: torch.dtype) -> Any:
    rank, model = mesh.get_local_rank(), attention()
    parallelize_module(model, mesh, SequenceParallelAttention())
    anchors, queries = tokens()
    mine = own(anchors, N_ANCHORS, rank)[None]
    with torch.no_grad():
        _, cache = model(mine, [TokenSpec("surface_anchors", mine.shape[1])], return_kv_cache=True)
    calls = 0

    def decode(tree: Any, chunk: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            if fault == "raises":
                raise KeyError("what only this process knows of")
            if fault == "ends":
                os._exit(1)
        specs = [TokenSpec("surface_anchors", None), TokenSpec("volume_queries", chunk.shape[1])]
        out = model(chunk, specs, kv_cache=tree).to(dtype)
        return out[..., :3] if fault == "narrow" and rank == 1 else out

    if fault == "path" and rank == 1:
        path += "x"
    report = stream_sharded(decode, cache, own(queries, N_QUERIES, rank), path, mesh, shards=shards, chunk_size=4)
    return report.outputs, report.points


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True])
def test_files_hold_every_row(four: Processes, tmp_path: Path, shards: bool, dtype: torch.dtype) -> None:
    found = four.run(streamed, 3, str(tmp_path / "fields.npy"), shards, "", dtype)
    anchors, queries = tokens()
    model = attention()
    x = torch.cat((anchors, queries))[None]
    with torch.no_grad():
        whole = model(x, [TokenSpec("surface_anchors", len(anchors)), TokenSpec("volume_queries", len(queries))])
    expected = whole[0, len(anchors) :].to(dtype).float()
    names = [f"fields.{rank}-of-3.npy" for rank in (1, 2, 3)] if shards else ["fields.npy"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [points for _, points in found] == N_QUERIES
    assert [Path(path).name for path, _ in found] == (names if shards else names * 3)
    rows = np.concatenate([np.load(tmp_path / name) for name in names])
    # bfloat16 is written as float32: the nearest two numbers are 2^-8 apart, relatively.
    tolerance = 2e-5 if dtype == torch.float32 else 2**-8 * expected.abs().max().item()
    torch.testing.assert_close(torch.from_numpy(rows), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("fault", "own_error", "others"),
    [
        ("raises", "KeyError: 'what only", "ProcessError: process 1 of the group failed: KeyError: 'what only"),
        ("narrow", "ValueError: decode must return rows of one width and type on every process, got [(3, ", None),
        ("path", "ValueError: processes must make the same call", None),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_nothing_is_half_written(
    four: Processes, tmp_path: Path, shards: bool, fault: str, own_error: str, others: str | None
) -> None:
    outcomes = four.outcomes(streamed, 3, str(tmp_path / "fields.npy"), shards, fault, torch.float32)
    for rank, outcome in enumerate(outcomes):
        assert str(outcome).startswith(own_error if rank == 1 or others is None else others), outcome
    assert not os.listdir(tmp_path)


def test_nothing_is_half_written_where_a_process_ends(tmp_path: Path) -> None:
    with processes(3, timeout=4.0) as pool:
        outcomes = pool.outcomes(streamed, 3, str(tmp_path / "fields.npy"), False, "ends", torch.float32)
    assert str(outcomes[1]) == "is gone"
    for outcome in (outcomes[0], outcomes[2]):
        assert str(outcome).startswith("ProcessError: "), outcome
    assert not os.listdir(tmp_path)
