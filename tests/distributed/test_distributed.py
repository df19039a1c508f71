"""DDP and FSDP2 in two processes: gradients and steps are those of one process that sees all samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from anchor_attention import CrossAnchorAttention, SelfAnchorAttention
from tests.module_cases import DIM, make, specs, total, unit_freqs

RANKS = 2
# float32 gradients of order one: other orders of summation over the samples and inside the products.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

# Every process has a geometry of its own size.
SPECS = [
    specs(surface_anchors=8, surface_queries=15, volume_anchors=5, volume_queries=20),
    specs(surface_anchors=6, surface_queries=31, volume_anchors=9, volume_queries=2),
]


class TwoBlocks(nn.Module):
    """A residual network of two kinds of attention, as the models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make(kind, use_rope=True) for kind in (SelfAnchorAttention, CrossAnchorAttention)])

    def forward(self, x: torch.Tensor, rank: int, freqs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x, SPECS[rank], freqs, key_padding_mask=mask)
        return x


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    torch.manual_seed(100 + rank)
    n = total(SPECS[rank])
    return model(torch.randn(2, n, DIM), rank, unit_freqs(2, n), torch.rand(2, n) < 0.8).square().mean()


def model_of_seed() -> TwoBlocks:
    torch.manual_seed(0)
    return TwoBlocks()


def gradients_of_one_process() -> dict[str, torch.Tensor]:
    model = model_of_seed()
    (sum(loss_of(model, rank) for rank in range(RANKS)) / RANKS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def run_ddp(rank: int) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(model_of_seed())
    loss_of(model, rank).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def run_compiled_ddp(rank: int) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(model_of_seed())
    loss_of(torch.compile(model, backend="aot_eager"), rank).backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def shard(model: TwoBlocks, of_each_block: Callable[[nn.Module], list[nn.Module]]) -> TwoBlocks:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        for module in of_each_block(block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_gradients(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    loss_of(model, rank).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad.to_local().numel() < grad.numel() for grad in gradients.values())
    return {name: grad.full_tensor() for name, grad in gradients.items()}


def run_fsdp_of_blocks(rank: int) -> dict[str, torch.Tensor]:
    return sharded_gradients(shard(model_of_seed(), lambda block: [block]), rank)


def run_fsdp_of_every_layer(rank: int) -> dict[str, torch.Tensor]:
    """Also the projection whose weight the module would else cut: it must be gathered first."""
    return sharded_gradients(
        shard(model_of_seed(), lambda block: [block.mixed_attention.qkv, block.mixed_attention.proj, block]), rank
    )


def process(rank: int, folder: str, run: Callable[[int], dict[str, torch.Tensor]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        torch.save(run(rank), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("run", [run_ddp, run_compiled_ddp, run_fsdp_of_blocks, run_fsdp_of_every_layer])
def test_gradients_are_those_of_one_process(run: Callable[[int], dict[str, torch.Tensor]], tmp_path: Path) -> None:
    mp.spawn(process, args=(str(tmp_path), run), nprocs=RANKS)
    expected = gradients_of_one_process()
    for rank in range(RANKS):
        actual = torch.load(tmp_path / f"{rank}.pt")
        assert actual.keys() == expected.keys()
        for name, grad in actual.items():
            torch.testing.assert_close(grad, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
