"""Modules in the hands of other packages: weights that are elsewhere, quantised or sharded; tracers; whole graphs."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from anchor_attention import KeyRangeTable, LatentAttention, PerceiverAttention, SelfAnchorAttention, anchor_attention
from tests.module_cases import (
    BRANCH_MODULES,
    DIM,
    FLOAT32_TOLERANCE,
    make,
    queries_alone,
    specs,
    total,
    unit_freqs,
)

# The queries are not read: the projection's weight would be cut if it were plain.
SPECS = specs(surface_anchors=5, surface_queries=7, volume_anchors=4, volume_queries=6)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, total(SPECS), DIM)


def offloaded(module: nn.Module, folder: Path) -> nn.Module:
    """Weights come to the module when a layer is called, and are on the meta device else."""
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    return module


def on_disk(module: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(module, str(folder), execution_device=torch.device("cpu"))
    return module


def dispatched(module: nn.Module, folder: Path) -> nn.Module:
    """As ``from_pretrained(device_map=...)`` does it: a part of the layers stays, the others are offloaded."""
    names = [name for name, part in module.named_modules() if not list(part.children()) and name]
    device_map = {name: "cpu" if name.endswith("proj") else "disk" for name in names}
    device_map |= dict.fromkeys(dict(module.named_parameters(recurse=False)), "disk")
    return accelerate.dispatch_model(module, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WRAPPERS = [offloaded, on_disk, dispatched]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_weights_that_are_elsewhere_are_fetched(
    module_class: type, wrap: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    module = make(module_class, use_rope=True).eval()
    x, freqs = tokens(), unit_freqs(2, total(SPECS))
    later, rows = queries_alone(SPECS)
    with torch.no_grad():
        expected, _ = module(x, SPECS, freqs, return_kv_cache=True)
        away = wrap(copy.deepcopy(module), tmp_path)
        assert any(parameter.is_meta for parameter in away.parameters())
        actual, cache = away(x, SPECS, freqs, return_kv_cache=True)
        torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT32_TOLERANCE)
        cached = away(x[:, rows], later, freqs[:, rows], kv_cache=cache)
        torch.testing.assert_close(cached, expected[:, rows], rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_latents_and_streams_of_offloaded_modules(wrap: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    latent = LatentAttention(dim=DIM, num_heads=2, num_latents=4, qk_norm="rms").eval()
    perceiver = PerceiverAttention(dim=DIM, num_heads=2, num_kv_heads=1).eval()
    x, y = tokens(), tokens()
    with torch.no_grad():
        for module, call in ((latent, lambda m: m(x)), (perceiver, lambda m: m(x, y))):
            away = wrap(copy.deepcopy(module), tmp_path / type(module).__name__)
            assert any(parameter.is_meta for parameter in away.parameters())
            torch.testing.assert_close(call(away), call(module), rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_quantised_layers_are_called(module_class: type) -> None:
    """Weights that are tensors of a class of their own, and layers of another class."""
    module = make(module_class).eval()
    x = tokens()
    with torch.no_grad():
        expected = module(x, SPECS)
        step = module.mixed_attention.qkv.weight.abs().max().item() / 127
        for quantised in (
            quantize_(twin := copy.deepcopy(module), Int8WeightOnlyConfig()) or twin,
            torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8),
        ):
            # The layer alone, with the weights that it now has, says what the module may differ by.
            own = (quantised.mixed_attention.qkv(x) - module.mixed_attention.qkv(x)).abs().max().item()
            assert step / 4 < own < 30 * step * x.abs().max().item()
            found = quantised(x, SPECS)
            assert 0 < (found - expected).abs().max().item() < 10 * own


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_layers_that_tensor_parallelism_sharded_are_called(module_class: type) -> None:
    module = make(module_class)
    sharded = parallelize_module(
        copy.deepcopy(module),
        init_device_mesh("cpu", (1,)),
        {
            "mixed_attention.qkv": ColwiseParallel(output_layouts=Replicate()),
            "mixed_attention.proj": RowwiseParallel(input_layouts=Replicate()),
        },
    )
    x = tokens()
    expected, found = module(x, SPECS), sharded(x, SPECS)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_TOLERANCE)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, parameter), twin in zip(module.named_parameters(), sharded.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None
        torch.testing.assert_close(twin.grad.full_tensor(), parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_graphs_of_make_fx_compute_the_same(module_class: type, tracing_mode: str) -> None:
    module = make(module_class, use_rope=True)
    freqs = unit_freqs(2, total(SPECS))

    def gradients(x: Tensor, freqs: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(module, parameters, (x, SPECS, freqs))
        return out, *torch.autograd.grad(out.square().sum(), (x, *parameters.values()))

    parameters = dict(module.named_parameters())
    graph = make_fx(gradients, tracing_mode=tracing_mode)(tokens().requires_grad_(), freqs, parameters)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert {"anchor_attention.attention.default", "anchor_attention.attention_backward.default"} <= targets
    x = tokens().requires_grad_()
    for found, expected in zip(graph(x, freqs, parameters), gradients(x, freqs, parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_TOLERANCE)


class OwnTable(nn.Module):
    """A table made once, as the documentation advises, and one that is replaced in use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = KeyRangeTable.from_ranges([[0, 4], [4, 9]], [[0, 3], [2, 7]])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anchor_attention(q, k, v, self.table)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_table_on_a_compiled_module(backend: str) -> None:
    module = OwnTable()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (9, 7, 7))
    for ranges in ([[0, 3], [2, 7]], [[1, 7], [0, 2]]):
        module.table = KeyRangeTable.from_ranges([[0, 4], [4, 9]], ranges)
        found, expected = compiled(q, k, v), module(q, k, v)
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32_TOLERANCE)
        grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
        for pair in zip(*grads, strict=True):
            torch.testing.assert_close(*pair, rtol=0, atol=FLOAT32_TOLERANCE)
    for twin in (copy.deepcopy(module), torch.load(saved(module), weights_only=False)):
        assert torch.equal(twin(q, k, v), module(q, k, v))


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_a_number_of_samples_that_is_fixed_makes_one_graph() -> None:
    """Samples packed on one axis, each of its own size: how many there are is the graph's, their sizes are not."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def packed(q: Tensor, k: Tensor, bounds: list[list[int]], keys: list[list[int]]) -> Tensor:
        return anchor_attention(q, k, k, KeyRangeTable.from_ranges(bounds, keys))

    compiled = torch.compile(packed, backend=count, fullgraph=True, dynamic=True)
    for sizes in ((5, 9, 4), (7, 3, 6), (12, 20, 11), (2, 30, 40)):
        cuts = [0, *itertools.accumulate(sizes)]
        bounds = [list(pair) for pair in itertools.pairwise(cuts)]
        keys = [[begin, begin + (end - begin + 1) // 2] for begin, end in bounds]
        q, k = torch.randn(2, 1, cuts[-1], 2, 8)
        torch.testing.assert_close(compiled(q, k, bounds, keys), packed(q, k, bounds, keys))
    assert graphs <= 2


def test_a_module_with_state_is_no_other_after_a_failed_call() -> None:
    """An exception in the middle of a call, as a layer's out-of-memory, leaves the module as it was."""
    module = make(SelfAnchorAttention)
    x = tokens()
    expected = module(x, SPECS)

    def fail(*args: object) -> None:
        raise MemoryError("no more")

    handle = module.mixed_attention.proj.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="no more"):
        module(x, SPECS)
    handle.remove()
    assert torch.equal(module(x, SPECS), expected)
