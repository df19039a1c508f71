"""The CUDA kernels, executed from their PTX by the emulator, against float64 with element-wise error bounds.

The emulator poisons outputs, workspace and shared memory and reports races, reads of unwritten memory, and accesses
outside of the buffers; a test that passes has none.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from tools.cuda_plans import KernelRun, rope, rope_backward
from tools.cuda_plans.build import ptx_file
from tools.cuda_plans.run import Array, Table, from_storage, to_storage, unit_roundoff
from tools.cuda_resources import RESULTS, counted

from tests.cuda.kernel_cases import Case, make_case, make_freqs, nan_storage
from tests.cuda.kernel_reference import Arithmetic, Bounded, rope_gradients, rotate

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

# (dtype, allow_tf32, generation of kernels)
KERNELS = [
    ("bfloat16", False, "sm80"),
    ("float16", False, "sm80"),
    ("float32", False, "sm80"),
    ("float32", True, "sm80"),
    ("bfloat16", False, "sm90"),
    ("float16", False, "sm90"),
]
# One 16-bit type of every generation, and float32.
KINDS = [("bfloat16", "sm80"), ("float32", "sm80"), ("bfloat16", "sm90")]
GENERATIONS = ["sm80", "sm90"]


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(("dtype", "allow_tf32", "generation"), KERNELS)
def test_native_head_dims(dtype: str, allow_tf32: bool, generation: str, head_dim: int) -> None:
    case = make_case(dtype, head_dim=head_dim, seed=head_dim, generation=generation)
    case.allow_tf32 = allow_tf32
    case.check()


@pytest.mark.parametrize("head_dim", [8, 24, 40, 56, 80, 112, 136, 248])
@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_other_head_dims_run_through_the_next_size_up(dtype: str, generation: str, head_dim: int) -> None:
    table: Table = [((3, 70), [(5, 60)])]
    make_case(dtype, n_queries=70, n_keys=60, head_dim=head_dim, table=table, generation=generation).check()


@pytest.mark.parametrize(("dtype", "allow_tf32", "generation"), KERNELS)
@pytest.mark.parametrize("freqs_batch", [1, 2])
def test_rotated_queries_heads_batch_and_mask(dtype: str, allow_tf32: bool, generation: str, freqs_batch: int) -> None:
    case = make_case(dtype, batch=2, heads=3, freqs_batch=freqs_batch, keep=0.5, generation=generation)
    case.allow_tf32 = allow_tf32
    case.check()


# One of a pair is the larger by a native size or more, or both share one.
@pytest.mark.parametrize(("head_dim", "value_dim"), [(72, 64), (32, 128), (104, 16), (40, 248)])
@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_values_of_another_size(dtype: str, generation: str, head_dim: int, value_dim: int) -> None:
    table: Table = [((3, 90), [(5, 60), (70, 130)])]
    case = make_case(dtype, batch=2, n_queries=100, n_keys=130, heads=2, head_dim=head_dim, value_dim=value_dim,
                     table=table, freqs_batch=1, keep=0.7, generation=generation)  # fmt: skip
    case.check()


@pytest.mark.parametrize("wanted", [("k",), ("v",)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(256, 64), (64, 256)])
def test_one_gradient_of_values_of_another_size(wanted: tuple[str, ...], head_dim: int, value_dim: int) -> None:
    """The widest heads have a kernel for each."""
    case = make_case(head_dim=head_dim, value_dim=value_dim, n_queries=70, n_keys=60, table=[((0, 70), [(0, 60)])])
    case.wanted = wanted
    case.check()


@pytest.mark.parametrize(("heads", "kv_heads", "value_dim"), [(4, 2, 64), (3, 1, 40)])
@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_grouped_heads(dtype: str, generation: str, heads: int, kv_heads: int, value_dim: int) -> None:
    """Repeated ranges, rows of no range, masks, views of packed keys and values."""
    case = make_case(dtype, batch=2, heads=heads, kv_heads=kv_heads, value_dim=value_dim, freqs_batch=2, keep=0.6,
                     generation=generation)  # fmt: skip
    packed = np.concatenate([case.k, case.v], axis=-1)
    case.k, case.v = packed[..., :64], packed[..., 64:]
    case.check()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "generation"),
    [("bfloat16", 64, "sm80"), ("float32", 32, "sm80"), ("float16", 256, "sm80"), ("bfloat16", 64, "sm90"),
     ("float16", 128, "sm90")],
)  # fmt: skip
def test_splits_of_grouped_heads_begin_in_any_head(dtype: str, head_dim: int, generation: str) -> None:
    """Few keys: a tile's queries of three heads are shared out, and add up in one order."""
    n_queries = 600 if generation == "sm80" else 1100
    case = make_case(dtype, batch=2, n_queries=n_queries, n_keys=40, heads=6, kv_heads=2, head_dim=head_dim, keep=0.8,
                     table=[((0, n_queries - 90), [(0, 40)]), ((n_queries - 80, n_queries), [(0, 20)])],
                     generation=generation)  # fmt: skip
    runs = []
    for seed, concurrent_blocks in ((0, 1), (1, 6)):
        case.run = KernelRun(seed=seed, concurrent_blocks=concurrent_blocks, generation=generation)
        runs.append(case.check()[2])
    grids = [grid for name, grid, _ in case.run.launches if "backward_key" in name or "sm90_backward" in name]
    n_tiles = 2 * 2 * 2 * 3  # batch × heads of keys × groups × tiles, at the least keys per tile that any shape has
    assert min(grids) > n_tiles
    for name in case.wanted:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


