"""Shared keys with the collectives of the CPU, and of GPUs: one process for each GPU, and one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from anchor_attention import JointAnchorAttention, KeyRangeTable, TokenSpec, anchor_attention
from anchor_attention.distributed import SequenceParallelAttention, ShardedTable, sharded_attention

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# The same kernels in float32 on other ranges of keys: other orders of summation, of results of order one.
TOLERANCE = 2e-5
N_KEYS, N_QUERIES, HEADS, WIDTH = 70, 90, 2, 64


def differentiated(call: Any, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)]


def function(mesh: Any, device: str, case: str) -> None:
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    q, k, v = (
        torch.randn(1, n, HEADS, WIDTH, generator=generator).to(device) for n in (N_QUERIES, N_KEYS, N_KEYS)
    )  # fmt: skip
    total = N_KEYS if case == "replicated" else N_KEYS * mesh.size()
    table = KeyRangeTable.from_ranges([[0, 50], [50, N_QUERIES]], [[3, total], [0, 31]])
    options: dict[str, Any] = {"replicated": True} if case == "replicated" else {"case": case}
    sharded = ShardedTable.agree(table, k, v, mesh, **options)
    found = differentiated(lambda q, k, v: sharded_attention(q, k, v, sharded), q, k, v)
    if mesh.size() == 1:
        expected = differentiated(lambda q, k, v: anchor_attention(q, k, v, table), q, k, v)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    again = differentiated(lambda q, k, v: sharded_attention(q, k, v, sharded), q, k, v)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def module(mesh: Any, device: str, case: str) -> None:
    """Every process has the same tokens: the more processes, the more often each anchor, which changes nothing."""
    torch.manual_seed(0)
    attention = JointAnchorAttention(dim=128, num_heads=2, branches=("surface", "volume")).to(device)
    specs = [TokenSpec("surface_anchors", 30), TokenSpec("volume_anchors", 41), TokenSpec("volume_queries", 77)]
    x = torch.randn(1, 148, 128).to(device)
    expected = attention(x, specs)
    parallelize_module(attention, mesh, SequenceParallelAttention(case=case))
    torch.testing.assert_close(attention(x, specs), expected, rtol=0, atol=TOLERANCE)


def process(rank: int, world: int, device: str, folder: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        BACKENDS[device], init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )  # fmt: skip
    try:
        mesh = init_device_mesh(device, (world,))
        for case in ("replicated", "gathered", "ring"):
            function(mesh, device, case)
        for case in ("gathered", "ring"):
            module(mesh, device, case)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("device", list(BACKENDS))
def test_shared_keys_on_a_backend(device: str, which: str, tmp_path: Path) -> None:
    n_devices = torch.cuda.device_count() if device == "cuda" else 2
    if n_devices == 0:
        pytest.skip("needs a GPU")
    if which == "all" and n_devices == 1:
        pytest.skip("needs several GPUs")
    world = 1 if which == "one" else n_devices
    mp.spawn(process, args=(world, device, str(tmp_path)), nprocs=world)
