"""Launch plans and schedules of the CUDA kernels, as data: nothing is executed."""

from __future__ import annotations

import struct
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from tools.cuda_plans import plans
from tools.cuda_plans.build import inputs, source_file

_PRECISIONS = {"bfloat16": 0, "float16": 1, "tf32": 2, "tf32x3": 3}
_ALIGNED = 1 << 20  # an address that nobody follows
_INLINE_WORDS = 448
_GROUP_WORDS = 6
_UPLOAD_WORDS = 8000


def make_fields(table: list[tuple[tuple[int, int], list[tuple[int, int]]]], **changes: Any) -> dict[str, Any]:
    """Arguments of the planning functions, with addresses that are only aligned."""
    fields: dict[str, Any] = {name: _ALIGNED for name in ("q", "k", "v", "out", "lse", "grad_out")}
    fields |= {f"grad_{name}": _ALIGNED for name in ("q", "k", "v")}
    fields |= {"dtype": "bfloat16", "batch": 1, "n_queries": 1, "n_keys": 1, "heads": 1, "head_dim": 64, "scale": 0.125}
    fields |= {
        "q_ranges": [bound for rows, _ in table for bound in rows],
        "k_offsets": np.cumsum([0] + [len(keys) for _, keys in table]).tolist(),
        "k_ranges": [bound for _, keys in table for key_range in keys for bound in key_range],
    }
    return fields | changes


def with_strides(fields: dict[str, Any]) -> dict[str, Any]:
    """Of contiguous tensors: the kernels of Hopper take what a tensor map can address."""
    heads, width = fields["heads"], fields["head_dim"]
    kv_heads, value_dim = fields.get("kv_heads", heads), fields.get("value_dim", width)

    def strides(tokens: int, heads: int, width: int) -> tuple[int, int, int]:
        return tokens * heads * width, heads * width, width

    return fields | {
        "q_strides": strides(fields["n_queries"], heads, width),
        "k_strides": strides(fields["n_keys"], kv_heads, width),
        "v_strides": strides(fields["n_keys"], kv_heads, value_dim),
        "grad_out_strides": strides(fields["n_queries"], heads, value_dim),
    }


def schedule_of(plan: Any, launch: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, int]], int, int]:
    """Groups (with the closing one), ranges, number of items and of accumulators that a launch carries."""
    view = launch.params[-(8 + 12 + 4 + 4 * _INLINE_WORDS) :]
    device_words, n_groups, n_items, n_accumulators = struct.unpack_from("<Qiii", view)
    uploads = [upload for upload in plan.launches if upload.name == "upload"]
    if device_words:
        words: list[int] = []
        for upload in uploads:
            destination, n_words = struct.unpack_from("<Qi", upload.params)
            if device_words + 4 * len(words) == destination:
                words += struct.unpack_from(f"<{n_words}i", upload.params, 12)
    else:
        words = list(struct.unpack_from(f"<{_INLINE_WORDS}i", view, 20))
    groups = [tuple(words[_GROUP_WORDS * g : _GROUP_WORDS * (g + 1)]) for g in range(n_groups + 1)]
    first = _GROUP_WORDS * (n_groups + 1)
    n_ranges = groups[-1][3]
    ranges = [(words[first + 2 * r], words[first + 2 * r + 1]) for r in range(n_ranges)]
    return groups, ranges, n_items, n_accumulators


def launch_named(plan: Any, prefix: str) -> Any:
    (launch,) = [launch for launch in plan.launches if launch.name.startswith(prefix)]
    return launch


def random_table(rng: np.random.Generator, n_queries: int, n_keys: int, n_groups: int) -> Any:
    bounds = np.sort(rng.choice(n_queries + 1, 2 * n_groups, replace=False)).reshape(-1, 2)
    table = []
    for begin, end in bounds.tolist():
        keys = np.sort(rng.integers(0, n_keys + 1, (rng.integers(0, 4), 2)), axis=1)
        table.append(((begin, end), [tuple(key_range) for key_range in keys.tolist()]))
    return table