@pytest.mark.parametrize(("dtype", "generation"), [("float16", "sm80"), ("float32", "sm80"), ("float16", "sm90")])
@pytest.mark.parametrize("freqs_batch", [1, 2])
@pytest.mark.parametrize("wanted", [("q", "k", "v", "q_freqs"), ("q_freqs",)])
def test_gradient_of_factors(dtype: str, generation: str, freqs_batch: int, wanted: tuple[str, ...]) -> None:
    case = make_case(dtype, batch=2, n_queries=90, n_keys=70, heads=2, head_dim=32, freqs_batch=freqs_batch,
                     table=[((0, 80), [(0, 70)])], generation=generation)  # fmt: skip
    case.wanted = wanted
    case.check()


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("k", "v")])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_only_wanted_gradients_are_computed(wanted: tuple[str, ...], head_dim: int) -> None:
    case = make_case(head_dim=head_dim, freqs_batch=1)
    case.wanted = wanted
    case.check()
    launched = [name for name, _, _ in case.run.launches]
    assert any("backward_query" in name for name in launched) == ("q" in wanted)
    assert any("backward_key" in name for name in launched) == bool({"k", "v"} & set(wanted))


@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_error_is_that_of_rounding(dtype: str, generation: str) -> None:
    """The bounds allow errors to add up; on random data they cancel, so the mean square says more.

    An output is rounded once and is a mean of values whose weights were rounded once: two roundings, each with a
    standard deviation of u / √3, of numbers no larger than the root mean square of the result's terms.
    """
    case = make_case(dtype, n_queries=256, n_keys=320, table=[((0, 256), [(0, 320)])], generation=generation)
    reference = case.reference()
    out, _, gradients = case.check()
    expected = reference.backward(from_storage(case.grad_out, dtype), case.grad_lse)
    # Operands of the 3 × tf32 product are kept to 2^-21.
    unit = unit_roundoff(dtype) if dtype != "float32" else 2.0**-21
    values = {"out": out, **gradients}
    for name, bounded in {"out": reference.out, **expected}.items():
        error = from_storage(values[name], dtype) - bounded.value
        relative = math.sqrt((error**2).mean() / (bounded.value**2).mean())
        assert relative < 2 * unit, f"{name}: {relative / unit:.2f} units"


