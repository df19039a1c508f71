"""Shared keys together with what models are trained with: results are those of one process, or one sentence says no."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from anchor_attention.distributed import SequenceParallelAttention
from tests.distributed.processes import Processes
from tests.distributed.test_sequence_parallel import TOLERANCE, Batch, Blocks, network, rows_of_processes, specs_of

KINDS = ["self", "cross", "joint"]
SIZES = [[5, 9, 6, 20], [8, 0, 3, 3]]
# Two samples of other sizes, for data parallelism beside.
SAMPLES = [SIZES, [[2, 7, 0, 4], [9, 1, 6, 12]]]


def sharded_network(mesh: Any, **options: Any) -> Blocks:
    model = network(KINDS)
    parallelize_module(model, mesh, {"blocks.*.attention": SequenceParallelAttention(**options)})
    return model


def loss_of(model: nn.Module, rank: int | None, sample: int = 0, **keywords: Any) -> torch.Tensor:
    sizes = SAMPLES[sample]
    rows = slice(None) if rank is None else rows_of_processes(sizes)[rank]
    own = [sum(column) for column in zip(*sizes, strict=True)] if rank is None else sizes[rank]
    return Batch(sizes, sample, True, **keywords).loss(model, specs_of(own), rows)[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def summed(mesh: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    found = gradients(model)
    for grad in found.values():
        dist.all_reduce(grad, group=mesh.get_group())
    return found


def expected(samples: tuple[int, ...] = (0,)) -> dict[str, torch.Tensor]:
    model = network(KINDS)
    for sample in samples:
        loss_of(model, None, sample).backward()
    return gradients(model)


def assert_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found[name], grad, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def run_ddp(mesh: Any, case: str) -> Any:
    model = sharded_network(mesh, case=case)
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group())
    # The mean over processes of what is to be summed.
    (loss_of(wrapped, mesh.get_local_rank()) * mesh.size()).backward()
    return gradients(model)


def run_fsdp(mesh: Any, case: str) -> Any:
    model = sharded_network(mesh, case=case)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    (loss_of(model, mesh.get_local_rank()) * mesh.size()).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


class Checkpointed(nn.Module):
    """A block whose activations are computed anew in the backward, with all that travels."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inside, *args, use_reentrant=False)


def run_checkpointed(mesh: Any, case: str) -> Any:
    model = sharded_network(mesh, case=case)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    loss_of(model, mesh.get_local_rank()).backward()
    return {name.replace(".inside", ""): grad for name, grad in summed(mesh, model).items()}


def run_compiled(mesh: Any, case: str) -> Any:
    model = sharded_network(mesh, case=case)
    compiled = torch.compile(model, backend="aot_eager")
    # Other sizes before, so that it is compiled anew, with symbols in their place.
    loss_of(compiled, mesh.get_local_rank(), 1)
    loss_of(compiled, mesh.get_local_rank()).backward()
    return summed(mesh, model)


# Compilation takes long; a ring compiles in the tests of the functional form.
@pytest.mark.parametrize(
    ("run", "case"),
    [
        *itertools.product([run_ddp, run_fsdp, run_checkpointed], ["gathered", "ring"]),
        (run_compiled, "gathered"),
    ],
)
def test_gradients_are_those_of_one_process(four: Processes, run: Callable[..., Any], case: str) -> None:
    for found in four.run(run, 2, case):
        assert_gradients(found, expected(), TOLERANCE)


def run_accumulated(mesh: Any) -> Any:
    model = sharded_network(mesh)
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group())
    rank, n = mesh.get_local_rank(), mesh.size()
    with wrapped.no_sync():
        (loss_of(wrapped, rank, 0) * n).backward()
    (loss_of(wrapped, rank, 1) * n).backward()
    return gradients(model)


def test_gradients_accumulate_over_samples(four: Processes) -> None:
    for found in four.run(run_accumulated, 2):
        assert_gradients(found, expected((0, 1)), TOLERANCE)


def two_dimensional(_: Any, wrap: str) -> Any:
    """Two samples side by side, each spread over two processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tokens"))
    sample, rank = mesh["data"].get_local_rank(), mesh["tokens"].get_local_rank()
    model = sharded_network(mesh["tokens"])
    if wrap == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model, process_group=mesh._flatten().get_group())
    else:
        for block in model.blocks:
            fully_shard(block, mesh=mesh._flatten())
        wrapped = fully_shard(model, mesh=mesh._flatten())
    # The mean over all four, of which those of one sample are to be summed, and the samples too.
    (loss_of(wrapped, rank, sample) * 4).backward()
    if wrap == "ddp":
        return gradients(model)
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_samples_side_by_side_on_a_mesh_of_two_dimensions(four: Processes, wrap: str) -> None:
    for found in four.run(two_dimensional, 4, wrap):
        assert_gradients(found, expected((0, 1)), TOLERANCE)


def run_autocast(mesh: Any, case: str) -> Any:
    model = sharded_network(mesh, case=case)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, mesh.get_local_rank())
    loss.backward()
    return summed(mesh, model)


@pytest.mark.parametrize("case", ["gathered", "ring"])
def test_autocast(four: Processes, case: str) -> None:
    model = network(KINDS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, None)
    loss.backward()
    exact, wanted = expected(), gradients(model)
    scale = max(grad.abs().max().item() for grad in exact.values())
    error = max((wanted[name] - exact[name]).abs().max().item() for name in exact)
    assert error > TOLERANCE
    # As far from float32 as one process is, and rounded to bfloat16 once more by each process.
    for found in four.run(run_autocast, 2, case):
        assert_gradients(found, exact, 2 * error + 2**-8 * scale)


def tensor_parallel(_: Any, gathers: bool) -> Any:
    """Projections are cut beside the tokens: each dimension of the mesh has its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("width", "tokens"))
    outputs = {"output_layouts": Replicate()} if gathers else {}
    plan = {
        "blocks.*.attention.mixed_attention.qkv": ColwiseParallel(**outputs),
        "blocks.*.attention.mixed_attention.proj": RowwiseParallel(input_layouts=Replicate()),
    }
    model = parallelize_module(network(KINDS), mesh["width"], plan)
    parallelize_module(model, mesh["tokens"], {"blocks.*.attention": SequenceParallelAttention()})
    loss_of(model, mesh["tokens"].get_local_rank()).backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    for grad in found.values():
        dist.all_reduce(grad, group=mesh["tokens"].get_group())
    return found


def test_projections_under_tensor_parallelism_beside_spread_tokens(four: Processes) -> None:
    for found in four.run(tensor_parallel, 4, True):
        assert_gradients(found, expected(), TOLERANCE)


def test_projections_that_leave_their_heads_spread_are_refused(four: Processes) -> None:
    for outcome in four.outcomes(tensor_parallel, 4, False):
        assert re.match(r"(Value|Process)Error: .*the projection must be 96 wide, got 48", str(outcome)), outcome


def mesh_of_two_dimensions(_: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tokens"))
    sharded_network(mesh)


def test_a_mesh_of_two_dimensions_is_refused(four: Processes) -> None:
    for outcome in four.outcomes(mesh_of_two_dimensions, 4):
        assert "dimension" in str(outcome).splitlines()[0], outcome