@pytest.mark.parametrize("seed", range(20))
def test_items_cover_every_query_once_with_its_ranges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_queries, n_keys = 4000, 3000
    table = random_table(rng, n_queries, n_keys, int(rng.integers(1, 300)))
    fields = make_fields(table, n_queries=n_queries, n_keys=n_keys, batch=3, heads=2)
    plan = plans().plan_attention_forward(fields)
    plan = plans().plan_attention_forward(fields | {"workspace": _ALIGNED}) if plan.workspace_bytes else plan
    launch = launch_named(plan, "forward")
    groups, ranges, n_items, n_accumulators = schedule_of(plan, launch)
    assert launch.grid == 3 * 2 * n_items
    read = np.zeros((n_queries, n_keys), np.int64)
    written = np.zeros(n_queries, np.int64)
    for group, following in pairwise(groups):
        first_item, begin, end, first_range, n_splits, first_accumulator = group
        tiles = -(-(end - begin) // 128)
        assert following[0] - first_item == tiles * n_splits
        assert following[5] - first_accumulator == (tiles * n_splits if n_splits > 1 else 0)
        written[begin:end] += 1
        for k_begin, k_end in ranges[first_range : following[3]]:
            read[begin:end, k_begin:k_end] += 1
    assert (written == 1).all() and n_accumulators == groups[-1][5]
    expected = np.zeros_like(read)
    for (begin, end), keys in table:
        for k_begin, k_end in keys:
            expected[begin:end, k_begin:k_end] += 1
    np.testing.assert_array_equal(read, expected)


def test_longest_items_come_first_and_rows_without_keys_last() -> None:
    table = [((0, 100), [(0, 64)]), ((100, 200), [(0, 6400)]), ((300, 400), [(0, 640)])]
    plan = plans().plan_attention_forward(make_fields(table, n_queries=500, n_keys=6400))
    groups = schedule_of(plan, launch_named(plan, "forward"))[0]
    assert [(begin, end) for _, begin, end, *_ in groups[:-1]] == [
        (100, 200),
        (300, 400),
        (0, 100),
        (200, 300),
        (400, 500),
    ]


@pytest.mark.parametrize(("n_queries", "n_keys", "heads"), [(131072, 512, 3), (4096, 64, 1), (20_000, 16, 1)])
def test_few_keys_fill_the_device(n_queries: int, n_keys: int, heads: int) -> None:
    """Enough items for every multiprocessor, or as many splits as the order of their turns is worth."""
    multiprocessors = 132
    fields = make_fields([((0, n_queries), [(0, n_keys)])], n_queries=n_queries, n_keys=n_keys, heads=heads,
                         multiprocessors=multiprocessors, workspace=_ALIGNED)  # fmt: skip
    plan = plans().plan_attention_backward(fields)
    launch = launch_named(plan, "backward_key")
    groups, _, n_items, n_accumulators = schedule_of(plan, launch)
    n_tiles, column_tiles, n_splits = -(-n_keys // 128), -(-n_queries // 64), groups[0][4]
    assert n_accumulators == n_tiles and n_items == n_tiles * n_splits
    assert n_splits**2 <= column_tiles
    assert launch.grid >= 2 * multiprocessors or (n_splits + 1) ** 2 > column_tiles or column_tiles / n_splits <= 9


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 40])
def test_few_queries_of_many_keys_fill_the_device(generation: str, heads: int) -> None:
    """64 queries × 10⁶ keys: at least nine tenths of what the multiprocessors could do until the last block ends."""
    multiprocessors, n_keys = 132, 1_000_000
    columns = 64 if generation == "sm80" else 128
    fields = make_fields([((0, 64), [(0, n_keys)])], n_queries=64, n_keys=n_keys, heads=heads, generation=generation,
                         multiprocessors=multiprocessors, workspace=_ALIGNED)  # fmt: skip
    plan = plans().plan_attention_forward(with_strides(fields))
    forward, merge = plan.launches
    assert forward.name == ("sm90_" if generation == "sm90" else "") + "forward_bfloat16_64"
    groups, _, n_items, n_accumulators = schedule_of(plan, merge)
    n_splits, tiles = groups[0][4], -(-n_keys // columns)
    assert n_items == n_splits == n_accumulators and merge.grid == heads * n_items
    assert forward.grid == (heads * n_items if generation == "sm80" else min(heads * n_items, multiprocessors))
    waves, longest = -(-heads * n_items // multiprocessors), -(-tiles // n_splits)
    assert heads * tiles >= 0.9 * multiprocessors * waves * longest
    # Partial results of four waves of two blocks for each multiprocessor, whatever the number of keys.
    assert plan.workspace_bytes <= 4 * 2 * multiprocessors * 192 * (64 + 2) * 4 + 512


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
def test_one_group_of_many_keys_among_short_ones_is_split(generation: str) -> None:
    table = [((0, 64), [(0, 500_000)]), *(((64 * i, 64 * i + 64), [(0, 1000)]) for i in range(1, 300))]
    fields = make_fields(table, n_queries=64 * 300, n_keys=500_000, generation=generation, workspace=_ALIGNED)
    plan = plans().plan_attention_forward(with_strides(fields))
    groups, _, _, n_accumulators = schedule_of(plan, launch_named(plan, "merge"))
    splits = {(begin, end): n_splits for _, begin, end, _, n_splits, _ in groups[:-1]}
    assert splits.pop((0, 64)) == n_accumulators > 30
    assert set(splits.values()) == {1}


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(132 * 2 * 192, 100_000), (64, 400), (64, 0)])
def test_keys_are_not_split_without_need(generation: str, n_queries: int, n_keys: int) -> None:
    fields = make_fields([((0, n_queries), [(0, n_keys)])], n_queries=n_queries, n_keys=n_keys, generation=generation)
    (launch,) = plans().plan_attention_forward(with_strides(fields)).launches
    assert "forward" in launch.name


