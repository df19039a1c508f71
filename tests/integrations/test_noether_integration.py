"""``accelerate`` against classes that look like those of the package, and against the package where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anchor_attention
from anchor_attention import AttentionPattern, TokenSpec
from anchor_attention.integrations import noether
from anchor_attention.integrations.noether import accelerate, accelerated_class, restore
from tests.integrations import noether_lookalikes as lookalikes
from tests.module_cases import queries_alone, rows_of, specs, total

PACKAGES = (*noether.PACKAGES, __name__.split(".")[0])
DIM, HEADS, HEAD_DIM = lookalikes.DIM, lookalikes.HEADS, lookalikes.DIM // lookalikes.HEADS
# Float64 sums of some hundred terms of order one, in two orders.
TOLERANCE = 1e-11
SPECS = specs(surface_anchors=5, surface_queries=7, volume_anchors=4, volume_queries=6)
FLOAT64 = torch.float64


def angles(batch: int, n: int) -> Tensor:
    angle = torch.rand(batch, n, HEAD_DIM // 2, dtype=FLOAT64) * 6
    return torch.polar(torch.ones_like(angle), angle)


def accelerated(module: nn.Module) -> nn.Module:
    fast = copy.deepcopy(module)
    # That what is verified is accelerated has tests of its own.
    report = accelerate(fast, packages=PACKAGES, verify=False)
    assert len(report.replaced) == 1 and not report.left, str(report)
    return fast


def assert_same(module: nn.Module, fast: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """Outputs, caches and the gradients of all parameters."""

    def results(candidate: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        candidate.zero_grad()
        outputs = torch.utils._pytree.tree_leaves(call(candidate))
        outputs = [output for output in outputs if isinstance(output, Tensor) and output.is_floating_point()]
        sum((output * torch.arange(output.shape[-1]).cos()).sum() for output in outputs).backward()
        return outputs, {name: p.grad for name, p in candidate.named_parameters() if p.grad is not None}

    expected, expected_grads = results(module)
    found, found_grads = results(fast)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert set(found_grads) == set(expected_grads)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=0, atol=10 * TOLERANCE, msg=name)


BRANCH_CLASSES = [
    lookalikes.SelfAnchorAttention,
    lookalikes.CrossAnchorAttention,
    lookalikes.JointAnchorAttention,
    lookalikes.SplitSelfAnchorAttention,
    lookalikes.SplitCrossAnchorAttention,
    lookalikes.SplitJointAnchorAttention,
    lookalikes.UntiedCrossAnchorAttention,
]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("module_class", BRANCH_CLASSES)
def test_anchor_attention_stays_the_same(module_class: type, use_rope: bool, qk_norm: bool) -> None:
    if module_class is lookalikes.UntiedCrossAnchorAttention:
        qk_norm = False
    module = module_class(use_rope=use_rope, qk_norm=qk_norm).double()
    x = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64)
    freqs = angles(2, total(SPECS)) if use_rope else None
    fast = accelerated(module)

    def output(candidate: nn.Module) -> Any:
        result = candidate(x, SPECS, freqs=freqs)
        return result[0] if isinstance(result, tuple) else result

    assert_same(module, fast, output)


@pytest.mark.parametrize("module_class", BRANCH_CLASSES[3:])
def test_masked_batches_stay_the_same(module_class: type) -> None:
    module = module_class().double()
    x, freqs = torch.randn(3, total(SPECS), DIM, dtype=FLOAT64), angles(3, total(SPECS))
    mask = torch.rand(3, total(SPECS)) < 0.6
    # Plain attention to no key at all is NaN in some versions of torch.
    mask[:, rows_of(SPECS, ["surface_anchors"])[0]] = True
    mask[:, rows_of(SPECS, ["volume_anchors"])[0]] = True

    def output(candidate: nn.Module) -> Any:
        result = candidate(x, SPECS, key_padding_mask=mask, freqs=freqs)
        return result[0] if isinstance(result, tuple) else result

    assert_same(module, accelerated(module), output)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("module_class", BRANCH_CLASSES[3:6])
def test_caches_are_interchangeable(module_class: type, qk_norm: bool) -> None:
    module = module_class(qk_norm=qk_norm).double()
    fast = accelerated(module)
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    alone, rows = queries_alone(SPECS)
    expected, cache = module(x, SPECS, freqs=freqs)
    _, fast_cache = fast(x, SPECS, freqs=freqs)
    assert set(fast_cache) == set(cache) == {"surface_anchors", "volume_anchors"}
    for candidate, own_cache in ((module, fast_cache), (fast, cache), (fast, fast_cache)):
        out, no_cache = candidate(x[:, rows], alone, freqs=freqs[:, rows], kv_cache=own_cache)
        assert no_cache is None
        torch.testing.assert_close(out, expected[:, rows], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(
            {"surface_anchors": 5, "surface_queries": 7, "volume_anchors": 5, "volume_queries": 7}, id="equal"
        ),
        pytest.param({"surface_anchors": 21, "volume_anchors": 11, "volume_queries": 9}, id="nearly"),
        pytest.param({"surface_anchors": 5, "surface_queries": 7, "volume_anchors": 4}, id="unequal"),
    ],
)
def test_untied_projections_are_called_with_all_tokens(sizes: dict[str, int]) -> None:
    groups = specs(**sizes)
    module = lookalikes.UntiedCrossAnchorAttention().double()
    x, freqs = torch.randn(2, total(groups), DIM, dtype=FLOAT64), angles(2, total(groups))
    fast = accelerated(module)
    assert_same(module, fast, lambda candidate: candidate(x, groups, freqs=freqs))


def test_untied_projections_have_no_cache_as_in_the_original() -> None:
    """Which matrix a projection multiplies by depends on the groups of the call: a cached call would differ."""
    module = lookalikes.UntiedCrossAnchorAttention().double()
    fast = accelerated(module)
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    for candidate in (module, fast):
        assert isinstance(candidate(x, SPECS, freqs=freqs), Tensor)
        with pytest.raises(NotImplementedError, match="kv_cache"):
            candidate(x, SPECS, freqs=freqs, kv_cache={"surface_anchors": {}})


def test_replacing_nothing_warns_and_says_why() -> None:
    with pytest.warns(UserWarning, match=r"(?s)replaced nothing: .*OwnForward, which is not known"):
        accelerate(OwnForward(), packages=PACKAGES)
    with pytest.warns(UserWarning, match="Linear holds no attention of noether"):
        accelerate(nn.Linear(3, 3))


def test_untied_mixed_attention_by_itself_returns_a_tensor() -> None:
    module = lookalikes.UntiedMixedAttention().double()
    patterns = [AttentionPattern([spec.name for spec in SPECS], ["surface_queries", "volume_anchors"])]
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    assert_same(module, accelerated(module), lambda candidate: candidate(x, SPECS, patterns, freqs=freqs))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("module_class", [lookalikes.DotProductAttention, lookalikes.SplitDotProductAttention])
def test_plain_attention_stays_the_same(module_class: type, qk_norm: bool) -> None:
    module = module_class(qk_norm=qk_norm).double()
    fast = accelerated(module)
    x, freqs = torch.randn(2, 9, DIM, dtype=FLOAT64), angles(2, 9)
    key_mask = (torch.rand(2, 9) < 0.6)[:, None, None] | (torch.arange(9) == 4)
    masks = {
        "none": None,
        "keys": key_mask,
        "the same keys for all samples": key_mask[:1],
        "any": (torch.rand(2, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool),
        "added": torch.randn(9, 9, dtype=FLOAT64),
    }
    for mask in masks.values():
        assert_same(module, fast, lambda candidate, mask=mask: candidate(x, attn_mask=mask, freqs=freqs))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_perceiver_attention_stays_the_same(qk_norm: bool) -> None:
    q, kv = torch.randn(2, 9, DIM, dtype=FLOAT64), torch.randn(2, 5, 7, dtype=FLOAT64)
    q_freqs, k_freqs = angles(2, 9), angles(2, 5)
    for module_class in (lookalikes.PerceiverAttention, lookalikes.SplitPerceiverAttention):
        module = module_class(kv_dim=7, qk_norm=qk_norm).double()
        fast = accelerated(module)
        for mask in (None, torch.tensor([[[[True, False, True, True, False]]]]), torch.randn(9, 5, dtype=FLOAT64)):
            assert_same(
                module,
                fast,
                lambda candidate, mask=mask: candidate(q, kv, mask, q_freqs=q_freqs, k_freqs=k_freqs),
            )
    cache = module(q, kv, q_freqs=q_freqs, k_freqs=k_freqs)[1]
    for candidate in (module, fast):
        out, no_cache = candidate(q, q_freqs=q_freqs, kv_cache=cache)
        assert no_cache is None
        torch.testing.assert_close(out, module(q, kv, q_freqs=q_freqs, k_freqs=k_freqs)[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="Either kv or kv_cache must be provided"):
        fast(q, q_freqs=q_freqs)


def test_dropout_while_training_is_computed_by_the_original() -> None:
    module = lookalikes.DotProductAttention(dropout=0.5).double()
    fast = accelerated(module)
    x, freqs = torch.randn(2, 9, DIM, dtype=FLOAT64), angles(2, 9)
    outputs = []
    for candidate in (module, fast):
        torch.manual_seed(1)
        outputs.append(candidate(x, freqs=freqs))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], module.eval()(x, freqs=freqs))


class OwnPatterns(lookalikes.SplitMultiBranchAnchorAttention):
    def _create_attention_patterns(self, token_specs: Any) -> list[AttentionPattern]:
        return [AttentionPattern([spec.name], [spec.name]) for spec in token_specs]


def test_a_subclass_keeps_its_patterns() -> None:
    module = OwnPatterns(use_rope=False).double()
    x = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64)
    fast = accelerated(module)
    assert_same(module, fast, lambda candidate: candidate(x, SPECS)[0])
    changed = x.clone()
    changed[:, 0] += 1
    difference = (fast(changed, SPECS)[0] - fast(x, SPECS)[0]).abs().amax(dim=(0, 2))
    assert (difference[:5] > 1e-9).all() and not difference[5:].any()


class OwnForward(lookalikes.SplitMixedAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnStep(lookalikes.SplitMixedAttention):
    def attend(self, *args: Any, **kwargs: Any) -> Any:
        return super().attend(*args, **kwargs)


class OwnNorm(lookalikes.SplitMixedAttention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(HEAD_DIM)


class TransolverAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slices = nn.Linear(DIM, 4)


def model() -> nn.ModuleDict:
    instance = lookalikes.SplitMixedAttention()
    instance.forward = instance.forward  # type: ignore[method-assign]
    return nn.ModuleDict(
        {
            "cross": lookalikes.SplitCrossAnchorAttention(),
            "plain": nn.Sequential(lookalikes.DotProductAttention(), nn.LayerNorm(DIM)),
            "own_forward": OwnForward(),
            "own_step": OwnStep(),
            "own_norm": OwnNorm(),
            "instance": instance,
            "transolver": TransolverAttention(),
            "mlp": nn.Linear(DIM, DIM),
        }
    )


def test_the_report_says_what_was_replaced_and_why_not() -> None:
    whole = model()
    report = accelerate(whole, packages=PACKAGES)
    assert [(module.name, module.class_name, module.used_by) for module in report.replaced] == [
        ("cross.mixed_attention", "MixedAttention", "SplitCrossAnchorAttention"),
        ("plain.0", "DotProductAttention", ""),
    ]
    reasons = {module.name: module.reason for module in report.left}
    assert set(reasons) == {"own_forward", "own_step", "own_norm", "instance", "transolver"}
    assert "OwnForward, which is not known" in reasons["own_forward"]
    assert "OwnStep changes attend" in reasons["own_step"]
    assert "q_norm" in reasons["own_norm"]
    assert "forward is set on the instance" in reasons["instance"]
    assert "which is not known" in reasons["transolver"]
    for part in ("replaced 2", "left 5", "cross.mixed_attention", "SplitCrossAnchorAttention", "OwnStep changes"):
        assert part in str(report)

    again = accelerate(whole, packages=PACKAGES)
    assert not again.replaced
    assert {module.name for module in again.left if module.reason == "already accelerated"} == {
        "cross.mixed_attention",
        "plain.0",
    }
    # Classes of the same name in a package of somebody else are not touched.
    with pytest.warns(UserWarning, match="replaced nothing"):
        assert not accelerate(model()).replaced


def test_unknown_arguments_are_refused() -> None:
    class Renamed(nn.Module):
        def forward(self, x: Tensor, attn_mask: Tensor, bias: Tensor) -> Tensor:
            return x

    Renamed.__name__ = "DotProductAttention"
    with pytest.raises(ValueError, match=r"has the arguments \('x', 'attn_mask', 'bias'\)"):
        accelerated_class(Renamed, packages=PACKAGES)


def test_parameters_hooks_and_classes_survive_and_restore_undoes_it() -> None:
    whole = model()
    parameters = {name: id(parameter) for name, parameter in whole.named_parameters()}
    classes = {name: type(module) for name, module in whole.named_modules()}
    optimiser = torch.optim.SGD(whole.parameters(), lr=0.1)
    calls: list[str] = []
    whole["plain"][0].register_forward_hook(lambda *_: calls.append("hook"))
    accelerate(whole, packages=PACKAGES)

    assert {name: id(parameter) for name, parameter in whole.named_parameters()} == parameters
    assert list(whole.state_dict()) == list(model().state_dict())
    assert all(isinstance(module, classes[name]) for name, module in whole.named_modules())
    before = whole["plain"][0].qkv.weight.clone()
    x, angle = torch.randn(2, 9, DIM), torch.rand(2, 9, HEAD_DIM // 2)
    whole["plain"][0](x, freqs=torch.polar(torch.ones_like(angle), angle)).sum().backward()
    optimiser.step()
    assert calls == ["hook"] and not torch.equal(before, whole["plain"][0].qkv.weight)

    assert restore(whole) == 2
    assert {name: type(module) for name, module in whole.named_modules()} == classes
    assert restore(whole) == 0


def test_accelerated_models_can_be_pickled_and_copied() -> None:
    module = accelerated(lookalikes.UntiedCrossAnchorAttention().double())
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(twin.mixed_attention) is type(module.mixed_attention)
        assert torch.equal(twin(x, SPECS, freqs=freqs)[0], module(x, SPECS, freqs=freqs)[0])


@pytest.mark.parametrize("module_class", [lookalikes.CrossAnchorAttention, *BRANCH_CLASSES[4:]])
def test_accelerated_modules_compile_without_a_break(module_class: type) -> None:
    torch.compiler.reset()
    module = accelerated(module_class().double())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    expected, found = (
        torch.utils._pytree.tree_leaves(candidate(x, SPECS, freqs=freqs)) for candidate in (module, compiled)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "module_class", [noether.SelfAnchorAttention, noether.CrossAnchorAttention, noether.JointAnchorAttention]
)
def test_classes_for_block_configs_return_the_cache(module_class: type) -> None:
    module = module_class(
        hidden_dim=DIM, num_heads=HEADS, branches=("surface", "volume"), use_rope=True, init_weights="torch"
    )
    x, freqs = torch.randn(2, total(SPECS), DIM), angles(2, total(SPECS)).to(torch.complex64)
    alone, rows = queries_alone(SPECS)
    y, cache = module(x, token_specs=SPECS, freqs=freqs, kv_cache=None)
    out, no_cache = module(x[:, rows], token_specs=alone, freqs=freqs[:, rows], kv_cache=cache)
    assert no_cache is None
    # Float32 results of order one.
    torch.testing.assert_close(out, y[:, rows], rtol=0, atol=1e-5)


def block_classes() -> list[Callable[[type], nn.Module]]:
    """What builds a transformer block around an attention class: a look-alike, and the package's where installed."""

    class Block(nn.Module):
        def __init__(self, attention_constructor: type) -> None:
            super().__init__()
            config = SimpleNamespace(
                hidden_dim=DIM, num_heads=HEADS, use_rope=True, branches=["surface", "volume"], mlp_expansion_factor=4
            )
            self.attention_block = attention_constructor(config=config)

        def forward(self, x: Tensor, attn_kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
            result = self.attention_block(x, **attn_kwargs)
            out, cache = result if isinstance(result, tuple) else (result, None)
            return x + out, cache

    builders: list[Callable[[type], nn.Module]] = [Block]
    if importlib.util.find_spec("noether") is not None:
        from noether.core.schemas.modules.blocks import TransformerBlockConfig
        from noether.modeling.modules.blocks import TransformerBlock

        def build(attention_constructor: type) -> nn.Module:
            config = TransformerBlockConfig(hidden_dim=DIM, num_heads=HEADS, mlp_expansion_factor=4, use_rope=True)
            config.attention_constructor = attention_constructor
            config.attention_arguments = {"branches": ("surface", "volume")}
            return TransformerBlock(config)

        builders.append(build)
    return builders


@pytest.mark.parametrize(
    "module_class",
    [
        anchor_attention.SelfAnchorAttention,
        anchor_attention.CrossAnchorAttention,
        noether.SelfAnchorAttention,
        noether.CrossAnchorAttention,
        noether.JointAnchorAttention,
    ],
)
def test_our_classes_are_attention_constructors(module_class: type) -> None:
    for build in block_classes():
        block = build(module_class)
        assert isinstance(block.attention_block, module_class)
        x, freqs = torch.randn(2, total(SPECS), DIM), angles(2, total(SPECS)).to(torch.complex64)
        y, cache = block(x, attn_kwargs={"token_specs": SPECS, "freqs": freqs, "kv_cache": None})
        assert y.shape == x.shape
        if module_class.__module__ != noether.__name__:
            assert cache is None
            continue
        alone, rows = queries_alone(SPECS)
        keywords = {"token_specs": alone, "freqs": freqs[:, rows], "kv_cache": cache}
        # Float32 results of order one.
        torch.testing.assert_close(block(x[:, rows], attn_kwargs=keywords)[0], y[:, rows], rtol=0, atol=1e-5)


def test_token_specs_of_the_package_are_duck_typed() -> None:
    class Spec:
        def __init__(self, name: str, size: int) -> None:
            self.name, self.size = name, size

    module = accelerated(lookalikes.SplitJointAnchorAttention(use_rope=False).double())
    x = torch.randn(1, total(SPECS), DIM, dtype=FLOAT64)
    theirs = [Spec(spec.name, spec.size or 0) for spec in SPECS]
    ours = [TokenSpec(spec.name, spec.size) for spec in SPECS]
    assert torch.equal(module(x, theirs)[0], module(x, ours)[0])


def test_masks_do_not_travel_with_caches_where_the_original_leaves_them_out() -> None:
    module = lookalikes.SplitJointAnchorAttention().double()
    fast = accelerated(module)
    x, freqs = torch.randn(2, total(SPECS), DIM, dtype=FLOAT64), angles(2, total(SPECS))
    alone, rows = queries_alone(SPECS)
    for batch in (1, 2):
        mask = torch.rand(batch, total(SPECS)) < 0.6
        mask[:, 0] = True
        found = []
        for candidate in (module, fast):
            out, cache = candidate(x, SPECS, key_padding_mask=mask, freqs=freqs)
            assert all(set(entry) == {"k", "v"} for entry in cache.values())
            found.append((out, candidate(x[:, rows], alone, freqs=freqs[:, rows], kv_cache=cache)[0]))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)
