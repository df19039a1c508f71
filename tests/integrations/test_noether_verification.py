"""Each module is compared with its original before it is replaced: what differs is left, and nothing is disturbed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from anchor_attention.integrations.noether import accelerate
from tests.integrations import noether_lookalikes as lookalikes
from tests.integrations.test_noether_integration import PACKAGES


def test_a_forward_that_does_more_than_its_arguments_say_is_left_alone() -> None:
    class Normalising(lookalikes.DotProductAttention):
        def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().projections(x)
            return nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1), v

        forward = lookalikes.DotProductAttention.forward

    class Detaching(lookalikes.DotProductAttention):
        """Equal outputs, other gradients."""

        def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().projections(x)
            return q, k.detach(), v.detach()

        forward = lookalikes.DotProductAttention.forward

    calls: list[str] = []
    for variant in (Normalising, Detaching):
        variant.__name__ = "DotProductAttention"
        model = nn.Sequential(variant(), lookalikes.DotProductAttention())
        for layer in model:
            layer.register_forward_hook(lambda *_: calls.append("module"))
            layer.qkv.register_forward_hook(lambda *_: calls.append("layer"))
        model[1].eval()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        report = accelerate(model, packages=PACKAGES)
        assert torch.equal(torch.rand(3), expected) and not calls
        assert [len(layer._forward_hooks) for layer in model] == [1, 1]
        assert model[0].training and not model[1].training and not model[1].qkv.training
        assert [module.name for module in report.replaced] == ["1"]
        (left,) = report.left
        assert "differs from the original with no mask: by" in left.reason, left.reason
        assert type(model[0]) is variant
        assert len(accelerate(nn.Sequential(variant()), packages=PACKAGES, verify=False).replaced) == 1


def test_what_cannot_be_run_is_left_alone() -> None:
    class Failing(lookalikes.DotProductAttention):
        def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            raise RuntimeError("sharded")

        forward = lookalikes.DotProductAttention.forward

    Failing.__name__ = "DotProductAttention"
    with pytest.warns(UserWarning, match="could not be verified, .*RuntimeError: sharded.*verify=False"):
        accelerate(Failing(), packages=PACKAGES)


def test_verification_changes_no_buffer_calls_no_hook_and_seeds_no_other_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = lookalikes.SplitDotProductAttention()
    nn.utils.parametrizations.spectral_norm(module.q)
    nn.utils.spectral_norm(module.k)
    calls: list[str] = []
    module.k.register_forward_hook(lambda *_: calls.append("layer"))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert buffers
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: calls.append("seed"))
    with pytest.warns(UserWarning, match="replaced nothing"):
        accelerate(module, packages=PACKAGES)
    assert not calls
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())


def test_a_module_with_buffers_of_its_own_is_left_alone() -> None:
    module = lookalikes.DotProductAttention()
    module.register_buffer("temperature", torch.ones(()))
    with pytest.warns(UserWarning, match="holds the buffers temperature"):
        accelerate(module, packages=PACKAGES)