def test_many_keys_are_not_split() -> None:
    fields = make_fields([((0, 32768), [(0, 32768)])], n_queries=32768, n_keys=32768, heads=3)
    plan = plans().plan_attention_backward(fields | {"workspace": _ALIGNED})
    assert schedule_of(plan, launch_named(plan, "backward_key"))[3] == 0


def test_grouped_heads_have_one_item_for_the_keys_that_they_share() -> None:
    for generation, name in (("sm80", "backward_key"), ("sm90", "sm90_backward")):
        fields = make_fields(
            [((0, 4096), [(0, 131072)])], n_queries=4096, n_keys=131072, heads=12, generation=generation
        )
        for kv_heads in (12, 4, 1):
            plan = plans().plan_attention_backward(with_strides(fields | {"kv_heads": kv_heads}))
            assert launch_named(plan, name).grid == kv_heads * 1024


@pytest.mark.parametrize("head_dim", [64, 256])
def test_memory_is_at_most_one_accumulator_per_gradient(head_dim: int) -> None:
    batch, n_queries, n_keys, heads = 2, 40_000, 256, 3
    fields = make_fields([((0, n_queries), [(0, n_keys)])], batch=batch, n_queries=n_queries, n_keys=n_keys,
                         heads=heads, head_dim=head_dim, q_freqs=_ALIGNED)  # fmt: skip
    accumulators = 2 * 4 * batch * n_keys * heads * head_dim
    statistics = 8 * batch * heads * n_queries
    plan = plans().plan_attention_backward(fields)
    assert plan.workspace_bytes < accumulators + statistics + (1 << 16)
    assert plans().plan_attention_forward(fields).workspace_bytes == 0


def test_grid_beyond_two_dimensions_of_blocks() -> None:
    fields = make_fields([((0, 1 << 24), [(0, 64)])], n_queries=1 << 24, n_keys=64, heads=8)
    assert launch_named(plans().plan_attention_forward(fields), "forward").grid == (1 << 24) // 128 * 8
    with pytest.raises(ValueError, match="blocks, more than"):
        plans().plan_attention_forward(fields | {"batch": 1 << 12})


