"""What is particular to the sm_90 forward, on the emulator: its choice, its pipeline, its stores.

Correctness over inputs is shared with the sm_80 kernels: the cases of test_cuda_kernels.py run on both.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tools.cuda_plans import KernelRun, plans
from tools.cuda_plans.build import compiler_report
from tools.cuda_plans.run import Array, Table, from_storage
from tools.cuda_resources import RESULTS, counted

from tests.cuda.kernel_cases import Case, make_case, nan_storage
from tests.cuda.test_cuda_plans import make_fields

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

HEAD_DIMS = [32, 48, 64, 96, 128]
# Tiles of rows of which some warpgroups have none, groups without keys between longer ones, ranges of a few keys.
UNEVEN: Table = [((0, 500), [(3, 290)]), ((500, 501), [(0, 300)]), ((510, 640), [(7, 9), (20, 150)]), ((640, 700), [])]


def launched(case: Case) -> list[str]:
    return [name for name, _, _ in case.run.launches]


@pytest.mark.parametrize(
    ("head_dim", "multiprocessors"), [(32, 2), (48, 2), (64, 1), (64, 2), (64, 5), (96, 2), (128, 2)]
)
def test_blocks_take_several_items(head_dim: int, multiprocessors: int) -> None:
    """One pipeline serves one item after another, whole and partial tiles of queries in turn."""
    case = make_case(n_queries=720, n_keys=300, heads=2, head_dim=head_dim, table=UNEVEN, generation="sm90")
    case.run = KernelRun(generation="sm90", multiprocessors=multiprocessors, concurrent_blocks=multiprocessors)
    case.check_forward()
    assert [grid for _, grid, _ in case.run.launches] == [multiprocessors]


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_items_whose_keys_are_all_masked_between_others(multiprocessors: int) -> None:
    case = make_case(batch=3, n_queries=330, n_keys=300, table=[((0, 200), [(0, 300)]), ((200, 330), [(0, 100)])],
                     keep=0.4, generation="sm90")  # fmt: skip
    assert case.key_mask is not None
    case.key_mask[1] = False
    case.key_mask[2, :128] = False
    case.run = KernelRun(generation="sm90", multiprocessors=multiprocessors, concurrent_blocks=2)
    out, lse = case.check_forward()
    assert not out[1].any() and not out[2, 200:].any() and np.isneginf(lse[2, 0, 200:]).all()


# Warps of a block: keys, values and zeroing, a fourth that does nothing, then four of each consumer.
LATE_WARPS = {
    "nobody": (), "keys": (0,), "values": (1,), "zeroing": (2,), "loads": (0, 1, 2), "one consumer": (9,),
    "first consumers": (4, 5, 6, 7), "last consumers": (12, 13, 14, 15),
}  # fmt: skip


@pytest.mark.parametrize("late", LATE_WARPS)
def test_items_without_keys_in_a_row(late: str) -> None:
    """However late a warp is, the others wait for it: more items than the ring has rounds, before and after keys."""
    table: Table = [((0, 1400), []), ((1400, 1500), [(0, 200)]), ((1500, 3300), []), ((3300, 3500), [(3, 290)])]
    for seed in range(2):
        case = make_case(n_queries=3500, n_keys=300, table=table, generation="sm90")
        case.run = KernelRun(generation="sm90", multiprocessors=1, seed=seed, reluctant_warps=LATE_WARPS[late])
        out, lse = case.check_forward()
        assert not out[0, :1400].any() and np.isneginf(lse[0, 0, 1500:3300]).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_next_queries_are_loaded_under_the_last_product(head_dim: int) -> None:
    """With the factors that rotate them, and those of all items of a block but its first."""
    items, rows = 4, 192 if head_dim == 64 else 128
    case = make_case(n_queries=items * rows, n_keys=300, head_dim=head_dim, table=[((0, items * rows), [(0, 300)])],
                     freqs_batch=1, generation="sm90")  # fmt: skip
    case.run = KernelRun(generation="sm90", multiprocessors=1)
    case.check_forward()
    ((_, _, counters),) = case.run.launches
    loads = {True: 0, False: 0}
    under_product = False
    for instruction in counters.instructions():
        if instruction.operation.startswith("wgmma.commit_group"):
            under_product = True
        elif instruction.operation.startswith("wgmma.wait_group"):
            under_product = False
        elif instruction.operation.startswith(("ld.global.v2", "ld.global.v4")):
            loads[under_product] += instruction.warps
    # Of eight channels, one load of queries and four of factors.
    of_an_item = rows * (head_dim // 8) * (1 + 4) // 32
    assert loads == {True: (items - 1) * of_an_item, False: of_an_item}


@pytest.mark.parametrize("late", ["nobody", "keys", "values", "one consumer", "first consumers", "last consumers"])
def test_rotated_queries_of_several_items(late: str) -> None:
    """Queries that are loaded ahead are those of the next item: of its rows, its head and its batch element."""
    case = make_case(batch=2, n_queries=720, n_keys=300, heads=2, kv_heads=1, value_dim=40, table=UNEVEN,
                     freqs_batch=2, generation="sm90")  # fmt: skip
    case.run = KernelRun(generation="sm90", multiprocessors=1, seed=1, reluctant_warps=LATE_WARPS[late])
    case.check_forward()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_splits_and_whole_items_in_turn(head_dim: int) -> None:
    """Blocks of which some items leave partial results, of whole and of short tiles."""
    table: Table = [((0, 100), [(0, 3000)])] + [((i, i + 20), [(i, i + 100)]) for i in range(100, 220, 20)]
    case = make_case(n_queries=220, n_keys=3000, head_dim=head_dim, table=table, freqs_batch=1, generation="sm90")
    case.run = KernelRun(generation="sm90", multiprocessors=2, concurrent_blocks=2)
    case.check_forward()
    forward, merge = launched(case)
    assert forward == f"sm90_forward_bfloat16_{head_dim}" and merge.startswith("merge")


def test_bits_do_not_depend_on_the_order_of_warps_and_blocks() -> None:
    results = []
    for seed in range(4):
        case = make_case(n_queries=420, n_keys=400, table=[((0, 420), [(0, 130), (140, 400)])], keep=0.7)
        case.run = KernelRun(generation="sm90", seed=seed, concurrent_blocks=1 + seed, multiprocessors=1 + seed % 3)
        results.append(case.check_forward())
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_masked_tiles_between_whole_ones(head_dim: int) -> None:
    """Whole tiles, tiles with a few keys, and tiles that are passed over; NaN where no key is."""
    case = make_case(n_queries=200, n_keys=1000, head_dim=head_dim, table=[((0, 200), [(0, 1000)])], generation="sm90")
    mask = np.ones((1, 1000), bool)
    mask[0, 130:250] = mask[0, 256:512] = mask[0, 600] = False
    case.key_mask = mask
    case.k, case.v = case.k.copy(), case.v.copy()
    out, lse = case.check_forward()
    case.k[~mask] = case.v[~mask] = nan_storage("bfloat16")
    poisoned_out, poisoned_lse = case.forward()
    np.testing.assert_array_equal(poisoned_out, out)
    np.testing.assert_array_equal(poisoned_lse, lse)


def test_nan_of_a_key_reaches_every_row_that_reads_it() -> None:
    """Whichever unit computes its exponential."""
    for key in range(16):
        case = make_case(n_queries=70, n_keys=100, table=[((0, 64), [(0, 100)]), ((64, 70), [(16, 40)])],
                         generation="sm90")  # fmt: skip
        case.k = case.k.copy()
        case.k[0, key, 0, 5] = nan_storage("bfloat16")
        out, lse = case.forward()
        assert np.isnan(from_storage(out, "bfloat16")[0, :64]).all() and np.isnan(lse[0, 0, :64]).all()
        assert np.isfinite(from_storage(out, "bfloat16")[0, 64:]).all()


def test_infinite_scores() -> None:
    """A row whose scores are all −inf has a sum of zero, as on sm_80."""
    results = []
    for generation in ("sm80", "sm90"):
        case = make_case(n_queries=64, n_keys=128, table=[((0, 64), [(0, 128)])], generation=generation)
        case.q, case.k = case.q.copy(), case.k.copy()
        case.q[0, :, 0, 0] = 0x3F80  # 1
        case.k[0, :, 0, 0] = 0xFF80  # −inf
        results.append(case.forward())
    (expected_out, expected_lse), (out, lse) = results
    np.testing.assert_array_equal(lse, expected_lse)
    np.testing.assert_array_equal(from_storage(out, "bfloat16"), from_storage(expected_out, "bfloat16"))


@pytest.mark.parametrize("head_dim", [40, 64])
def test_queries_of_any_alignment(head_dim: int) -> None:
    """Only keys and values are read by bulk copies."""
    case = make_case(n_queries=70, n_keys=80, heads=2, head_dim=head_dim, table=[((0, 70), [(0, 80)])],
                     generation="sm90")  # fmt: skip
    case.run = KernelRun(generation="sm90", multiprocessors=1)
    base = np.zeros((*case.q.shape[:-1], head_dim + 1), case.q.dtype)
    base[..., 1:] = case.q
    case.q = base[..., 1:]
    case.check_forward()
    assert launched(case) == [f"sm90_forward_bfloat16_{48 if head_dim == 40 else 64}"]


def test_only_the_rows_of_a_group_are_written() -> None:
    """A tile of queries is copied out at once only where a group has all of its rows."""
    table: Table = [((0, 192), [(0, 40)]), ((192, 300), [(40, 90)])]
    case = make_case(n_queries=300, n_keys=90, table=table, generation="sm90")
    case.check_forward()
    ((_, _, counters),) = case.run.launches
    # Three whole warpgroups of the first group, one of the second.
    assert counters.by_operation()["cp.async.bulk.tensor.4d.store"] == 4


def forward_name(**changes: Any) -> str:
    # So few keys that no tile of queries shares its keys out to several items, which a second launch would merge.
    fields = make_fields([((0, 300), [(0, 100)])], n_queries=300, n_keys=300, heads=2, generation="sm90")
    fields |= {f"{name}_strides": (300 * 2 * 64, 128, 64) for name in "qkv"}
    (launch,) = plans().plan_attention_forward(fields | changes).launches
    return str(launch.name)


def test_what_bulk_copies_cannot_address_runs_on_sm80() -> None:
    aligned = int(make_fields([])["k"])
    assert forward_name() == "sm90_forward_bfloat16_64"
    assert forward_name(generation="sm80") == "forward_bfloat16_64"
    assert forward_name(dtype="float32", q_strides=(0, 0, 0)) == "forward_tf32x3_64"
    assert forward_name(head_dim=256) == "forward_bfloat16_256"
    for name in ("k", "v"):
        assert forward_name(**{name: aligned + 8}) == "forward_bfloat16_64"
        for strides in ((1 << 40, 128, 64), (300 * 2 * 64, 129, 64), (300 * 2 * 64, 0, 64), (300 * 2 * 64, 128, 60)):
            # Nothing moves along the one batch element, whatever its stride.
            fits = strides[0] == 1 << 40
            assert forward_name(**{f"{name}_strides": strides}).startswith("sm90") == fits
        broadcast = {f"{name}_strides": (0, 128, 0), "batch": 2}
        assert forward_name(**broadcast).startswith("sm90")
    # Queries are not read by bulk copies.
    assert forward_name(q=aligned + 2, q_strides=(301, 77, 5)) == "sm90_forward_bfloat16_64"


def test_tensor_maps_of_strided_views() -> None:
    fields = make_fields([((0, 300), [(0, 200)])], n_queries=300, n_keys=200, heads=3, batch=2, generation="sm90",
                         head_dim=40, k_strides=(9000, 128, 40), v_strides=(0, 256, 0))  # fmt: skip
    (launch,) = plans().plan_attention_forward(fields).launches
    (_, k), (_, v), (_, out) = launch.tensor_maps
    assert (k["dims"], k["strides"], k["box"]) == ([40, 200, 3, 2], [256, 80, 18000], [64, 128, 1, 1])
    assert (v["dims"][2:], v["strides"][0]) == ([1, 1], 512)
    assert (out["dims"], out["strides"], out["box"]) == ([40, 300, 3, 2], [240, 80, 72000], [64, 64, 1, 1])


def test_choice_of_generation() -> None:
    choose = plans().generation_of
    assert [choose(major, None) for major in (8, 9, 10, 12)] == ["sm80", "sm90", "sm80", "sm80"]
    assert choose(9, "sm80") == choose(8, "sm80") == choose(8, "no48") == "sm80"
    assert choose(9, "no48") == "sm90"
    with pytest.raises(
        ValueError, match='ANCHOR_ATTENTION_CUDA_KERNELS must be "sm80", "no48" or not set, got "hopper"'
    ):
        choose(9, "hopper")


@pytest.mark.parametrize(("head_dim", "value_dim"), [(48, 48), (40, 24)])
def test_the_tile_of_64_stands_in_for_that_of_48(head_dim: int, value_dim: int) -> None:
    case = make_case(head_dim=head_dim, value_dim=value_dim, freqs_batch=1, keep=0.8)
    case.run = KernelRun(generation="sm90", avoid_tile_of_48=True)
    case.check()
    tiles = {name.rsplit("_", 1)[1] for name, _, _ in case.run.launches if name.startswith("sm90")}
    assert tiles == {"64"}, case.run.launches


def test_grid_is_that_of_the_device() -> None:
    fields = make_fields([((0, 1 << 24), [(0, 64)])], n_queries=1 << 24, n_keys=64, heads=8, generation="sm90")
    fields |= {f"{name}_strides": (64, 64, 64) for name in "kv"}
    assert plans().plan_attention_forward(fields).launches[-1].grid == 132
    with pytest.raises(ValueError, match="blocks, more than"):
        plans().plan_attention_forward(fields | {"batch": 1 << 12})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_compiler_spills_and_serialises_nothing(dtype: str, head_dim: int) -> None:
    report = compiler_report(f"sm90_forward_{dtype}_{head_dim}")
    # C7510 to C7520 say that products are serialised or waits inserted.
    assert "(C75" not in report, report
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report


@pytest.mark.parametrize("head_dim", [64, 128])
def test_counts_are_those_of_the_committed_table(head_dim: int) -> None:
    committed = json.loads((RESULTS / "cuda_hopper.json").read_text())
    for name, counts in counted("bfloat16", head_dim, "sm90").items():
        expected = committed[name]["emulated"]
        instructions = counts.pop("warp_instructions")
        assert instructions <= 1.05 * expected.pop("warp_instructions"), name
        assert counts == expected, name


def whole_tile_cost(table: Table, n_keys: int) -> Array:
    case = make_case(n_queries=192, n_keys=n_keys, table=table, generation="sm90")
    case.forward()
    ((_, _, counters),) = case.run.launches
    return np.array([sum(counters.tensor_core().values()), counters.totals()["ex2"]])


def test_ranges_cost_their_tiles() -> None:
    """Two ranges of whole tiles cost what one does; an end inside a tile costs that tile."""
    one, two, partial = (
        whole_tile_cost(table, 1024)
        for table in (
            [((0, 192), [(0, 512)])],
            [((0, 192), [(0, 256), (512, 768)])],
            [((0, 192), [(0, 300), (512, 768)])],
        )
    )
    np.testing.assert_array_equal(one, two)
    assert partial[0] == one[0] * 5 // 4
