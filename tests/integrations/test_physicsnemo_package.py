"""``accelerate`` against PhysicsNeMo itself, where it is installed or ``make test-physicsnemo`` puts it on the path."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.whole_models import compare, too_different
from torch import Tensor, nn

from anchor_attention.integrations.physicsnemo import accelerate, restore

if importlib.util.find_spec("physicsnemo") is None:
    pytest.skip("needs the package nvidia-physicsnemo: `make test-physicsnemo`", allow_module_level=True)

layers = importlib.import_module("physicsnemo.nn.module.gale")
flare = importlib.import_module("physicsnemo.nn.module.flare_attention")
Transolver = importlib.import_module("physicsnemo.models.transolver").Transolver
GeoTransolver = importlib.import_module("physicsnemo.models.geotransolver").GeoTransolver
FLAREModel = importlib.import_module("physicsnemo.models.flare").FLARE

DIM, HEADS, DIM_HEAD, CONTEXT_DIM = 20, 2, 12, 6
# Results of some dozens of terms of order one, in two orders; a whole model adds a few layers of them.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12}
MODEL_TOLERANCE = 1e-4


def gale_fa(**fields: Any) -> nn.Module:
    return layers.GALE_FA(DIM, heads=HEADS, dim_head=DIM_HEAD, n_global_queries=7, context_dim=CONTEXT_DIM, **fields)


def assert_same(module: nn.Module, call: Callable[[nn.Module], Any], tolerance: float, replaced: int = 1) -> nn.Module:
    """Results and the gradients of all parameters, of the module and its accelerated copy; returns the copy."""
    fast = copy.deepcopy(module)
    report = accelerate(fast)
    assert len(report.replaced) == replaced and not report.left, str(report)
    found = []
    for candidate in (module, fast):
        candidate.zero_grad()
        torch.manual_seed(3)
        outputs = torch.utils._pytree.tree_leaves(call(candidate))
        sum((out * torch.arange(out.shape[-1]).cos()).sum() for out in outputs).backward()
        found.append((outputs, {name: p.grad for name, p in candidate.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    return fast


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 5, 131])
def test_flare_stays_the_same(n: int, dtype: torch.dtype) -> None:
    module = flare.FLARE(DIM, heads=HEADS, dim_head=DIM_HEAD, n_global_queries=7).to(dtype)
    x = torch.randn(2, n, DIM, dtype=dtype, requires_grad=True)
    assert_same(module, lambda m: m(x), TOLERANCES[dtype])
    assert x.grad is not None


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mode", ["weighted", "concat_project"])
def test_gale_fa_stays_the_same(mode: str, dtype: torch.dtype) -> None:
    module = gale_fa(state_mixing_mode=mode).to(dtype)
    x = tuple(torch.randn(2, n, DIM, dtype=dtype) for n in (33, 4))
    context = torch.randn(2, HEADS, 9, CONTEXT_DIM, dtype=dtype)
    assert_same(module, lambda m: m(x, context), TOLERANCES[dtype])
    assert_same(module, lambda m: m(x), TOLERANCES[dtype])


@pytest.mark.parametrize("concrete", [False, True])
def test_dropout_in_training_stays_the_same(concrete: bool) -> None:
    module = gale_fa(dropout=0.3, concrete_dropout=concrete).train()
    x, context = (torch.randn(2, 33, DIM),), torch.randn(2, HEADS, 9, CONTEXT_DIM)
    fast = assert_same(module, lambda m: m(x, context), TOLERANCES[torch.float32])
    assert not torch.equal(fast(x, context)[0], fast(x, context)[0])


def test_autocast_is_as_exact_as_before() -> None:
    module = gale_fa().eval()
    fast = copy.deepcopy(module)
    accelerate(fast)
    x, context = (torch.randn(2, 65, DIM),), torch.randn(2, HEADS, 9, CONTEXT_DIM)
    exact = copy.deepcopy(module).double()((x[0].double(),), context.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        (before,), (after,) = module(x, context), fast(x, context)
    assert after.dtype == before.dtype
    # Twice the original's error, and the rounding of the result.
    rounding = float(exact.abs().max()) * torch.finfo(torch.bfloat16).eps
    assert float((after - exact).abs().max()) <= 2 * float((before - exact).abs().max()) + rounding


def geo_transolver(attention_type: str, **fields: Any) -> nn.Module:
    return GeoTransolver(
        functional_dim=6, out_dim=3, geometry_dim=3, n_layers=2, n_hidden=16, n_head=2, slice_num=4, use_te=False,
        attention_type=attention_type, **fields,
    )  # fmt: skip


def geo_inputs(n: int = 45) -> dict[str, Tensor]:
    return {
        "local_embedding": torch.randn(1, n, 6),
        "local_positions": torch.randn(1, n, 3),
        "geometry": torch.randn(1, 23, 3),
    }


def test_a_whole_geotransolver_stays_the_same() -> None:
    inputs = geo_inputs()
    model = geo_transolver("GALE_FA")
    fast = assert_same(model, lambda m: m(**inputs), MODEL_TOLERANCE, replaced=2)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert restore(fast) == 2 and {type(m) for m in fast.modules()} == {type(m) for m in model.modules()}


def test_a_whole_flare_model_stays_the_same_and_saves(tmp_path: Path) -> None:
    model = FLAREModel(functional_dim=2, out_dim=3, embedding_dim=3, n_layers=2, n_hidden=16, n_head=2, slice_num=4)
    fx, embedding = torch.randn(2, 45, 2), torch.randn(2, 45, 3)
    fast = assert_same(model, lambda m: m(fx, embedding), MODEL_TOLERANCE, replaced=2)
    fast.save(str(tmp_path / "model.mdlus"))
    again = FLAREModel.from_checkpoint(str(tmp_path / "model.mdlus"))
    torch.testing.assert_close(again(fx, embedding), model(fx, embedding))


def test_attention_over_slices_is_left_and_named() -> None:
    transolver = Transolver(
        functional_dim=2, out_dim=3, embedding_dim=3, n_layers=2, n_hidden=16, n_head=2, slice_num=4, use_te=False
    )
    for model in (transolver, geo_transolver("GALE")):
        with pytest.warns(UserWarning, match="its softmax runs over the slices of a token"):
            report = accelerate(model)
        assert not report.replaced and len(report.left) == 2


@pytest.mark.parametrize("geometry", [0, 21])
def test_the_models_that_are_timed_stay_the_same(geometry: int) -> None:
    models = importlib.import_module("benchmarks.physicsnemo_models")
    case = models.Case("small", 50, geometry, latents=5)
    model = models.build_model(case, dim=16, heads=2, layers=2)
    fast = copy.deepcopy(model)
    assert len(accelerate(fast).replaced) == 2
    record = compare(case.name, model, fast, lambda: models.make_inputs(case), models.outputs_of, rounds=1)
    assert not too_different([record]), record["equality"]