@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_views_into_a_packed_projection_are_read_in_place(dtype: str, generation: str) -> None:
    rng = np.random.default_rng(1)
    packed = to_storage(rng.normal(size=(2, 60, 3, 2, 64)), dtype)
    case = make_case(dtype, batch=2, n_queries=60, n_keys=60, heads=2, table=[((0, 60), [(0, 37), (41, 60)])],
                     generation=generation)  # fmt: skip
    case.q, case.k, case.v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    # (B, H, N, D) in memory
    case.grad_out = np.ascontiguousarray(case.grad_out.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    case.check()


@pytest.mark.parametrize(("dtype", "generation"), KINDS)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_pointers_and_strides_that_are_only_element_aligned(dtype: str, generation: str, head_dim: int) -> None:
    case = make_case(dtype, batch=2, n_queries=50, n_keys=45, heads=2, head_dim=head_dim, freqs_batch=2,
                     table=[((0, 50), [(2, 45)])], generation=generation)  # fmt: skip

    def shifted(x: Array) -> Array:
        base = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
        base[..., 1:-2] = x
        return base[..., 1:-2]

    case.q, case.k, case.v, case.grad_out = map(shifted, (case.q, case.k, case.v, case.grad_out))
    assert case.q.strides[1] % 16 or case.q.ctypes.data % 16
    case.check()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_broadcast_views(generation: str) -> None:
    case = make_case(batch=2, n_queries=40, n_keys=30, heads=2, table=[((0, 40), [(0, 30)])], generation=generation)
    case.k = np.broadcast_to(case.k[:1, :, :1], case.k.shape)
    case.grad_out = np.broadcast_to(case.grad_out[:, :1], case.grad_out.shape)
    case.check()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_without_keys(generation: str) -> None:
    case = make_case(table=[((10, 40), [])], n_queries=50, n_keys=30, generation=generation)
    out, lse, gradients = case.check()
    assert not out.any() and np.isneginf(lse).all()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("batch", "n_queries", "n_keys", "heads"), [(0, 9, 9, 1), (1, 0, 9, 1), (1, 9, 0, 1), (1, 9, 9, 0), (1, 0, 0, 1)]
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_zero_sizes(batch: int, n_queries: int, n_keys: int, heads: int, generation: str) -> None:
    make_case(batch=batch, n_queries=n_queries, n_keys=n_keys, heads=heads, table=[], generation=generation).check()


@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_masked_and_unread_keys_reach_nothing(dtype: str, generation: str) -> None:
    """NaN in keys that are masked, or in no range, changes no bit."""
    case = make_case(dtype, batch=2, n_queries=100, n_keys=300, heads=2, table=[((0, 100), [(10, 130), (140, 290)])],
                     generation=generation)  # fmt: skip
    mask = np.random.default_rng(0).uniform(size=(2, 300)) < 0.5
    mask[0, 64:200] = False  # whole tiles
    mask[1] = False  # a batch element without any key
    case.key_mask = mask
    out, lse, gradients = case.check()
    assert np.isneginf(lse[1]).all() and not out[1].any()
    assert not any(gradient[1].any() for gradient in gradients.values())
    gone = ~mask
    gone[:, :10] = gone[:, 130:140] = gone[:, 290:] = True
    case.k, case.v = case.k.copy(), case.v.copy()
    case.k[gone] = case.v[gone] = nan_storage(dtype)
    poisoned_out, poisoned_lse = case.forward()
    np.testing.assert_array_equal(poisoned_out, out)
    np.testing.assert_array_equal(poisoned_lse, lse)
    for name, gradient in case.backward(out, lse).items():
        np.testing.assert_array_equal(gradient, gradients[name], err_msg=name)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_nan_of_a_query_stays_in_its_row(generation: str) -> None:
    case = make_case(n_queries=40, n_keys=30, table=[((0, 40), [(0, 30)])], generation=generation)
    expected, _ = case.forward()
    case.q = case.q.copy()
    case.q[0, 7, 0, 3] = nan_storage("bfloat16")
    out, lse = case.forward()
    others = np.arange(40) != 7
    np.testing.assert_array_equal(out[:, others], expected[:, others])
    assert np.isnan(from_storage(out, "bfloat16")[0, 7]).all() and np.isnan(lse[0, 0, 7])


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 30.0])
@pytest.mark.parametrize(("dtype", "generation"), [("float32", "sm80"), ("float16", "sm90")])
def test_scales(scale: float, dtype: str, generation: str) -> None:
    case = make_case(dtype, n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])], generation=generation)
    case.scale = scale
    case.check()


@pytest.mark.parametrize(("dtype", "generation"), [("float32", "sm80"), ("float16", "sm90")])
def test_scores_far_from_zero(dtype: str, generation: str) -> None:
    """exp of the scores over- and underflows; exp of their differences does not."""
    case = make_case(dtype, n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])], generation=generation)
    signs = np.sign(np.random.default_rng(0).normal(size=(1, 70, 1, 1)))
    case.k = to_storage(from_storage(case.k, dtype) + 20 * signs, dtype)
    lse = case.reference().lse.value
    assert lse.max() > 80 or lse.min() < -80
    case.check()


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float32", 64), ("float16", 256)])
def test_few_keys_are_split_over_queries(dtype: str, head_dim: int) -> None:
    """The splits of a key tile add up in order whatever the order in which blocks run."""
    case = make_case(dtype, batch=1, n_queries=1300, n_keys=40, heads=2, head_dim=head_dim, keep=0.8,
                     table=[((0, 900), [(0, 40)]), ((950, 1300), [(0, 20)])])  # fmt: skip
    runs = []
    for seed, concurrent_blocks in ((0, 1), (1, 6)):
        case.run = KernelRun(seed=seed, concurrent_blocks=concurrent_blocks)
        runs.append(case.check()[2])
    grids = [grid for name, grid, _ in case.run.launches if "backward_key" in name]
    n_tiles = 2 * 2  # key tiles × heads, at the least number of keys per tile that any shape has
    assert min(grids) > n_tiles
    for name in case.wanted:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


