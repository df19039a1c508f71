"""The functional form in real processes: results and gradients are those of one process that holds all keys."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchor_attention import KeyRangeTable, anchor_attention
from anchor_attention.distributed import ShardedTable, sharded_attention
from tests.distributed.processes import Processes

BATCH, HEADS, WIDTH, V_WIDTH = 2, 4, 16, 8
# Float32 results of order one: other orders of summation over some hundred terms.
TOLERANCE = 2e-5


class Case:
    """Queries and keys of every process, and who reads whom, drawn from a seed."""

    def __init__(self, world: int, seed: int, *, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.queries = [self.whole(0, 40) if self.whole(0, 4) else 0 for _ in range(world)]
        self.keys = [self.whole(0, 30) if self.whole(0, 4) else 0 for _ in range(world)]
        n = sum(self.keys)
        self.rows: list[tuple[list[list[int]], list[list[int]]]] = []
        for n_queries in self.queries:
            q_rows, k_rows, begin = [], [], 0
            while begin < n_queries:
                end = min(n_queries, begin + self.whole(1, 20))
                for _ in range(self.whole(0, 3)):
                    bounds = sorted((self.whole(0, n), self.whole(0, n)))
                    q_rows.append([begin, end])
                    k_rows.append(bounds)
                begin = end
            self.rows.append((q_rows, k_rows))
        wide = {"generator": self.generator, "dtype": torch.float64}
        self.q = torch.randn(BATCH, sum(self.queries), HEADS, WIDTH, **wide).to(dtype)
        self.k = torch.randn(BATCH, n, kv_heads, WIDTH, **wide).to(dtype)
        self.v = torch.randn(BATCH, n, kv_heads, V_WIDTH, **wide).to(dtype)
        angles = torch.rand(BATCH, sum(self.queries) + n, WIDTH // 2, **wide) * 6
        freqs = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        self.q_freqs, self.k_freqs = freqs[:, : self.q.shape[1]], freqs[:, self.q.shape[1] :]
        self.mask = torch.rand(BATCH, n, generator=self.generator) < 0.7
        self.grad_out = torch.randn(BATCH, sum(self.queries), HEADS, V_WIDTH, **wide).to(dtype)
        self.grad_lse = torch.randn(BATCH, HEADS, sum(self.queries), **wide).float()

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def own(self, rank: int) -> tuple[slice, slice]:
        """Queries and keys of a process."""
        q, k = sum(self.queries[:rank]), sum(self.keys[:rank])
        return slice(q, q + self.queries[rank]), slice(k, k + self.keys[rank])

    def table(self, rank: int | None = None) -> KeyRangeTable:
        """Of one process, or of all with their queries one process after the other."""
        q_rows: list[list[int]] = []
        k_rows: list[list[int]] = []
        for r, rows in enumerate(self.rows):
            if rank in (None, r):
                offset = sum(self.queries[:r]) if rank is None else 0
                q_rows += [[begin + offset, end + offset] for begin, end in rows[0]]
                k_rows += rows[1]
        return KeyRangeTable.from_ranges(q_rows, k_rows)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def differentiated(case: Case, q: slice, k: slice, masked: bool, call: Any) -> dict[str, torch.Tensor]:
    """out, lse, and the gradients of a result that depends on both."""
    leaves = {"q": leaf(case.q[:, q]), "k": leaf(case.k[:, k]), "v": leaf(case.v[:, k])}
    leaves |= {"q_freqs": leaf(case.q_freqs[:, q]), "k_freqs": leaf(case.k_freqs[:, k])}
    tensors = list(leaves.values())
    mask = case.mask[:, k] if masked else None
    out, lse = call(*tensors[:3], q_freqs=tensors[3], k_freqs=tensors[4], key_mask=mask)
    reached = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * case.grad_out[:, q]).sum() + (reached * case.grad_lse[:, :, q]).sum()
    grads = torch.autograd.grad(loss, tensors)
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def sharded(mesh: Any, seed: int, case_name: str, masked: bool, kv_heads: int, dtype: torch.dtype) -> Any:
    rank = mesh.get_local_rank()
    case = Case(mesh.size(), seed, kv_heads=kv_heads, dtype=dtype)
    q, k = case.own(rank)
    replicated = case_name == "replicated"
    if replicated:
        k = slice(0, sum(case.keys))
    keys, values = case.k[:, k], case.v[:, k]
    # Only one process has a mask of its own to announce: the others' keys are all real.
    mask = case.mask[:, k] if masked and rank == 0 else None
    table = ShardedTable.agree(
        case.table(rank), keys, values, mesh, key_mask=mask, replicated=replicated,
        case=None if replicated else case_name,
    )  # fmt: skip

    def call(*tensors: torch.Tensor, **keywords: Any) -> Any:
        return sharded_attention(*tensors, table, return_lse=True, **keywords)

    return differentiated(case, q, k, masked, call)


def expected(case: Case, masked: bool) -> dict[str, torch.Tensor]:
    def call(*tensors: torch.Tensor, **keywords: Any) -> Any:
        return anchor_attention(*tensors, case.table(), return_lse=True, **keywords)

    return differentiated(case, slice(None), slice(None), masked, call)


def joined(parts: list[dict[str, torch.Tensor]], replicated: bool) -> dict[str, torch.Tensor]:
    whole = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if replicated and name in ("grad_k", "grad_v", "grad_k_freqs"):
            for piece in pieces[1:]:
                torch.testing.assert_close(piece, pieces[0], rtol=0, atol=0)
            whole[name] = pieces[0]
        else:
            whole[name] = torch.cat(pieces, dim=2 if name == "lse" else 1)
    return whole


def check(pool: Processes, world: int, seed: int, case_name: str, masked: bool, kv_heads: int = HEADS) -> None:
    parts = pool.run(sharded, world, seed, case_name, masked, kv_heads, torch.float32)
    whole = joined(parts, case_name == "replicated")
    for name, tensor in expected(Case(world, seed, kv_heads=kv_heads), masked).items():
        finite = tensor[tensor.isfinite()].abs()
        scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(
            whole[name], tensor, rtol=0, atol=TOLERANCE * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    case_name=st.sampled_from(["replicated", "gathered", "ring"]),
    masked=st.booleans(),
    kv_heads=st.sampled_from([HEADS, 1]),
)
def test_results_are_those_of_one_process(
    four: Processes, world: int, seed: int, case_name: str, masked: bool, kv_heads: int
) -> None:
    check(four, world, seed, case_name, masked, kv_heads)


@pytest.mark.parametrize("case_name", ["replicated", "gathered", "ring"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(four: Processes, case_name: str, dtype: torch.dtype) -> None:
    first, second = (four.run(sharded, 3, 5, case_name, True, HEADS, dtype) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case_name", ["replicated", "gathered", "ring"])
def test_gradients_of_bfloat16_keys_are_summed_in_float32(four: Processes, case_name: str) -> None:
    world, seed = 4, 11
    case = Case(world, seed, dtype=torch.bfloat16)
    parts = four.run(sharded, world, seed, case_name, False, HEADS, torch.bfloat16)
    grad = joined(parts, case_name == "replicated")["grad_v"].double()
    wide = Case(world, seed, dtype=torch.bfloat16)
    for name in ("q", "k", "v", "grad_out"):
        setattr(wide, name, getattr(case, name).double())
    exact = expected(wide, False)["grad_v"]
    # The parts are rounded once by each process, to 8 bits, and their sum once more: that of bfloat16 numbers would be
    # rounded after every addition.
    scale = exact.abs().max()
    assert scale > 0
    assert (grad - exact).abs().max() <= 2 * 2**-8 * scale


def agreed(mesh: Any, k_shape: list[tuple[int, ...]], reads: list[tuple[int, int]], **options: Any) -> Any:
    rank = mesh.get_local_rank()
    k = torch.zeros(k_shape[rank])
    table = KeyRangeTable.from_ranges([[0, 3]], [list(reads[rank])])
    return ShardedTable.agree(table, k, k, mesh, **options)


def agreed_with(mesh: Any, k_shape: Any, reads: Any, options: dict[str, Any]) -> Any:
    return agreed(mesh, k_shape, reads, **options)


def test_only_keys_that_somebody_reads_travel(four: Processes) -> None:
    tables = four.run(agreed, 3, [(1, 10, 2, 8)] * 3, [(2, 5), (4, 12), (29, 30)])
    for rank, table in enumerate(tables):
        assert table.sent == (((2, 10),), ((0, 2),), ((9, 10),))
        assert table.width == 8 and table.processes.rank == rank
    assert [table.gathered.entries() for table in tables] == [
        [((0, 3), [(0, 3)])],
        [((0, 3), [(2, 10)])],
        [((0, 3), [(16, 17)])],
    ]


def test_the_case_follows_from_the_bytes_of_gathered_keys(four: Processes) -> None:
    shape, reads = [(1, 10, 2, 8), (1, 6, 2, 8), (1, 0, 2, 8)], [(0, 16)] * 3
    # 3 processes, 10 rows each with padding, 2 heads, 8 + 8 wide, 4 bytes.
    n_bytes = 3 * 10 * 2 * 16 * 4
    for limit, case_name in ((n_bytes, "gathered"), (n_bytes - 1, "ring")):
        tables = four.run(agreed_with, 3, shape, reads, {"gather_limit": limit})
        assert {table.case for table in tables} == {case_name}
    assert {table.case for table in four.run(agreed_with, 3, shape, reads, {"case": "ring"})} == {"ring"}


@pytest.mark.parametrize(
    ("shapes", "reads", "options", "message"),
    [
        ([(1, 10, 2, 8), (1, 10, 4, 8)], (0, 10), {}, r"heads=2.*process 1.*heads=4"),
        ([(1, 10, 2, 8), (2, 10, 2, 8)], (0, 10), {}, r"batch=1.*process 1.*batch=2"),
        ([(1, 10, 2, 8), (1, 10, 2, 8)], (0, 21), {}, r"process 0 reads key 20, but the processes hold 20"),
        ([(1, 10, 2, 8), (1, 9, 2, 8)], (0, 9), {"replicated": True}, r"as many keys on every process.*\[10, 9\]"),
        ([(1, 10, 2, 8), (1, 9, 2, 8)], (0, 9), {"case": "tree"}, r"case must be .* got 'tree'"),
    ],
)
def test_what_does_not_fit_is_refused_by_every_process(
    four: Processes, shapes: Any, reads: Any, options: dict[str, Any], message: str
) -> None:
    for outcome in four.outcomes(agreed_with, 2, shapes, [reads] * 2, options):
        assert re.match(rf"ValueError: .*{message}", str(outcome), re.DOTALL), outcome


def compiled(mesh: Any, seed: int, case_name: str) -> Any:
    """Differences of a compiled call from an eager one."""
    rank = mesh.get_local_rank()
    case = Case(mesh.size(), seed)
    q, k = case.own(rank)
    if case_name == "replicated":
        k = slice(0, sum(case.keys))
    keys, values, mask = case.k[:, k], case.v[:, k], case.mask[:, k]
    options: dict[str, Any] = {"replicated": True} if case_name == "replicated" else {"case": case_name}
    table = ShardedTable.agree(case.table(rank), keys, values, mesh, key_mask=mask, **options)

    def call(*tensors: torch.Tensor, **keywords: Any) -> Any:
        return sharded_attention(*tensors, table, return_lse=True, **keywords)

    eager = differentiated(case, q, k, True, call)
    graphs = differentiated(case, q, k, True, torch.compile(call, backend="aot_eager", fullgraph=True))
    return {name: (graphs[name], eager[name]) for name in eager}


@pytest.mark.parametrize("case_name", ["replicated", "gathered", "ring"])
def test_compiles_as_one_graph(four: Processes, case_name: str) -> None:
    for outcome in four.run(compiled, 2, 3, case_name):
        for graph, eager in outcome.values():
            torch.testing.assert_close(graph, eager, rtol=0, atol=TOLERANCE)


def test_the_package_does_not_import_it_by_itself() -> None:
    """It loads functional collectives, which take time that most programs need not spend."""
    code = "import sys, anchor_attention; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "anchor_attention.functional" in loaded
    assert "anchor_attention.distributed" not in loaded
    assert "torch.distributed._functional_collectives" not in loaded


def compiled_for_sizes(mesh: Any, case_name: str) -> list[float]:
    graph = torch.compile(sharded_attention, fullgraph=True, dynamic=False, backend="aot_eager")
    differences = []
    for n in (20, 14):
        q, k, v = (torch.randn(1, size, HEADS, WIDTH, requires_grad=True) for size in (n + 10, n, n))
        reads = KeyRangeTable.from_ranges([[0, n]], [[0, n * mesh.size()]])
        table = ShardedTable.agree(reads, k, v, mesh, case=case_name)
        found = graph(q, k, v, table)
        found.sum().backward()
        differences.append((found - sharded_attention(q, k, v, table)).abs().max().item())
    return differences


@pytest.mark.parametrize("case_name", ["gathered", "ring"])
def test_compiles_anew_for_other_sizes(four: Processes, case_name: str) -> None:
    for differences in four.run(compiled_for_sizes, 2, case_name):
        assert len(differences) == 2 and max(differences) < TOLERANCE