def test_uploads_carry_a_large_table() -> None:
    table = [((2 * i, 2 * i + 1), [(i, i + 1), (i + 2, i + 3)]) for i in range(5000)]
    fields = make_fields(table, n_queries=10_000, n_keys=6000)
    workspace_bytes = plans().plan_attention_forward(fields).workspace_bytes
    plan = plans().plan_attention_forward(fields | {"workspace": _ALIGNED})
    uploads = [launch for launch in plan.launches if launch.name == "upload"]
    n_words = _GROUP_WORDS * (2 * 5000 + 1) + 4 * 5000
    assert len(uploads) == -(-n_words // _UPLOAD_WORDS)
    assert n_words * 4 <= workspace_bytes < n_words * 4 + 256
    assert all(len(launch.params) < 32764 for launch in plan.launches)


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("kernel_pass", range(3))
def test_shared_memory_fits_the_smallest_architecture(precision: str, kernel_pass: int) -> None:
    for head_dim in (32, 48, 64, 96, 128, 256):
        assert 0 < plans().shared_bytes(kernel_pass, _PRECISIONS[precision], head_dim) <= 99 * 1024


def test_plans_do_not_depend_on_anything_else() -> None:
    fields = make_fields([((0, 3000), [(0, 100)])], n_queries=3000, n_keys=100, workspace=_ALIGNED)
    first, second = (plans().plan_attention_backward(fields) for _ in range(2))
    assert [launch.params for launch in first.launches] == [launch.params for launch in second.launches]


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
def test_remembered_schedules_are_those_of_their_tables(generation: str) -> None:
    """Tables and sizes that differ in one number, more than are remembered and larger than are, in turns."""
    keys = [[(0, 700)], [(0, 699)], [(1, 700)], [(0, 100), (200, 700)]]
    calls: list[dict[str, Any]] = [
        {"table": [((0, end), own), ((1000, 1200), [(0, 50)])]} for own in keys for end in (900, 901)
    ]
    grouped = {"heads": 6, "kv_heads": 3}
    for sizes in ({}, {"n_keys": 701}, {"heads": 6}, grouped, {"multiprocessors": 1}, {"head_dim": 96}):
        calls.append({"table": [((0, 1200), [(0, 700)])], **sizes})
    calls.append({"table": [((0, 1200), [(i, i + 1) for i in range(0, 1200, 2)])], "n_keys": 1200})
    calls.append({"table": []})

    def planned(call: dict[str, Any]) -> list[Any]:
        fields = {"n_queries": 1200, "n_keys": 700, "heads": 3, "generation": generation} | call
        plan = plans().plan_attention_backward(with_strides(make_fields(**fields)))
        return [plan.workspace_bytes, *((launch.name, launch.grid, launch.params) for launch in plan.launches)]

    first = [planned(call) for call in calls]
    assert all(a != b for a, b in combinations(first, 2))
    for i in np.random.default_rng(0).integers(0, len(calls), 60):
        assert planned(calls[i]) == first[i]
    assert [planned(call) for call in reversed(calls)] == first[::-1]


@pytest.mark.parametrize("generation", ["sm80", "sm90"])
@pytest.mark.parametrize("seed", range(6))
def test_a_plan_may_get_its_workspace_later(generation: str, seed: int) -> None:
    """It then says what a plan says that was made with it, to the bit."""
    rng = np.random.default_rng(seed)
    n_queries, n_keys = 30_000, 4000
    table = random_table(rng, n_queries, n_keys, int(rng.choice([3, 40, 4000])))
    more = {"q_freqs": _ALIGNED} if seed % 2 else {}
    # All ones, as a float a NaN, and the smallest numbers: what could be taken for the mark of a missing workspace.
    scale = [-0.125, float("nan"), -float("nan"), -1e-45, 0.0, -3e38][seed]
    gradients = {"grad_q": 0} if seed % 3 == 0 else {"grad_q_freqs": 7 * _ALIGNED} if more else {}
    head_dim = [32, 48, 64, 96, 128, 256][seed]
    sizes = {"n_queries": n_queries, "n_keys": n_keys, "batch": 2, "heads": 3, "head_dim": head_dim}
    fields = make_fields(table, generation=generation, scale=scale, **(sizes | more | gradients))
    for workspace in (_ALIGNED, 0x7F12_3456_7800, 0):
        for make in (plans().plan_attention_forward, plans().plan_attention_backward):
            at_once = make(fields | {"workspace": workspace})
            later = make(fields | {"workspace": workspace, "placed_later": True})
            assert at_once.workspace_bytes == later.workspace_bytes
            assert len(at_once.launches) == len(later.launches)
            for one, other in zip(at_once.launches, later.launches, strict=True):
                assert one.params == other.params
                assert one.tensor_maps == other.tensor_maps


@pytest.mark.parametrize("head_dim", [0, 4, 12, 63, 264])
def test_unsupported_head_dim(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8 between 8 and 256 on CUDA, got {head_dim}"):
        plans().plan_attention_forward(make_fields([], head_dim=head_dim))
    values = f"the head_dim of v must be a multiple of 8 between 8 and 256 on CUDA, got {head_dim}"
    for make in (plans().plan_attention_forward, plans().plan_attention_backward):
        for generation in ("sm80", "sm90"):
            with pytest.raises(ValueError, match=values):
                make(make_fields([], value_dim=head_dim, generation=generation))


def test_other_unsupported_arguments() -> None:
    with pytest.raises(ValueError, match="float64 is not supported on CUDA"):
        plans().plan_attention_forward(make_fields([], dtype="float64"))
    with pytest.raises(ValueError, match="grad_k must be 16-byte aligned"):
        plans().plan_attention_backward(make_fields([], grad_k=_ALIGNED + 8))
    with pytest.raises(ValueError, match="grad_q_freqs is asked for without q_freqs"):
        plans().plan_attention_backward(make_fields([], grad_q_freqs=_ALIGNED))


def test_what_a_change_compiles_again() -> None:
    """The files that an instantiation includes, and no others: not those of the other generation, nor the host's."""
    for name, other in (("attention_bfloat16_64", "sm90"), ("sm90_backward_bfloat16_64", "sm80")):
        read = [path.as_posix() for path in inputs([source_file(name)])]
        assert any(path.endswith("csrc/params.h") for path in read)
        assert any(path.endswith("primitives/exp2.cuh") for path in read)
        assert not any(f"/{other}/" in path or "/host/" in path or "/cpu/" in path for path in read)