def launched(case: Case) -> set[str]:
    """Kinds of kernels of a case."""
    return {re.sub(r"_(bfloat16|float16|tf32x3|tf32).*", "", name) for name, _, _ in case.run.launches}


@pytest.mark.parametrize(
    ("dtype", "allow_tf32", "generation", "head_dim", "value_dim"),
    [
        *((*kernel, 64, 64) for kernel in KERNELS),
        ("bfloat16", False, "sm80", 48, 40),
        ("bfloat16", False, "sm80", 32, 136),
        ("float16", False, "sm90", 48, 40),
        ("float16", False, "sm90", 72, 128),
    ],
)
def test_few_queries_are_split_over_keys(
    dtype: str, allow_tf32: bool, generation: str, head_dim: int, value_dim: int
) -> None:
    """Splits begin within ranges; of one group there are several, of another none; some rows have no keys."""
    table: Table = [((0, 90), [(5, 700), (710, 1300), (710, 1300)]), ((95, 97), [(0, 40)]), ((97, 99), [])]
    case = make_case(dtype, n_queries=101, n_keys=1310, heads=2, kv_heads=1, head_dim=head_dim, value_dim=value_dim,
                     freqs_batch=1, keep=0.7, table=table, generation=generation)  # fmt: skip
    case.allow_tf32 = allow_tf32
    first = case.check_forward()
    assert "merge" in launched(case)
    case.run = KernelRun(seed=1, concurrent_blocks=5, generation=generation)
    for again, before in zip(case.forward(), first, strict=True):
        np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize(("dtype", "generation"), KINDS)
def test_splits_without_a_key_weigh_nothing(dtype: str, generation: str) -> None:
    """Masks that leave all, some and none of the splits without a key; scores whose exponentials overflow."""
    case = make_case(dtype, batch=3, n_queries=40, n_keys=1600, table=[((0, 40), [(0, 1600)])], generation=generation)
    case.key_mask = np.ones((3, 1600), bool)
    case.key_mask[1] = False
    case.key_mask[2, :1100] = case.key_mask[2, 1300:] = False
    case.k = to_storage(from_storage(case.k, dtype) * np.linspace(1, 40, 1600)[None, :, None, None], dtype)
    out, lse = case.check_forward()
    assert "merge" in launched(case)
    assert np.isneginf(lse[1]).all() and not out[1].any()
    case.q = case.q.copy()
    case.q[:, 7, 0, 3] = nan_storage(dtype)
    poisoned, _ = case.forward()
    others = np.arange(40) != 7
    np.testing.assert_array_equal(poisoned[:, others], out[:, others])
    assert np.isnan(from_storage(poisoned, dtype)[[0, 2], 7]).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_large_table_travels_through_device_memory(generation: str) -> None:
    table = [((4 * i, 4 * i + 3), [(2 * i, 2 * i + 1), (2 * i + 1, 2 * i + 2)][: i % 3]) for i in range(150)]
    case = make_case(n_queries=600, n_keys=300, table=table, head_dim=32, generation=generation)
    case.check()
    assert any(name == "upload" for name, _, _ in case.run.launches)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_element_offsets_beyond_32_bits(generation: str) -> None:
    """Tokens 2^26 elements apart; only the touched pages of the address range are ever memory."""
    table: Table = [((0, 40), [(0, 40)])]
    case = make_case("float16", n_queries=40, n_keys=40, head_dim=32, table=table, generation=generation)

    def spread(x: Array) -> Array:
        step = 1 << 26
        base = np.empty(39 * step + 32, x.dtype)
        view = np.lib.stride_tricks.as_strided(base, x.shape, (0, step * x.itemsize, 0, x.itemsize))
        view[...] = x
        return view

    case.q, case.k = spread(case.q), spread(case.k)
    case.check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("freqs_batch", [1, 2])
