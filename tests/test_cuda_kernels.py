"""The CUDA kernels, executed from their PTX by the emulator, against float64 with element-wise error bounds.

The emulator poisons outputs, workspace and shared memory and reports races, reads of unwritten memory, and accesses
outside of the buffers; a test that passes has none.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from benchmarks.cuda_resources import RESULTS, counted

from .cuda_plans import KernelRun, attention_backward, attention_forward, rope, rope_backward
from .cuda_plans.build import ptx_file
from .cuda_plans.reference import Arithmetic, AttentionReference, Bounded, rope_gradients, rotate
from .cuda_plans.run import Array, Table, from_storage, to_storage, unit_roundoff

# (dtype, allow_tf32)
PRECISIONS = [("bfloat16", False), ("float16", False), ("float32", False), ("float32", True)]
# Two partial tiles of queries, partial and repeated and shared key ranges, rows in no range, keys that nobody reads.
RAGGED: Table = [((0, 70), [(0, 20), (37, 141)]), ((75, 150), [(100, 160), (100, 160)])]
N_QUERIES, N_KEYS = 170, 180


@dataclass
class Case:
    """Inputs of one call; `to_storage` has rounded them, so they are exact."""

    dtype: str
    q: Array
    k: Array
    v: Array
    grad_out: Array
    grad_lse: Array
    table: Table
    q_freqs: Array | None = None
    key_mask: Array | None = None
    scale: float | None = None
    allow_tf32: bool = False
    wanted: tuple[str, ...] = ("q", "k", "v")
    run: KernelRun = field(default_factory=KernelRun)

    def forward(self) -> tuple[Array, Array]:
        return attention_forward(
            self.dtype, self.q, self.k, self.v, self.table, q_freqs=self.q_freqs, key_mask=self.key_mask,
            scale=self.scale, run=self.run, allow_tf32=self.allow_tf32,
        )  # fmt: skip

    def backward(self, out: Array, lse: Array) -> dict[str, Array]:
        return attention_backward(
            self.dtype, self.q, self.k, self.v, self.table, out, lse, self.grad_out, grad_lse=self.grad_lse,
            q_freqs=self.q_freqs, key_mask=self.key_mask, scale=self.scale, wanted=self.wanted, run=self.run,
            allow_tf32=self.allow_tf32,
        )  # fmt: skip

    def reference(self) -> AttentionReference:
        q, k, v = (from_storage(x, self.dtype) for x in (self.q, self.k, self.v))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        arithmetic = Arithmetic.of(self.dtype, self.allow_tf32)
        return AttentionReference(q, k, v, self.table, arithmetic, scale, self.q_freqs, self.key_mask)

    def check(self) -> tuple[Array, Array, dict[str, Array]]:
        """Runs both passes and compares everything with the reference."""
        reference = self.reference()
        out, lse = self.forward()
        reference.lse.check(lse.astype(np.float64), "lse")
        reference.out.check(from_storage(out, self.dtype), "out")
        gradients = self.backward(out, lse)
        expected = reference.backward(from_storage(self.grad_out, self.dtype), self.grad_lse)
        assert set(gradients) == set(self.wanted)
        for name, gradient in gradients.items():
            computed = gradient if name == "q_freqs" else from_storage(gradient, self.dtype)
            expected[name].check(computed, f"grad_{name}")
        return out, lse, gradients


def make_freqs(rng: np.random.Generator, batch: int, tokens: int, head_dim: int) -> Array:
    """Complex factors of any modulus."""
    shape = (batch, tokens, head_dim // 2)
    factors = rng.uniform(0.7, 1.3, shape) * np.exp(1j * rng.uniform(0, 2 * math.pi, shape))
    return np.asarray(factors, np.complex64)


def make_case(
    dtype: str = "bfloat16", batch: int = 1, n_queries: int = N_QUERIES, n_keys: int = N_KEYS, heads: int = 1,
    head_dim: int = 64, table: Table = RAGGED, freqs_batch: int = 0, keep: float = 1.0, seed: int = 0,
) -> Case:  # fmt: skip
    """Random inputs with a mean; factors where `freqs_batch` > 0, a key mask where `keep` < 1."""
    rng = np.random.default_rng(seed)

    def tensor(tokens: int) -> Array:
        return to_storage(rng.normal(0.2, 1.0, (batch, tokens, heads, head_dim)), dtype)

    q, k, v, grad_out = tensor(n_queries), tensor(n_keys), tensor(n_keys), tensor(n_queries)
    grad_lse = rng.normal(size=(batch, heads, n_queries)).astype(np.float32)
    case = Case(dtype, q, k, v, grad_out, grad_lse, table)
    if freqs_batch:
        case.q_freqs = make_freqs(rng, freqs_batch, n_queries, head_dim)
    if keep < 1:
        case.key_mask = rng.uniform(size=(batch, n_keys)) < keep
    return case


def nan_storage(dtype: str) -> float | int:
    return {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": math.nan}[dtype]


@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize(("dtype", "allow_tf32"), PRECISIONS)
def test_native_head_dims(dtype: str, allow_tf32: bool, head_dim: int) -> None:
    case = make_case(dtype, head_dim=head_dim, seed=head_dim)
    case.allow_tf32 = allow_tf32
    case.check()


@pytest.mark.parametrize("head_dim", [8, 24, 40, 56, 80, 112, 136, 248])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_head_dims_run_through_the_next_size_up(dtype: str, head_dim: int) -> None:
    make_case(dtype, n_queries=70, n_keys=60, head_dim=head_dim, table=[((3, 70), [(5, 60)])]).check()


@pytest.mark.parametrize(("dtype", "allow_tf32"), PRECISIONS)
@pytest.mark.parametrize("freqs_batch", [1, 2])
def test_rotated_queries_heads_batch_and_mask(dtype: str, allow_tf32: bool, freqs_batch: int) -> None:
    case = make_case(dtype, batch=2, heads=3, freqs_batch=freqs_batch, keep=0.5)
    case.allow_tf32 = allow_tf32
    case.check()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("freqs_batch", [1, 2])
@pytest.mark.parametrize("wanted", [("q", "k", "v", "q_freqs"), ("q_freqs",)])
def test_gradient_of_factors(dtype: str, freqs_batch: int, wanted: tuple[str, ...]) -> None:
    case = make_case(dtype, batch=2, n_queries=90, n_keys=70, heads=2, head_dim=32, freqs_batch=freqs_batch,
                     table=[((0, 80), [(0, 70)])])  # fmt: skip
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_error_is_that_of_rounding(dtype: str) -> None:
    """The bounds allow errors to add up; on random data they cancel, so the mean square says more.

    An output is rounded once and is a mean of values whose weights were rounded once: two roundings, each with a
    standard deviation of u / √3, of numbers no larger than the root mean square of the result's terms.
    """
    case = make_case(dtype, n_queries=256, n_keys=320, table=[((0, 256), [(0, 320)])])
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_views_into_a_packed_projection_are_read_in_place(dtype: str) -> None:
    rng = np.random.default_rng(1)
    packed = to_storage(rng.normal(size=(2, 60, 3, 2, 64)), dtype)
    case = make_case(dtype, batch=2, n_queries=60, n_keys=60, heads=2, table=[((0, 60), [(0, 37), (41, 60)])])
    case.q, case.k, case.v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    # (B, H, N, D) in memory
    case.grad_out = np.ascontiguousarray(case.grad_out.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    case.check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_pointers_and_strides_that_are_only_element_aligned(dtype: str, head_dim: int) -> None:
    case = make_case(dtype, batch=2, n_queries=50, n_keys=45, heads=2, head_dim=head_dim, freqs_batch=2,
                     table=[((0, 50), [(2, 45)])])  # fmt: skip

    def shifted(x: Array) -> Array:
        base = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
        base[..., 1:-2] = x
        return base[..., 1:-2]

    case.q, case.k, case.v, case.grad_out = map(shifted, (case.q, case.k, case.v, case.grad_out))
    assert case.q.strides[1] % 16 or case.q.ctypes.data % 16
    case.check()


def test_broadcast_views() -> None:
    case = make_case(batch=2, n_queries=40, n_keys=30, heads=2, table=[((0, 40), [(0, 30)])])
    case.k = np.broadcast_to(case.k[:1, :, :1], case.k.shape)
    case.grad_out = np.broadcast_to(case.grad_out[:, :1], case.grad_out.shape)
    case.check()


def test_rows_without_keys() -> None:
    case = make_case(table=[((10, 40), [])], n_queries=50, n_keys=30)
    out, lse, gradients = case.check()
    assert not out.any() and np.isneginf(lse).all()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("batch", "n_queries", "n_keys", "heads"), [(0, 9, 9, 1), (1, 0, 9, 1), (1, 9, 0, 1), (1, 9, 9, 0), (1, 0, 0, 1)]
)
def test_zero_sizes(batch: int, n_queries: int, n_keys: int, heads: int) -> None:
    make_case(batch=batch, n_queries=n_queries, n_keys=n_keys, heads=heads, table=[]).check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_masked_and_unread_keys_reach_nothing(dtype: str) -> None:
    """NaN in keys that are masked, or in no range, changes no bit."""
    case = make_case(dtype, batch=2, n_queries=100, n_keys=300, heads=2, table=[((0, 100), [(10, 130), (140, 290)])])
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


def test_nan_of_a_query_stays_in_its_row() -> None:
    case = make_case(n_queries=40, n_keys=30, table=[((0, 40), [(0, 30)])])
    expected, _ = case.forward()
    case.q = case.q.copy()
    case.q[0, 7, 0, 3] = nan_storage("bfloat16")
    out, lse = case.forward()
    others = np.arange(40) != 7
    np.testing.assert_array_equal(out[:, others], expected[:, others])
    assert np.isnan(from_storage(out, "bfloat16")[0, 7]).all() and np.isnan(lse[0, 0, 7])


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 30.0])
def test_scales(scale: float) -> None:
    case = make_case("float32", n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])])
    case.scale = scale
    case.check()


def test_scores_far_from_zero() -> None:
    """exp of the scores over- and underflows; exp of their differences does not."""
    case = make_case("float32", n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])])
    case.k = case.k + np.float32(20) * np.sign(np.random.default_rng(0).normal(size=(1, 70, 1, 1))).astype(np.float32)
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


def test_large_table_travels_through_device_memory() -> None:
    table = [((4 * i, 4 * i + 3), [(2 * i, 2 * i + 1), (2 * i + 1, 2 * i + 2)][: i % 3]) for i in range(150)]
    case = make_case(n_queries=600, n_keys=300, table=table, head_dim=32)
    case.check()
    assert any(name == "upload" for name, _, _ in case.run.launches)


def test_element_offsets_beyond_32_bits() -> None:
    """Tokens 2^26 elements apart; only the touched pages of the address range are ever memory."""
    case = make_case("float16", n_queries=40, n_keys=40, head_dim=32, table=[((0, 40), [(0, 40)])])

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
    texts = [ptx_file(instantiation, architecture).read_text() for architecture in (80, 90)]
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
