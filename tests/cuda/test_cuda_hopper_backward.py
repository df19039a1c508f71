"""What is particular to the sm_90 backward, on the emulator: its order of additions, its choice, its tiles.

Correctness over inputs is shared with the sm_80 kernels: the cases of test_cuda_kernels.py run on both. Here the
backward runs on results of the reference, without a forward.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from tools.cuda_plans import KernelRun, plans
from tools.cuda_plans.build import compiler_report
from tools.cuda_plans.run import Array, from_storage, to_storage, unit_roundoff

from tests.cuda.kernel_cases import Case, make_case, nan_storage
from tests.cuda.test_cuda_plans import make_fields, random_table

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

HEAD_DIMS = [32, 48, 64, 96, 128]
_GROUP_WORDS = 6
_KEYS = 128  # per tile


def backward_visits(fields: dict[str, Any], queries_per_tile: int, items: int, **sizes: int) -> tuple[Any, list[Any]]:
    """The schedule, and what its items do in the order in which they are taken.

    An item is (keys, [(queries, sum, turn at the sum), …]), ranges as (begin, end).
    """
    schedule = plans().backward_schedule(fields, queries_per_tile, items, **sizes)
    words, n_groups, n_ranges = schedule["keys"], schedule["n_key_groups"], schedule["n_ranges"]
    first_range = _GROUP_WORDS * (n_groups + 1)
    first_turn = first_range + 2 * n_ranges
    assert len(words) == first_turn + 4 * n_ranges
    visits = []
    for g in range(n_groups):
        _, begin, end, first, n_splits, _ = words[_GROUP_WORDS * g : _GROUP_WORDS * (g + 1)]
        last = words[_GROUP_WORDS * (g + 1) + 3]
        for tile, key in enumerate(range(begin, end, _KEYS)):
            walk = []
            for r in range(first, last):
                q_begin, q_end = words[first_range + 2 * r : first_range + 2 * r + 2]
                first_sum, sums, turn, turns_per_tile = words[first_turn + 4 * r : first_turn + 4 * r + 4]
                of_tile, turn_at_sum = divmod(turn + tile * turns_per_tile, schedule["turns_per_sum"])
                for n, query in enumerate(range(q_begin, q_end, queries_per_tile)):
                    queries = (query, min(query + queries_per_tile, q_end))
                    walk.append((queries, first_sum + n * sums + of_tile, turn_at_sum))
            for split in range(n_splits):
                share = walk[len(walk) * split // n_splits : len(walk) * (split + 1) // n_splits]
                visits.append(((key, min(key + _KEYS, end)), share))
    return schedule, visits


@pytest.mark.parametrize("seed", range(20))
def test_additions_to_a_tile_of_queries_are_ordered_as_the_items_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_queries, n_keys, queries_per_tile = 3000, 2500, int(rng.choice([64, 128]))
    table = random_table(rng, n_queries, n_keys, int(rng.integers(1, 60)))
    if seed % 3 == 0:  # ranges that repeat
        table = [(queries, [*keys, *keys[:2]]) for queries, keys in table]
    fields = make_fields(table, n_queries=n_queries, n_keys=n_keys)
    schedule, visits = backward_visits(
        fields, queries_per_tile, int(rng.choice([1, 100, 1000])),
        sum_bytes=int(rng.choice([1, 1 << 14, 1 << 20])), concurrent_tiles=int(rng.choice([1, 4, 100])),
    )  # fmt: skip

    turns: dict[int, int] = {}
    rows: dict[int, tuple[int, int]] = {}
    read = np.zeros((n_queries, n_keys), np.int64)
    for (k_begin, k_end), walk in visits:
        for (q_begin, q_end), at, turn in walk:
            assert turn == turns.get(at, 0), "an item waits for one that is taken later"
            turns[at] = turn + 1
            assert rows.setdefault(at, (q_begin, q_end)) == (q_begin, q_end), "a sum is not always of the same queries"
            read[q_begin:q_end, k_begin:k_end] += 1
    assert set(turns) == set(range(schedule["n_sums"])), "a sum is never stored to"
    assert max(turns.values()) <= schedule["turns_per_sum"]
    expected = np.zeros_like(read)
    for (q_begin, q_end), keys in table:
        for k_begin, k_end in keys:
            expected[q_begin:q_end, k_begin:k_end] += 1
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("sum_bytes", [1, 1 << 40])
@pytest.mark.parametrize("queries_per_tile", [64, 128])
def test_sums_are_those_that_the_rounding_launch_reads(queries_per_tile: int, sum_bytes: int) -> None:
    """Every query belongs to one tile, whose sums follow each other."""
    rng = np.random.default_rng(queries_per_tile)
    fields = make_fields(random_table(rng, 3000, 900, 20), n_queries=3000, n_keys=900)
    schedule, visits = backward_visits(fields, queries_per_tile, 100, sum_bytes=sum_bytes, concurrent_tiles=100)
    words = schedule["queries"]
    covered = np.zeros(3000, np.int64)
    read = set()
    for g in range(schedule["n_query_groups"]):
        _, begin, end, _, _, first_sum = words[_GROUP_WORDS * g : _GROUP_WORDS * (g + 1)]
        covered[begin:end] += 1
        n_tiles = math.ceil((end - begin) / queries_per_tile)
        n_sums, rest = divmod(words[_GROUP_WORDS * (g + 1) + 5] - first_sum, n_tiles)
        assert rest == 0
        for tile, query in enumerate(range(begin, end, queries_per_tile)):
            queries = (query, min(query + queries_per_tile, end))
            read |= {(queries, first_sum + tile * n_sums + i) for i in range(n_sums)}
    assert (covered == 1).all() and len(read) == schedule["n_sums"]
    assert {(queries, at) for _, walk in visits for queries, at, _ in walk} == read
    assert (schedule["turns_per_sum"] == 1) == (sum_bytes == 1)


def test_small_problems_wait_for_no_turns_and_large_ones_take_no_more_memory() -> None:
    def turns_per_sum(n_tokens: int, heads: int) -> tuple[int, int]:
        fields = make_fields([((0, n_tokens), [(0, n_tokens)])], n_queries=n_tokens, n_keys=n_tokens, heads=heads)
        schedule = plans().backward_schedule(
            fields, 128, 4 * 132 // heads, sum_bytes=heads * 128 * 64 * 4, concurrent_tiles=132 // heads
        )
        return schedule["turns_per_sum"], schedule["n_sums"] * heads * 128 * 64 * 4

    for n_tokens, heads in ((512, 3), (1024, 12), (2048, 3)):
        turns, n_bytes = turns_per_sum(n_tokens, heads)
        assert turns == 1 and n_bytes == n_tokens // 128 * n_tokens * heads * 64 * 4 <= 32 << 20, (n_tokens, heads)
    for n_tokens, heads in ((65536, 3), (4096, 3), (512, 132), (2048, 12)):
        turns, n_bytes = turns_per_sum(n_tokens, heads)
        assert turns == n_tokens // 128 and n_bytes == n_tokens * heads * 64 * 4, (n_tokens, heads, turns)


def test_heavy_tiles_of_keys_are_split_over_queries() -> None:
    fields = make_fields([((0, 10_000), [(0, 200)])], n_queries=10_000, n_keys=200)
    _, whole = backward_visits(fields, 128, 1)
    _, split = backward_visits(fields, 128, 1000)
    assert len(whole) == 2 and len(split) == 2 * int(np.sqrt(np.ceil(10_000 / 128)))


def hopper_case(*args: Any, **options: Any) -> Case:
    return make_case(*args, generation="sm90", **options)


def forward_results(case: Case) -> tuple[Array, Array]:
    """What the forward would give the backward: the results of the reference, rounded."""
    reference = case.reference()
    out = np.ascontiguousarray(to_storage(reference.out.value, case.dtype))
    return out, np.ascontiguousarray(reference.lse.value, np.float32)


def check(case: Case, generation: str = "sm90") -> dict[str, Array]:
    """Runs the backward and compares every gradient with the reference."""
    reference = case.reference()
    gradients = case.backward(*forward_results(case))
    expected = reference.backward(from_storage(case.grad_out, case.dtype), case.grad_lse)
    assert set(gradients) == set(case.wanted)
    for name, gradient in gradients.items():
        computed = gradient if name == "q_freqs" else from_storage(gradient, case.dtype)
        expected[name].check(computed, f"grad_{name}")
    passes = [name for name, _, _ in case.run.launches if "backward" in name]
    assert passes and all(name.startswith("sm90_") == (generation == "sm90") for name in passes), passes
    return gradients


@pytest.mark.parametrize("head_dim", [48, 96, 128])
def test_rotated_queries_heads_batch_and_mask(head_dim: int) -> None:
    check(hopper_case(batch=2, heads=3, head_dim=head_dim, freqs_batch=2, keep=0.5))


@pytest.mark.parametrize("freqs_batch", [1, 2])
def test_gradient_of_factors_without_that_of_queries(freqs_batch: int) -> None:
    case = hopper_case("float16", batch=2, n_queries=90, n_keys=70, heads=2, head_dim=32, freqs_batch=freqs_batch,
                       table=[((0, 80), [(0, 70)])])  # fmt: skip
    case.wanted = ("k", "q_freqs")
    check(case)


@pytest.mark.parametrize("wanted", [("k",), ("v",), ("k", "v"), ("q", "k"), ("q", "v")])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_only_wanted_gradients_are_computed(wanted: tuple[str, ...], head_dim: int) -> None:
    case = hopper_case(head_dim=head_dim, freqs_batch=1)
    case.wanted = wanted
    check(case)
    launched = {name.rsplit("_bfloat16", 1)[0] for name, _, _ in case.run.launches}
    assert ("sm90_backward" in launched) == ("sm90_query_gradient" in launched) == ("q" in wanted)
    assert ("sm90_backward_key" in launched) == ("q" not in wanted)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("freqs_batch", "units"), [(0, 2), (1, 3)])
def test_error_is_that_of_rounding(head_dim: int, freqs_batch: int, units: int) -> None:
    """The bounds allow errors to add up; on random data they cancel, so the mean square says more.

    A rotation rounds the queries once more.
    """
    dtype = "float16"
    case = hopper_case(dtype, n_queries=200, n_keys=320, head_dim=head_dim, freqs_batch=freqs_batch,
                       table=[((0, 200), [(0, 320)])])  # fmt: skip
    gradients = check(case)
    expected = case.reference().backward(from_storage(case.grad_out, dtype), case.grad_lse)
    for name, gradient in gradients.items():
        error = from_storage(gradient, dtype) - expected[name].value
        relative = math.sqrt((error**2).mean() / (expected[name].value ** 2).mean())
        assert relative < units * unit_roundoff(dtype), f"{name}: {relative / unit_roundoff(dtype):.2f} units"


def test_views_into_a_packed_projection_are_read_in_place() -> None:
    rng = np.random.default_rng(1)
    packed = to_storage(rng.normal(size=(2, 80, 3, 2, 64)), "bfloat16")
    case = hopper_case(batch=2, n_queries=80, n_keys=80, heads=2, table=[((0, 80), [(0, 37), (41, 80)])])
    case.q, case.k, case.v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    # (B, H, N, D) in memory
    case.grad_out = np.ascontiguousarray(case.grad_out.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    check(case)


def test_broadcast_views() -> None:
    case = hopper_case(batch=2, n_queries=70, n_keys=40, heads=2, table=[((0, 70), [(0, 40)])])
    case.k = np.broadcast_to(case.k[:1, :, :1], case.k.shape)
    case.v = np.broadcast_to(case.v[:1], case.v.shape)
    case.grad_out = np.broadcast_to(case.grad_out[:, :, :1], case.grad_out.shape)
    check(case)


def test_what_does_not_fit_runs_on_the_earlier_kernels() -> None:
    only_queries = hopper_case()
    only_queries.wanted = ("q",)
    check(only_queries, "sm80")
    check(hopper_case("float32"), "sm80")
    check(hopper_case(head_dim=256, n_queries=40, n_keys=30, table=[((0, 40), [(0, 30)])]), "sm80")
    short_groups = [((8 * i, 8 * i + 8), [(0, 8 * i + 8)]) for i in range(10)]
    check(hopper_case(n_queries=80, n_keys=80, table=short_groups), "sm80")
    unaligned = hopper_case(n_queries=40, n_keys=30, table=[((0, 40), [(0, 30)])])
    unaligned.k = np.concatenate([unaligned.k, unaligned.k[..., :4]], axis=-1)[..., :64]
    check(unaligned, "sm80")
    still_queries = hopper_case(batch=1, n_queries=40, n_keys=30, table=[((0, 40), [(0, 30)])])
    still_queries.grad_out = np.broadcast_to(still_queries.grad_out[:, :1], still_queries.grad_out.shape)
    check(still_queries, "sm80")


@pytest.mark.parametrize(("head_dim", "multiprocessors"), [(48, 1), (64, 132), (96, 1)])
def test_masked_and_unread_tokens_reach_nothing(head_dim: int, multiprocessors: int) -> None:
    """NaN in keys that are masked or in no range, and in queries in no range, changes no bit."""
    table = [((5, 130), [(10, 130), (140, 290)]), ((140, 170), [(150, 420)])]
    case = hopper_case(batch=2, n_queries=200, n_keys=430, heads=2, head_dim=head_dim, table=table)
    case.run = KernelRun(generation="sm90", multiprocessors=multiprocessors)
    mask = np.random.default_rng(0).uniform(size=(2, 430)) < 0.5
    mask[0, 64:200] = False  # whole tiles
    mask[1] = False  # a batch element without any key
    case.key_mask = mask
    gradients = check(case)
    assert not any(gradient[1].any() for gradient in gradients.values())
    out, lse = forward_results(case)
    gone = ~mask
    gone[:, :10] = gone[:, 130:140] = gone[:, 420:] = True
    case.k, case.v, case.q, case.grad_out = case.k.copy(), case.v.copy(), case.q.copy(), case.grad_out.copy()
    case.k[gone] = case.v[gone] = nan_storage("bfloat16")
    for rows in (slice(0, 5), slice(130, 140), slice(170, 200)):
        case.q[:, rows] = case.grad_out[:, rows] = nan_storage("bfloat16")
    for name, gradient in case.backward(out, lse).items():
        np.testing.assert_array_equal(gradient, gradients[name], err_msg=name)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 3.0])
def test_scales(scale: float) -> None:
    case = hopper_case(n_queries=80, n_keys=70, table=[((0, 80), [(0, 70)])])
    case.scale = scale
    check(case)


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128)])
def test_few_keys_are_split_over_queries(dtype: str, head_dim: int) -> None:
    """The splits of a key tile add up in order whatever the order in which blocks run."""
    case = hopper_case(dtype, n_queries=3200, n_keys=40, heads=1, head_dim=head_dim, keep=0.8,
                       table=[((0, 2200), [(0, 40)]), ((2250, 3200), [(0, 20)])])  # fmt: skip
    runs = []
    for seed, concurrent_blocks in ((0, 1), (1, 8)):
        case.run = KernelRun(seed=seed, concurrent_blocks=concurrent_blocks, generation="sm90")
        runs.append(check(case))
    (grid,) = [grid for name, grid, _ in case.run.launches if "backward" in name]
    assert grid > 2
    for name in case.wanted:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


@pytest.mark.parametrize(("head_dim", "multiprocessors"), [(64, 1), (64, 132), (128, 1), (96, 132)])
def test_bits_do_not_depend_on_the_order_of_blocks(head_dim: int, multiprocessors: int) -> None:
    """Many tiles of keys add to the same tiles of queries, one block at a time or all at once, warps in any order.

    On one multiprocessor they have one sum, on many each its own.
    """
    case = hopper_case(batch=2, n_queries=300, n_keys=700, heads=1, head_dim=head_dim,
                       table=[((0, 200), [(0, 400), (0, 200)]), ((200, 300), [(0, 700)])])  # fmt: skip
    expected = None
    for seed, concurrent_blocks in enumerate((1, 2, 3, 5, 16)):
        case.run = KernelRun(
            seed=seed, concurrent_blocks=concurrent_blocks, generation="sm90", multiprocessors=multiprocessors
        )
        gradients = check(case)
        expected = expected or gradients
        for name in case.wanted:
            np.testing.assert_array_equal(gradients[name], expected[name], err_msg=name)


def test_large_table_travels_through_device_memory() -> None:
    table = [((70 * i, 70 * i + 69), [(2 * i, 2 * i + 1), (2 * i + 1, 2 * i + 2)][: i % 3]) for i in range(150)]
    case = hopper_case(n_queries=10500, n_keys=300, table=table, head_dim=32)
    check(case)
    assert any(name == "upload" for name, _, _ in case.run.launches)


def test_element_offsets_beyond_32_bits() -> None:
    """Tokens 2^26 elements apart; only the touched pages of the address range are ever memory."""
    case = hopper_case("float16", n_queries=70, n_keys=40, head_dim=32, table=[((0, 70), [(0, 40)])])

    def spread(x: Array) -> Array:
        step = 1 << 26
        base = np.empty((x.shape[1] - 1) * step + 32, x.dtype)
        view = np.lib.stride_tricks.as_strided(base, x.shape, (0, step * x.itemsize, 0, x.itemsize))
        view[...] = x
        return view

    case.q, case.k = spread(case.q), spread(case.k)
    check(case)


def test_products_are_those_of_the_tiles() -> None:
    """Two ranges of 128 keys out of 320 cost 256 keys: five products per score, four without the queries' gradient."""
    for wanted, n_products in ((("q", "k", "v"), 5), (("k", "v"), 4)):
        case = hopper_case(n_queries=256, n_keys=320, table=[((0, 256), [(0, 128), (192, 320)])])
        case.wanted = wanted
        check(case)
        (counters,) = [counters for name, _, counters in case.run.launches if "backward" in name]
        shapes = {tuple(map(int, re.findall(r"\d+", shape)[:3])): n for shape, n in counters.tensor_core().items()}
        assert sum(math.prod(shape) * n for shape, n in shapes.items()) == n_products * 256 * 256 * 64


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiler_spills_and_serialises_nothing(dtype: str, head_dim: int) -> None:
    report = compiler_report(f"sm90_backward_{dtype}_{head_dim}")
    # C7510 to C7520 say that products are serialised or waits inserted.
    assert "(C75" not in report, report
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report) == [("0", "0")] * 3, report


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_has_no_bank_conflicts(head_dim: int) -> None:
    case = hopper_case(n_queries=200, n_keys=128, head_dim=head_dim, table=[((0, 200), [(0, 128)])])
    check(case)
    for name, _, counters in case.run.launches:
        for operation, counts in counters.shared_memory().items():
            assert counts["conflicts"] == 0, (name, operation, counts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_table(seed: int) -> None:
    """Ranges that overlap, repeat and end anywhere, masked keys, blocks in any order."""
    rng = np.random.default_rng(seed)
    n_groups = int(rng.integers(2, 5))
    bounds = [int(bound) for bound in np.cumsum(rng.integers(64, 200, 2 * n_groups))]
    table = []
    for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
        keys = np.sort(rng.integers(0, 501, (rng.integers(1, 4), 2)), axis=1).tolist()
        table.append(((begin, end), [(first, last) for first, last in keys for _ in range(int(rng.integers(1, 3)))]))
    case = hopper_case(
        batch=int(rng.integers(1, 3)), n_queries=bounds[-1] + 10, n_keys=500, heads=int(rng.integers(1, 3)),
        head_dim=int(rng.choice(HEAD_DIMS)), table=table, keep=float(rng.choice([0.3, 1.0])),
        freqs_batch=int(rng.integers(0, 2)), seed=seed,
    )  # fmt: skip
    case.run = KernelRun(
        seed=seed, concurrent_blocks=int(rng.integers(1, 6)), multiprocessors=int(rng.choice([1, 132])),
        generation="sm90",
    )  # fmt: skip
    check(case)