@pytest.mark.parametrize("head_dim", [8, 64, 136])
def test_rope(dtype: str, freqs_batch: int, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    packed = to_storage(rng.normal(size=(2, 19, 2, 3, head_dim + 1)), dtype)
    x, grad_out = packed[:, :, 0, :, :head_dim], packed[:, :, 1, :, 1:]
    freqs = make_freqs(rng, freqs_batch, 19, head_dim)
    values, unit = from_storage(x, dtype), unit_roundoff(dtype)
    expected = rotate(values, freqs)
    # Two products and a sum in float32, then one rounding.
    size = rotate(np.abs(values), np.abs(freqs.real) - 1j * np.abs(freqs.imag))
    size = np.maximum(np.abs(size), rotate(np.abs(values), np.abs(freqs.real) + 1j * np.abs(freqs.imag)))
    bound = Bounded(expected, unit * np.abs(expected) + 3 * 2.0**-24 * size + Arithmetic.of(dtype, False).smallest)
    bound.check(from_storage(rope(dtype, x, freqs), dtype), "out")
    grad_x, grad_freqs = rope_backward(dtype, x, freqs, grad_out)
    gradients = rope_gradients(values, freqs, from_storage(grad_out, dtype), Arithmetic.of(dtype, False))
    gradients["q"].check(from_storage(grad_x, dtype), "grad_x")
    gradients["q_freqs"].check(grad_freqs, "grad_freqs")


@pytest.mark.parametrize(
    "instantiation", ["attention_bfloat16_64", "attention_tf32x3_64", "elementwise_float16", "upload"]
)
def test_every_architecture_gets_what_is_emulated(instantiation: str) -> None:
    """nvcc makes native code of this PTX for sm_80, and ships it for later architectures: only the target differs."""
    # The debug sections after the code hold names that differ from run to run.
    texts = [ptx_file(instantiation, architecture).read_text() for architecture in ("80", "90")]
    native, shipped = (text.partition("\t.section\t.debug")[0] for text in texts)
    assert ".entry" in native
    assert native.replace(".target sm_80", ".target sm_90") == shipped


@pytest.mark.parametrize(("precision", "head_dim"), [("bfloat16", 64), ("float16", 128), ("tf32x3", 64)])
def test_counts_are_those_of_the_committed_table(precision: str, head_dim: int) -> None:
    """A bank conflict, a product or a sector that comes back is seen; a new compiler may move instructions a little."""
    committed = json.loads((RESULTS / "cuda_kernels.json").read_text())
    for name, counts in counted(precision, head_dim).items():
        expected = committed[name]["emulated"]
        instructions = counts.pop("warp_instructions")
        assert instructions <= 1.05 * expected.pop("warp_instructions"), name
        assert counts == expected, name


def test_no_bank_conflicts_in_the_products() -> None:
    """Padded rows serve ldmatrix, and the transposed float32 operand, without a conflict in every head size."""
    for dtype in ("bfloat16", "float32"):
        for head_dim in (32, 48, 64, 96, 128, 256):
            case = make_case(dtype, n_queries=64, n_keys=64, head_dim=head_dim, table=[((0, 64), [(0, 64)])])
            case.backward(*case.forward())
            for name, _, counters in case.run.launches:
                for operation, counts in counters.shared_memory().items():
                    if operation.startswith(("ldmatrix", "ld.shared")):
                        assert counts["conflicts"] == 0, (name, operation, counts)


@pytest.mark.parametrize(("dtype", "k_of_product", "terms"), [("bfloat16", 16, 1), ("float32", 8, 3)])
def test_products_are_those_of_the_ranges_tiles(dtype: str, k_of_product: int, terms: int) -> None:
    """Two ranges of 128 keys out of 320 cost 256 keys: two products forward, four and three backward, per score."""
    case = make_case(dtype, n_queries=128, n_keys=320, table=[((0, 128), [(0, 128), (192, 320)])])
    case.backward(*case.forward())
    per_product = 128 * 256 * 64 // (16 * 8 * k_of_product) * terms
    counts = {name.split("_" + dtype[:4])[0].split("_tf32")[0]: sum(c.tensor_core().values())
              for name, _, c in case.run.launches}  # fmt: skip
    assert counts["forward"] == 2 * per_product
    assert counts["backward_query"] == 3 * per_product
    assert counts["backward_key"] == 4 * per_product


def test_short_ranges_cost_less_than_a_tile() -> None:
    """20 queries occupy one warp of four; 20 keys a warp, and a step of 32 columns, of the backward passes."""
    counts = []
    for n_queries, n_keys in ((128, 128), (20, 20)):
        case = make_case(n_queries=n_queries, n_keys=n_keys, table=[((0, n_queries), [(0, n_keys)])])
        case.check()
        counts.append({name: sum(c.tensor_core().values()) for name, _, c in case.run.launches})
    tile, short = counts
    # Key tiles of the forward and the query pass have 64 columns, of which the query pass steps over 32.
    assert short["forward_bfloat16_64"] == tile["forward_bfloat16_64"] / 4 / 2
    assert short["backward_query_bfloat16_64"] == tile["backward_query_bfloat16_64"] / 4 / 4
    # Steps of 16 queries: two for 20.
    assert short["backward_key_bfloat16_64"] == tile["backward_key_bfloat16_64"] / 4 * 2 / 8
