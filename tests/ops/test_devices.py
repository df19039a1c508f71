"""The operations and the modules on every device that is there, the emulated GPU included, against float64.

Inputs are made on the CPU, where plain PyTorch in the same dtype and the float64 reference give the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.utils import counters

from anchor_attention import CrossAnchorAttention, KeyRangeTable, TokenSpec, anchor_attention, rope, use_backend
from anchor_attention.reference import rope_reference
from tests.devices import DEVICES, DEVICES_AND_DTYPES, DTYPES, HAS_CUDA, NARROW_DEVICES, Device
from tests.generators import LAYOUTS, AttentionInputs, attention_inputs, strided, unit_freqs
from tests.modules.test_golden import CASES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case
from tests.oracle import Result, assert_as_good_as_plain, fused, plain_attention, reference, run

HEAD_DIMS = (8, 32, 40, 48, 64, 80, 96, 128, 160, 256)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with Device(request.param).executing() as executing:
        yield executing


def moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy with the same strides and offset: `Tensor.to` would make views of packed tensors contiguous."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((size,), (1,), 0).clone().to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on(device: str, inputs: AttentionInputs) -> AttentionInputs:
    tensors = {name: moved(tensor, device) for name, tensor in vars(inputs).items() if isinstance(tensor, torch.Tensor)}
    return replace(inputs, **tensors)


def to_cpu(result: Result) -> Result:
    return {name: tensor.cpu() for name, tensor in result.items()}


def make(
    dtype: torch.dtype,
    head_dim: int = 64,
    layout: str = "packed",
    n_queries: int = 300,
    n_keys: int = 200,
    heads: int = 3,
    kv_heads: int | None = None,
    value_dim: int | None = None,
) -> AttentionInputs:
    """Partial tiles, shared and repeated keys, a group without keys, rows of no group, padding, rotation."""
    table = KeyRangeTable.from_ranges(
        [[0, 150], [0, 150], [150, 280], [150, 280], [280, 290]], [[0, 90], [137, n_keys], [70, 160], [70, 160], [4, 4]]
    )
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    q, k = (strided(2, n, h, head_dim, dtype, layout) for n, h in ((n_queries, heads), (n_keys, kv_heads)))
    v, grad_out = (strided(2, n, h, value_dim, dtype, layout) for n, h in ((n_keys, kv_heads), (n_queries, heads)))
    freqs = (unit_freqs(batch, n, head_dim, dtype) for batch, n in ((1, n_queries), (2, n_keys)))
    return AttentionInputs(q, k, v, table, grad_out, *freqs, key_mask=torch.rand(2, n_keys) < 0.8)


def assert_right(device: Device, inputs: AttentionInputs) -> None:
    exact = run(reference, inputs.to(torch.float64))
    plain = run(plain_attention, inputs)
    assert_as_good_as_plain(to_cpu(run(fused, on(device.memory, inputs))), exact, plain, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moved_inputs_are_the_same(device: Device, layout: str) -> None:
    tensor = strided(2, 9, 3, 16, torch.bfloat16, layout)
    copy = moved(tensor, device.memory)
    assert copy.stride() == tensor.stride() and copy.storage_offset() == tensor.storage_offset()
    assert copy.device.type == device.memory and torch.equal(copy.cpu(), tensor)


@pytest.mark.parametrize(("name", "dtype"), DEVICES_AND_DTYPES, ids=str)
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    with Device(name).executing() as device:

        @settings(max_examples=6 if device.is_emulated else settings().max_examples)
        @given(attention_inputs(dtype, any_value_dim=name == "cpu"))
        def check(inputs: AttentionInputs) -> None:
            assert_right(device, inputs)

        check()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES, ids=str, indirect=["device"])
def test_every_head_dim(device: Device, dtype: torch.dtype, head_dim: int) -> None:
    assert_right(device, make(dtype, head_dim, heads=1 if device.is_emulated else 3))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(6, 2, 64, 64), (4, 1, 40, 24), (2, 2, 72, 64), (2, 2, 16, 136), (2, 1, 128, 32)],
)
@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES, ids=str, indirect=["device"])
def test_grouped_heads_and_values_of_another_size(
    device: Device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, value_dim: int
) -> None:
    assert_right(device, make(dtype, head_dim, heads=heads, kv_heads=kv_heads, value_dim=value_dim))


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES, ids=str, indirect=["device"])
def test_few_queries_of_many_keys(device: Device, dtype: torch.dtype) -> None:
    """Keys are shared out among threads or blocks, whose results are put together in one order."""
    inputs = make(dtype, n_keys=1500, heads=2, kv_heads=1, value_dim=32)
    assert_right(device, inputs)
    first, again = (fused(on(device.memory, inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", NARROW_DEVICES, indirect=True)
def test_strides_are_read_in_place(device: Device, layout: str) -> None:
    inputs = on(device.memory, make(torch.bfloat16, layout=layout))
    contiguous = replace(inputs, **{name: getattr(inputs, name).contiguous() for name in ("q", "k", "v")})
    # A GPU may have other kernels for rows that are not aligned: the same values, rounded elsewhere.
    tolerance = torch.finfo(torch.bfloat16).eps if layout == "offset" else 0.0
    for found, expected in zip(fused(inputs), fused(contiguous), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES, ids=str, indirect=["device"])
def test_two_runs_give_the_same_bits(device: Device, dtype: torch.dtype) -> None:
    n_queries, n_keys, heads = (300, 200, 1) if device.is_emulated else (2000, 1000, 3)
    inputs = on(device.memory, make(dtype, n_queries=n_queries, n_keys=n_keys, heads=heads))
    inputs.table = KeyRangeTable.from_ranges([[0, 110], [110, n_queries]], [[0, n_keys], [30, 150]])
    first = run(fused, inputs)
    for _ in range(1 if device.is_emulated else 3):
        again = run(fused, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_thousands_of_groups(device: Device) -> None:
    n = 1500 if device.is_emulated else 3000
    bounds = torch.arange(n + 1) * 3
    table = KeyRangeTable.from_cu_seqlens(bounds, bounds)
    q, k, v = (torch.randn(1, 3 * n, 2, 32) for _ in range(3))
    one = KeyRangeTable.from_ranges([[0, 3]], [[0, 3]])
    expected = anchor_attention(*(t.double().unflatten(1, (n, 3))[0] for t in (q, k, v)), one)
    out = anchor_attention(*(t.to(device.memory) for t in (q, k, v)), table)
    # Three values are averaged: a few units of rounding of numbers of order one.
    torch.testing.assert_close(out.cpu(), expected.flatten(0, 1).unsqueeze(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 48, 64, 128])
def test_rope(device: Device, dtype: torch.dtype, head_dim: int) -> None:
    x, grad = (strided(2, 37, 3, head_dim, dtype, "packed") for _ in range(2))
    freqs = unit_freqs(1, 37, head_dim)

    def rotate(rotation: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
        *leaves, grad = (tensor.detach().requires_grad_() for tensor in inputs)
        out = rotation(*leaves)
        return [tensor.cpu() for tensor in (out.detach(), *torch.autograd.grad(out, leaves, grad))]

    found = rotate(rope, moved(x, device.memory), freqs.to(device.memory), grad.to(device.memory))
    exact = rotate(rope_reference, x.double(), freqs.to(torch.complex128), grad.double())
    # Two products and a sum in float32, rounded once; freqs gather those of all heads and samples.
    for name, result, truth in zip(("out", "grad_x", "grad_freqs"), found, exact, strict=True):
        eps = torch.finfo(torch.float32 if result.is_complex() else dtype).eps
        bound = (16 if result.is_complex() else 2) * eps * truth.abs().max()
        assert (result.to(truth.dtype) - truth).abs().max() <= bound, name


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES, ids=str, indirect=["device"])
def test_opcheck(device: Device, dtype: torch.dtype) -> None:
    ops = torch.ops.anchor_attention
    inputs = on(device.memory, make(dtype, head_dim=16))
    table = (list(inputs.table.q_ranges), list(inputs.table.k_offsets), list(inputs.table.k_ranges))
    inputs.differentiable()
    assert inputs.q_freqs is not None
    torch.library.opcheck(
        ops.attention, (inputs.q, inputs.k, inputs.v, *table, inputs.q_freqs, inputs.key_mask, 0.3, True)
    )
    torch.library.opcheck(ops.attention, (inputs.q, inputs.k, inputs.v, *table))
    torch.library.opcheck(ops.rope, (inputs.q, inputs.q_freqs))
    q, k, v, freqs = (tensor.detach() for tensor in (inputs.q, inputs.k, inputs.v, inputs.q_freqs))
    out, lse = ops.attention(q, k, v, *table, freqs)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(
        ops.attention_backward, (*grads, q, k, v, out, lse, *table, freqs, None, None, True, True, True, True, True)
    )
    torch.library.opcheck(ops.rope_backward, (torch.randn_like(q), q, freqs, True, True))


@pytest.mark.parametrize("name", CASES)
def test_modules_match_the_recorded_ones(device: Device, name: str) -> None:
    case = Case(name, fused_weights=True)
    case.arrays = {key: tensor.to(device.memory) for key, tensor in case.arrays.items()}
    case.module.to(device.memory)
    x = case.arrays["x"].clone().requires_grad_()
    freqs = None if case.freqs is None else case.freqs.to(device.memory)
    y = case.run(x, case.specs, freqs)
    y.backward(case.arrays["grad_y"])
    torch.testing.assert_close(y, case.arrays["y"], rtol=0, atol=OUTPUT_TOLERANCE)
    torch.testing.assert_close(x.grad, case.arrays["grad_x"], rtol=0, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if "cached" in name])
def test_modules_read_their_cache_on_the_device(device: Device, name: str) -> None:
    case = Case(name, fused_weights=True)
    case.module.to(device.memory)
    is_anchor = [spec.name.endswith(case.meta.get("suffix", "_anchors")) for spec in case.specs]
    keep = torch.cat([torch.full((spec.size or 0,), not a) for spec, a in zip(case.specs, is_anchor, strict=True)])
    alone = [TokenSpec(s.name, None if a else s.size) for s, a in zip(case.specs, is_anchor, strict=True)]
    assert case.freqs is not None
    x, freqs = case.arrays["x"], case.freqs
    with torch.no_grad():
        y, cache = case.run(x.to(device.memory), case.specs, freqs.to(device.memory), return_kv_cache=True)
        queries = case.run(x[:, keep].to(device.memory), alone, freqs[:, keep].to(device.memory), kv_cache=cache)
    assert queries.device.type == device.memory
    torch.testing.assert_close(y.cpu(), case.arrays["y"], rtol=0, atol=OUTPUT_TOLERANCE)
    torch.testing.assert_close(queries.cpu(), case.arrays["y_cached_queries"], rtol=0, atol=OUTPUT_TOLERANCE)


@pytest.mark.parametrize(
    "name",
    ["cross_two_branches", "joint_key_padding", "mixed_arbitrary_patterns", "self_custom_suffix_no_bias"],
)
@pytest.mark.parametrize("device", NARROW_DEVICES, indirect=True)
def test_modules_in_bfloat16_are_as_good_as_plain(device: Device, name: str) -> None:
    """Against the recorded float32 outputs and gradients, beside plain PyTorch in bfloat16."""
    case = Case(name, fused_weights=True)
    case.module.to(device.memory, torch.bfloat16)
    freqs = None if case.freqs is None else case.freqs.to(device.memory)
    exact = {key: case.arrays[key] for key in ("y", "grad_x")}

    def results(backend: str) -> dict[str, torch.Tensor]:
        x = case.arrays["x"].to(device.memory, torch.bfloat16).requires_grad_()
        with use_backend(backend):
            y = case.run(x, case.specs, freqs)
            y.backward(case.arrays["grad_y"].to(y))
        assert x.grad is not None
        return {"y": y.detach().float().cpu(), "grad_x": x.grad.float().cpu()}

    found, plain = results("fused"), results("reference")
    for key, truth in exact.items():
        bound = 2 * (plain[key] - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (found[key] - truth).abs().max() <= bound, key


def other_devices_are_refused() -> None:
    inputs = on("cuda", make(torch.float32))
    with pytest.raises(RuntimeError, match="k must be on"):
        anchor_attention(inputs.q, inputs.k.cpu(), inputs.v, inputs.table)


def nothing_waits_for_the_gpu() -> None:
    inputs = on("cuda", make(torch.bfloat16))
    run(fused, inputs)
    grad_out = inputs.grad_out
    leaves = list(inputs.differentiable().values())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = fused(inputs)
        torch.autograd.grad(out, leaves, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def a_graph_replays_forward_and_backward() -> None:
    for dtype in DTYPES:
        inputs = on("cuda", make(dtype))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run_capturable(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_capturable(inputs)
        with torch.no_grad():
            for name in ("q", "k", "v"):
                tensor = getattr(inputs, name)
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        torch.cuda.synchronize()
        expected = run_capturable(inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)), dtype


def run_capturable(inputs: AttentionInputs) -> tuple[torch.Tensor, ...]:
    leaves = list(inputs.differentiable().values())
    out, lse = fused(inputs)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))


def streams_do_not_disturb_each_other() -> None:
    calls = [on("cuda", make(dtype, n_queries=3000, n_keys=900)) for dtype in DTYPES * 2]
    expected = [run_capturable(inputs) for inputs in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(5):
        results = []
        for inputs, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run_capturable(inputs))
        torch.cuda.synchronize()
        for found, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def a_stream_that_is_behind_is_waited_for() -> None:
    """The inputs are written late on the current stream; a launch on any other would read what was there before."""
    inputs = on("cuda", make(torch.bfloat16))
    expected = fused(inputs)[0]
    late = inputs.v.detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        inputs.v.zero_()
        torch.cuda._sleep(100_000_000)
        inputs.v.copy_(late)
        out = fused(inputs)[0]
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def offsets_go_beyond_two_to_the_31_elements() -> None:
    storage = torch.zeros(2**31 + 4096, dtype=torch.float16, device="cuda")
    rows = storage.as_strided((1, 5, 1, 16), (0, 2**29, 16, 1))
    rows.copy_(torch.randn(1, 5, 1, 16))
    table = KeyRangeTable.from_ranges([[0, 5]], [[0, 5]])
    assert torch.equal(anchor_attention(rows, rows, rows, table), anchor_attention(*[rows.contiguous()] * 3, table))


def tf32_is_used_where_torch_allows_it() -> None:
    inputs = make(torch.float32)
    exact = reference(inputs.to(torch.float64))[0]
    precision = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            errors[setting] = (fused(on("cuda", inputs))[0].cpu() - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision(precision)
    # TF32 keeps 10 bits; three products of it keep what float32 sums keep.
    assert errors["highest"] * 8 < errors["high"] < 2.0**-8 * inputs.v.abs().max() * 4


def compiled_calls_are_captured_into_graphs(device: str = "cuda") -> None:
    """Forward and backward of ``mode="reduce-overhead"``: recorded in the second call, replayed in those behind it."""
    module = CrossAnchorAttention(dim=64, num_heads=2, branches=("surface", "volume"), init_weights="torch").to(device)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    specs = [TokenSpec("surface_anchors", 70), TokenSpec("surface_queries", 90), TokenSpec("volume_anchors", 50)]
    counters.clear()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, 210, 64, device=device, requires_grad=True)
        leaves = [x, *module.parameters()]
        actual, expected = (
            (y.detach(), *torch.autograd.grad(y.square().mean(), leaves))
            for y in (call(x, specs) for call in (compiled, module))
        )
        for found, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["cudagraph_skips"] == 0


GPU_ONLY: tuple[Callable[[], None], ...] = (
    other_devices_are_refused,
    nothing_waits_for_the_gpu,
    a_graph_replays_forward_and_backward,
    streams_do_not_disturb_each_other,
    a_stream_that_is_behind_is_waited_for,
    offsets_go_beyond_two_to_the_31_elements,
    tf32_is_used_where_torch_allows_it,
    compiled_calls_are_captured_into_graphs,
)

if HAS_CUDA:

    @pytest.mark.parametrize("check", GPU_ONLY, ids=lambda check: check.__name__)
    def test_on_a_gpu(check: Callable[[], None]) -> None:
        check()
