"""``accelerate`` for PhysicsNeMo's attention, on modules that look like it: the package is not needed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anchor_attention.integrations.physicsnemo import accelerate, restore
from tests.integrations.physicsnemo_lookalikes import FLARE, GALE_FA, PhysicsAttentionBase

PACKAGES = ("tests",)
DIM, HEADS, DIM_HEAD, CONTEXT_DIM = 20, 2, 12, 5
# Results of some dozens of terms of order one in two orders, in units of the type's rounding.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12}


def flare(**fields: Any) -> FLARE:
    return FLARE(DIM, HEADS, DIM_HEAD, **fields)


def gale_fa(**fields: Any) -> GALE_FA:
    return GALE_FA(DIM, HEADS, DIM_HEAD, context_dim=CONTEXT_DIM, **fields)


def assert_same(module: nn.Module, *inputs: Any) -> nn.Module:
    """Results and gradients of the module and of its accelerated copy; returns the copy."""
    fast = copy.deepcopy(module)
    report = accelerate(fast, packages=PACKAGES)
    assert len(report.replaced) == 1 and not report.left, str(report)
    dtype = next(module.parameters()).dtype
    found = []
    for candidate in (module, fast):
        torch.manual_seed(3)
        leaves = torch.utils._pytree.tree_map(lambda part: part.detach().requires_grad_(), inputs)
        outputs = torch.utils._pytree.tree_leaves(candidate(*leaves))
        sum((out * torch.arange(out.shape[-1]).cos()).sum() for out in outputs).backward()
        grads = [leaf.grad for leaf in torch.utils._pytree.tree_leaves(leaves)]
        found.append((outputs, grads, {name: p.grad for name, p in candidate.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    return fast


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 5, 83])
def test_latent_attention_stays_the_same(n: int, dtype: torch.dtype) -> None:
    module = flare().to(dtype)
    fast = assert_same(module, torch.randn(2, n, DIM, dtype=dtype))
    assert type(fast).__name__ == "AcceleratedFLARE" and isinstance(fast, FLARE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mode", ["weighted", "concat_project"])
def test_a_context_is_read_as_before(mode: str, dtype: torch.dtype) -> None:
    module = gale_fa(state_mixing_mode=mode).to(dtype)
    streams = tuple(torch.randn(2, n, DIM, dtype=dtype) for n in (31, 6))
    fast = assert_same(module, streams, torch.randn(2, HEADS, 9, CONTEXT_DIM, dtype=dtype))
    torch.testing.assert_close(fast(streams), module(streams), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_dropout_in_training_is_as_before() -> None:
    module = flare(dropout=0.4).train()
    fast = assert_same(module, torch.randn(2, 40, DIM))
    assert fast.training and fast(torch.randn(1, 40, DIM)).eq(0).any()


def test_parameters_and_hooks_stay_and_restore_undoes_it() -> None:
    model = nn.Sequential(flare(), flare())
    calls: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: calls.append(module))
    before = dict(model.named_parameters())
    accelerate(model, packages=PACKAGES)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    x = torch.randn(1, 7, DIM)
    expected = model(x)
    assert calls == [model[0]]
    again = pickle.loads(pickle.dumps(nn.Sequential(model[1])))
    torch.testing.assert_close(again(x), model[1](x), rtol=0, atol=0)
    assert "already accelerated" in str(accelerate(model, packages=PACKAGES))
    assert restore(model) == 2 and type(model[0]) is FLARE
    torch.testing.assert_close(model(x), expected, rtol=2e-5, atol=2e-5)


def test_the_report_says_what_was_left_and_why() -> None:
    class Other(FLARE):
        def tokens(self, x: Tensor) -> Tensor:
            return 2 * super().tokens(x)

    Other.__qualname__ = "Other"

    class Shuffled(FLARE):
        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            return super().forward(x[:, order])

    Shuffled.__name__ = Shuffled.__qualname__ = "FLARE"
    with_buffer, with_layer, on_engine = flare(), flare(), flare()
    with_buffer.register_buffer("bias", torch.zeros(3))
    with_layer.k_norm = nn.LayerNorm(DIM_HEAD)
    on_engine.use_te = True
    model = nn.ModuleDict(
        {
            "good": flare(),
            "slices": PhysicsAttentionBase(DIM),
            "torch": nn.MultiheadAttention(DIM, 2),
            "other": Other(DIM, HEADS, DIM_HEAD),
            "shuffled": Shuffled(DIM, HEADS, DIM_HEAD),
            "buffer": with_buffer,
            "layer": with_layer,
            "engine": on_engine,
        }
    )
    report = accelerate(model, packages=PACKAGES)
    assert [module.name for module in report.replaced] == ["good"]
    reasons = {module.name: module.reason for module in report.left}
    expected = {
        "slices": "its softmax runs over the slices of a token",
        "torch": "its forward is that of torch.nn.modules.activation.MultiheadAttention, which is not known",
        "other": "Other changes tokens, which the fused forward does not call",
        "shuffled": "has the arguments ('x', 'order'), which are not known",
        "buffer": "it holds the buffers bias",
        "layer": "it holds k_norm",
        "engine": "it runs on Transformer Engine",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name], reasons[name]
        assert f"left {name}: " in str(report)


def test_other_results_are_found_and_left() -> None:
    class Normalised(FLARE):
        def forward(self, x: Tensor) -> Tensor:
            tokens = nn.functional.normalize(self.tokens(x), dim=-1)
            return self.output(self.through_latents(tokens))

    Normalised.__name__ = "FLARE"
    model = Normalised(DIM, HEADS, DIM_HEAD)
    with pytest.warns(
        UserWarning, match="(?s)accelerate replaced nothing: .*differs from the original with many tokens"
    ):
        report = accelerate(model, packages=PACKAGES)
    assert not report.replaced and type(model) is Normalised


def test_a_model_without_such_attention_is_named() -> None:
    with pytest.warns(UserWarning, match="Linear holds no attention of physicsnemo"):
        accelerate(nn.Linear(2, 2))


def test_calls_that_the_operation_cannot_do_run_the_original() -> None:
    module = gale_fa()
    fast = copy.deepcopy(module)
    accelerate(fast, packages=PACKAGES)
    with pytest.raises(RuntimeError):
        fast((torch.randn(1, 4, DIM + 1),), None)
    # A context that the batch shares: the original broadcasts it.
    x, context = (torch.randn(3, 4, DIM),), torch.randn(1, HEADS, 5, CONTEXT_DIM)
    torch.testing.assert_close(fast(x, context), module(x, context), rtol=0, atol=0)


def test_distributed_tensors_are_left_to_the_original() -> None:
    class Distributed(Tensor):
        def redistribute(self) -> Tensor:
            return self

    fast = flare()
    accelerate(fast, packages=PACKAGES)
    x = torch.randn(1, 4, DIM)
    assert fast.fused({"x": x}) is not None and fast.fused({"x": x.as_subclass(Distributed)}) is None
