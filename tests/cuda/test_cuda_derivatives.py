"""The CUDA kernels of the derivatives, executed from their PTX by the emulator, against float64 with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tools.cuda_plans import KernelRun, attention_double_backward, attention_jvp
from tools.cuda_plans.run import Array, Table, from_storage, to_storage

from tests.cuda.kernel_cases import RAGGED, Case, make_case, nan_storage

pytestmark = [pytest.mark.emulator, pytest.mark.needs_nvcc]

DTYPES = ["bfloat16", "float16", "float32"]


def make_tangents(case: Case, moves: str, n: int) -> dict[str, Array]:
    """Random directions of what moves, of any mean."""
    rng = np.random.default_rng(len(moves))
    return {
        f"{name}_tangents": to_storage(rng.normal(0.3, 1.0, (n, *getattr(case, name).shape)), case.dtype)
        for name in moves
    }


def run_jvp(case: Case, tangents: dict[str, Array], value: Sequence[Array | None] = (None, None)) -> tuple[Array, ...]:
    return attention_jvp(
        case.dtype, case.q, case.k, case.v, case.table, out=value[0], lse=value[1], **tangents,
        key_mask=case.key_mask, scale=case.scale, run=case.run,
    )  # fmt: skip


def check_jvp(case: Case, moves: str = "q", n: int = 1) -> tuple[Array, ...]:
    """Runs the operation and compares its results with the reference."""
    tangents = make_tangents(case, moves, n)
    reference = case.reference()
    results = out, lse, out_tangents, lse_tangents = run_jvp(case, tangents)
    reference.out.check(from_storage(out, case.dtype), "out")
    reference.lse.check(lse.astype(np.float64), "lse")
    for i in range(n):
        along = (from_storage(tangents[f"{name}_tangents"][i], case.dtype) if name in moves else None for name in "qkv")
        of_out, of_lse = reference.tangents(*along)
        of_out.check(from_storage(out_tangents[i], case.dtype), f"tangent {i} of out")
        of_lse.check(lse_tangents[i].astype(np.float64), f"tangent {i} of lse")
    return results


def run_second(case: Case, moves: str) -> dict[str, Array]:
    """The operation after the forward and the tangents that it needs."""
    tangents = make_tangents(case, moves, 1)
    out, lse, out_tangents, lse_tangents = run_jvp(case, tangents)
    along: dict[str, Any] = {name[:-1]: tangent[0] for name, tangent in tangents.items()}
    return attention_double_backward(
        case.dtype, case.q, case.k, case.v, case.table, out, lse, case.grad_out, out_tangents[0], lse_tangents[0],
        **along, grad_lse=case.grad_lse, key_mask=case.key_mask, scale=case.scale, wanted=case.wanted, run=case.run,
    )  # fmt: skip


def check_second(case: Case, moves: str = "q") -> dict[str, Array]:
    """Runs the operation and compares its results with the reference."""
    tangents = make_tangents(case, moves, 1)
    along = (from_storage(tangents[f"{name}_tangents"][0], case.dtype) if name in moves else None for name in "qkv")
    expected = case.reference().second(from_storage(case.grad_out, case.dtype), case.grad_lse, *along)
    found = run_second(case, moves)
    assert set(found) == set(case.wanted)
    for name, gradient in found.items():
        expected[name].check(from_storage(gradient, case.dtype), f"second derivative of {name}")
    return found


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_of_native_head_dims(dtype: str, head_dim: int, moves: str) -> None:
    table: Table = [((3, 90), [(5, 60), (70, 130)])]
    check_second(make_case(dtype, n_queries=100, n_keys=130, head_dim=head_dim, table=table, seed=head_dim), moves)


@pytest.mark.parametrize("moves", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_second_derivatives_of_ranges_masks_and_grouped_heads(moves: str) -> None:
    check_second(make_case(batch=2, heads=4, kv_heads=2, value_dim=40, keep=0.6), moves)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",)])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_only_wanted_second_derivatives_are_computed(wanted: tuple[str, ...], head_dim: int) -> None:
    case = make_case(n_queries=70, n_keys=60, head_dim=head_dim, table=[((0, 70), [(0, 60)])])
    case.wanted = wanted
    check_second(case)
    launched = [name for name, _, _ in case.run.launches if name.startswith("double_backward")]
    assert len(launched) == 1 and ("query" in launched[0]) == (wanted == ("q",))


@pytest.mark.parametrize("moves", ["q", "qkv"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_head_dims(dtype: str, head_dim: int, moves: str) -> None:
    table: Table = [((3, 90), [(5, 60), (70, 130)])]
    check_jvp(make_case(dtype, n_queries=100, n_keys=130, head_dim=head_dim, table=table, seed=head_dim), moves)


@pytest.mark.parametrize("moves", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_ranges_masks_grouped_heads_and_several_tangents(moves: str) -> None:
    check_jvp(make_case(batch=2, heads=4, kv_heads=2, value_dim=40, keep=0.6), moves, n=3)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(72, 64), (32, 128), (40, 248)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_of_another_size(dtype: str, head_dim: int, value_dim: int) -> None:
    case = make_case(dtype, n_queries=60, n_keys=70, head_dim=head_dim, value_dim=value_dim,
                     table=[((0, 60), [(3, 70)])])  # fmt: skip
    check_jvp(case, "qkv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_known_value_is_not_computed_again(dtype: str) -> None:
    case = make_case(dtype, batch=2, keep=0.8)
    tangents = make_tangents(case, "q", 1)
    fresh = run_jvp(case, tangents)
    case.run = KernelRun()
    known = run_jvp(case, tangents, fresh[:2])
    assert [name.partition("_")[0] for name, _, _ in case.run.launches] == ["jvp"]
    for one, other in zip(fresh, known, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tangents_of_queries_alone_cost_three_products() -> None:
    case = make_case(n_queries=128, n_keys=128, table=[((0, 128), [(0, 128)])])
    counts = {}
    for moves in ("q", "k", "v", "qkv"):
        case.run = KernelRun()
        run_jvp(case, make_tangents(case, moves, 1))
        counts[moves] = sum(case.run.launches[-1][2].tensor_core().values()) / (128 * 128 * 64 / (16 * 8 * 16))
    assert counts == {"q": 3, "k": 3, "v": 2, "qkv": 5}


def test_what_all_keys_have_in_common_does_not_cancel() -> None:
    """Keys with a common part move all scores of a row alike, which moves nothing."""
    case = make_case("float32", n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])])
    case.scale, case.k = 0.02, case.k + np.float32(100)
    check_jvp(case)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 30.0])
def test_scales(scale: float) -> None:
    case = make_case("float32", n_queries=40, n_keys=70, table=[((0, 40), [(0, 70)])])
    case.scale = scale
    check_jvp(case, "qkv")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_views_that_are_only_element_aligned(dtype: str) -> None:
    case = make_case(dtype, n_queries=50, n_keys=45, heads=2, head_dim=40, table=[((0, 50), [(2, 45)])])
    tangents = make_tangents(case, "qkv", 2)

    def shifted(x: Array) -> Array:
        base = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
        base[..., 1:-2] = x
        return base[..., 1:-2]

    expected = run_jvp(case, tangents)
    case.q, case.k, case.v = map(shifted, (case.q, case.k, case.v))
    for found, wanted in zip(run_jvp(case, {n: shifted(x) for n, x in tangents.items()}), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # One direction for all: a stride of 0.
    same = {name: np.broadcast_to(x[:1], x.shape) for name, x in tangents.items()}
    _, _, out_tangents, _ = run_jvp(case, same)
    np.testing.assert_array_equal(out_tangents[0], out_tangents[1])
    np.testing.assert_array_equal(out_tangents[0], expected[2][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_masked_and_unread_keys_reach_nothing(dtype: str) -> None:
    """NaN in keys that are masked, or in no range, and in their tangents, changes no bit; rows without keys stay."""
    case = make_case(dtype, batch=2, n_queries=60, n_keys=200, table=[((0, 50), [(10, 90), (95, 180)])])
    case.key_mask = np.random.default_rng(0).uniform(size=(2, 200)) < 0.5
    case.key_mask[1] = False
    results = check_jvp(case, "qkv")
    assert not results[2][:, 1].any() and not results[3][:, 1].any() and not results[3][..., 50:].any()
    gone = ~case.key_mask
    gone[:, :10] = gone[:, 90:95] = gone[:, 180:] = True
    tangents = make_tangents(case, "qkv", 1)
    poisoned: list[Any] = [case.k.copy(), case.v.copy(), *(tangents[f"{name}_tangents"][0] for name in "kv")]
    for tensor in poisoned:
        tensor[gone] = nan_storage(dtype)
    case.k, case.v = poisoned[:2]
    for found, wanted in zip(run_jvp(case, tangents), results, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_second_derivatives_of_masked_keys_and_rows_without_keys_are_zero(dtype: str) -> None:
    case = make_case(dtype, batch=2, n_queries=60, n_keys=200, table=[((0, 50), [(10, 90), (95, 180)])])
    case.key_mask = np.random.default_rng(0).uniform(size=(2, 200)) < 0.5
    case.key_mask[1] = False
    expected = check_second(case, "qkv")
    gone = ~case.key_mask
    assert not expected["q"][1].any() and not expected["q"][:, 50:].any()
    assert not expected["k"][gone].any() and not expected["v"][gone].any()
    case.k, case.v = case.k.copy(), case.v.copy()
    case.k[gone] = case.v[gone] = nan_storage(dtype)
    for name, found in run_second(case, "qkv").items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


def test_blocks_in_any_order_give_the_same_bits() -> None:
    results = []
    for seed, concurrent_blocks in ((0, 1), (3, 4)):
        case = make_case(heads=2, table=RAGGED)
        case.run = KernelRun(seed=seed, concurrent_blocks=concurrent_blocks)
        results.append(run_jvp(case, make_tangents(case, "qkv", 2)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    first, again = (run_second(make_case(heads=2, table=RAGGED), "qkv") for _ in range(2))
    for name, found in first.items():
        np.testing.assert_array_equal(found, again[name], err_msg=name)
