"""The modules against a dense evaluation, and what makes them drop-in replacements."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anchor_attention import AttentionPattern, TokenSpec
from anchor_attention.modules import (
    AttentionConfig,
    CrossAnchorAttention,
    CrossAnchorAttentionConfig,
    JointAnchorAttention,
    MissingAnchorTokenError,
    MixedAttention,
    MultiBranchAnchorAttention,
    SelfAnchorAttention,
)
from tests.module_cases import (
    BRANCH_MODULES,
    DIM,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    HEAD_DIM,
    HEADS,
    dense,
    make,
    named_patterns,
    specs,
    total,
    unit_freqs,
)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_random_groups_agree_with_dense_evaluation(module_class: type, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    branches = ("ab", "b", "c_d")[: rng.randint(2, 3)]
    suffix = rng.choice(["_anchors", "_support", "0"])
    groups = {b + suffix: rng.randint(0, 5) for b in branches}
    groups |= {f"{b}_queries{i}": rng.randint(0, 6) for b in branches for i in range(rng.randint(0, 2))}
    if module_class is JointAnchorAttention and rng.random() < 0.5:
        del groups[branches[0] + suffix]
    token_specs = specs(**dict(rng.sample(list(groups.items()), len(groups))))
    batch, n = rng.randint(1, 3), total(token_specs)
    use_rope, masked, bias = rng.random() < 0.7, rng.random() < 0.5, rng.random() < 0.5
    module = make(module_class, branches=branches, anchor_suffix=suffix, use_rope=use_rope, bias=bias).double()
    x = torch.randn(batch, n, DIM, dtype=torch.float64, requires_grad=True)
    freqs = unit_freqs(rng.choice([1, batch]), n, torch.float64) if use_rope else None
    mask = torch.rand(batch, n) < 0.6 if masked else None

    y = module(x, token_specs, freqs, key_padding_mask=mask)
    patterns = named_patterns(module_class, branches, token_specs, suffix)
    expected = dense(module.mixed_attention, x, token_specs, patterns, freqs, mask)
    torch.testing.assert_close(y, expected, rtol=0, atol=FLOAT64_TOLERANCE)

    upstream = torch.randn_like(y)
    inputs = (x, *module.parameters())
    grads = torch.autograd.grad(y, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=100 * FLOAT64_TOLERANCE)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_queries_change_no_anchor_and_no_other_query(module_class: type) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_queries=6, surface_anchors=5, volume_anchors=4, volume_queries=7)
    module = make(module_class, use_rope=True)
    x, freqs = torch.randn(2, 22, DIM), unit_freqs(2, 22)
    changed = x.clone()
    changed[:, [0, 15]] = torch.nan
    y, y_changed = module(x, token_specs, freqs), module(changed, token_specs, freqs)
    others = [row for row in range(22) if row not in (0, 15)]
    assert torch.equal(y[:, others], y_changed[:, others])
    assert y_changed[:, [0, 15]].isnan().all()


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_anchors_change_exactly_their_readers(module_class: type) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=5, surface_queries=3, volume_anchors=4, volume_queries=2)
    module = make(module_class)
    x = torch.randn(1, 14, DIM)
    changed = x.clone()
    changed[:, 1] += 1
    moved = (module(x, token_specs) - module(changed, token_specs)).abs().amax(-1)[0] > 0
    surface, volume = slice(0, 8), slice(8, 14)
    reads_surface = {SelfAnchorAttention: (True, False), CrossAnchorAttention: (False, True)}
    surface_moves, volume_moves = reads_surface.get(module_class, (True, True))
    assert moved[1]
    assert (moved[surface].sum() > 1) == surface_moves and (moved[surface].all() or not surface_moves)
    assert moved[volume].any() == volume_moves and moved[volume].all() == volume_moves


def test_branch_names_that_are_prefixes_of_each_other() -> None:
    torch.manual_seed(0)
    token_specs = specs(wind_anchors=3, window_anchors=4, window_queries=2, wind_queries=5)
    module = make(SelfAnchorAttention, branches=("wind", "window")).double()
    x = torch.randn(2, 14, DIM, dtype=torch.float64)
    patterns = [
        (["wind_anchors", "wind_queries"], ["wind_anchors"]),
        (["window_anchors", "window_queries"], ["window_anchors"]),
    ]
    expected = dense(module.mixed_attention, x, token_specs, patterns)
    torch.testing.assert_close(module(x, token_specs), expected, rtol=0, atol=FLOAT64_TOLERANCE)


def test_repeated_and_overlapping_keys_in_mixed_patterns() -> None:
    torch.manual_seed(0)
    token_specs = specs(p=3, q=0, r=4, s=2)
    named = [(["s", "p"], ["r", "r", "s"]), (["r", "q"], ["p", "q"])]
    patterns = [AttentionPattern(queries, keys) for queries, keys in named]
    module = MixedAttention(dim=DIM, num_heads=HEADS, init_weights="torch").double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    expected = dense(module, x, token_specs, named)
    torch.testing.assert_close(module(x, token_specs, patterns), expected, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_masked_batch_equals_unpadded_runs(module_class: type) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6, volume_queries=3)
    module = make(module_class, use_rope=True)
    x, freqs = torch.randn(3, 18, DIM), unit_freqs(3, 18)
    mask = torch.ones(3, 18, dtype=torch.bool)
    counts = [(4, 6), (1, 3), (2, 1)]
    for b, (surface, volume) in enumerate(counts):
        mask[b, surface:4] = False
        mask[b, 9 + volume : 15] = False
    # What a padded token holds must not matter to anybody else.
    x[~mask] = 1e3
    y = module(x, token_specs, freqs, key_padding_mask=mask)
    for b, (surface, volume) in enumerate(counts):
        rows = [*range(surface), *range(4, 9), *range(9, 9 + volume), *range(15, 18)]
        short = specs(surface_anchors=surface, surface_queries=5, volume_anchors=volume, volume_queries=3)
        expected = module(x[b : b + 1, rows], short, freqs[b : b + 1, rows])
        torch.testing.assert_close(y[b : b + 1, rows], expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_mask_of_query_groups_is_ignored() -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6)
    module = make(SelfAnchorAttention)
    x = torch.randn(2, 15, DIM)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[:, 4:9] = False
    torch.testing.assert_close(module(x, token_specs, key_padding_mask=mask), module(x, token_specs), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_no_keys_give_the_bias_and_zero_gradients(training: bool) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=0, surface_queries=3, volume_anchors=2, volume_queries=4)
    module = make(SelfAnchorAttention, use_rope=True, dropout=1e-9).train(training)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:5] = False
    y = module(x, token_specs, unit_freqs(2, 9), key_padding_mask=mask)
    bias = module.mixed_attention.proj.bias
    keyless = torch.zeros(2, 9, dtype=torch.bool)
    keyless[:, :3] = keyless[1] = True
    assert torch.equal(y[keyless], bias.expand(int(keyless.sum()), DIM))
    y.square().sum().backward()
    assert torch.equal(x.grad[keyless], torch.zeros_like(x.grad[keyless]))
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_zero_sizes(module_class: type) -> None:
    module = make(module_class, use_rope=True)
    sizes = specs(surface_anchors=2, surface_queries=0, volume_anchors=3, volume_queries=0)
    assert module(torch.randn(0, 5, DIM), sizes, unit_freqs(1, 5)).shape == (0, 5, DIM)
    empty = specs(surface_anchors=0, surface_queries=0, volume_anchors=0)
    y, cache = module(torch.randn(2, 0, DIM), empty, unit_freqs(2, 0), return_kv_cache=True)
    assert y.shape == (2, 0, DIM)
    assert {name: tuple(entry["k"].shape) for name, entry in cache.items()} == {
        "surface_anchors": (2, HEADS, 0, HEAD_DIM),
        "volume_anchors": (2, HEADS, 0, HEAD_DIM),
    }


def separate_state_dict(module: MixedAttention) -> dict[str, torch.Tensor]:
    weights = dict(module.state_dict())
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in weights:
            for name, part in zip("qkv", weights.pop(f"qkv.{kind}").chunk(3), strict=True):
                weights[f"{name}.{kind}"] = part.clone()
    return weights


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_both_state_dicts_load(bias: bool, assign: bool) -> None:
    source = make(SelfAnchorAttention, bias=bias)
    x, token_specs = torch.randn(1, 5, DIM), specs(surface_anchors=2, volume_anchors=3)
    expected = source(x, token_specs)
    assert set(source.state_dict()) == {
        f"mixed_attention.{layer}.{kind}" for layer in ("qkv", "proj") for kind in (("weight", "bias")[: 1 + bias])
    }
    fused = source.mixed_attention.state_dict()
    for weights in (fused, separate_state_dict(source.mixed_attention)):
        # Nested, because checkpoints hold whole models: the prefix must be respected.
        target = torch.nn.Sequential(torch.nn.Identity(), make(SelfAnchorAttention, bias=bias))
        prefixed = {f"1.mixed_attention.{name}": weight for name, weight in weights.items()}
        names_before = list(prefixed)
        target.load_state_dict(prefixed, strict=True, assign=assign)
        assert list(prefixed) == names_before
        assert torch.equal(target[1](x, token_specs), expected)


def test_incomplete_state_dicts_are_refused() -> None:
    weights = separate_state_dict(MixedAttention(dim=DIM, num_heads=HEADS))
    del weights["k.weight"]
    with pytest.raises(RuntimeError, match=r"qkv\.weight"):
        MixedAttention(dim=DIM, num_heads=HEADS).load_state_dict(weights)
    weights = separate_state_dict(MixedAttention(dim=2 * DIM, num_heads=HEADS))
    with pytest.raises(RuntimeError, match=r"size mismatch for qkv\.weight"):
        MixedAttention(dim=DIM, num_heads=HEADS).load_state_dict(weights)


@pytest.mark.parametrize("init", ["truncnormal002", "truncnormal", "truncnormal002-identity", "zeros", "torch"])
def test_initialisation(init: str) -> None:
    torch.manual_seed(0)
    module = MixedAttention(dim=192, num_heads=3, init_weights=init)
    for name, linear in (("qkv", module.qkv), ("proj", module.proj)):
        n = linear.weight.numel()
        if init == "zeros" or (init == "truncnormal002-identity" and name == "proj"):
            assert not linear.weight.any()
        elif init == "torch":
            # Uniform within ± dim^-½.
            assert linear.weight.abs().max() <= 192**-0.5 < 1.001 * linear.weight.abs().max()
            assert linear.bias.any()
        else:
            # A sample standard deviation scatters by std / √(2 n); five of those.
            assert abs(linear.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        if init != "torch":
            assert not linear.bias.any()


class ChainAttention(MultiBranchAnchorAttention):
    """Every branch reads the anchors of the branch before it; the first one reads its own."""

    def _create_attention_patterns(self, token_specs: Sequence[TokenSpec]) -> list[AttentionPattern]:
        previous = (self.branches[0], *self.branches)
        return [
            AttentionPattern(
                [spec.name for spec in token_specs if spec.name.startswith(branch)], [previous[i] + self.anchor_suffix]
            )
            for i, branch in enumerate(self.branches)
        ]

    def _validate(self, token_specs: Sequence[TokenSpec]) -> None:
        if self.branches[0] + self.anchor_suffix not in [spec.name for spec in token_specs]:
            raise MissingAnchorTokenError(f"the chain starts at {self.branches[0]}")


def test_subclass_with_patterns_and_validation_of_its_own() -> None:
    torch.manual_seed(0)
    module = make(ChainAttention, branches=("a", "b", "c"), use_rope=True).double()
    # The last branch has no anchors, which the base class would refuse.
    token_specs = specs(c_queries=4, a_anchors=3, b_anchors=2)
    x, freqs = torch.randn(2, 9, DIM, dtype=torch.float64), unit_freqs(2, 9, torch.float64)
    patterns = [(["a_anchors"], ["a_anchors"]), (["b_anchors"], ["a_anchors"]), (["c_queries"], ["b_anchors"])]
    expected = dense(module.mixed_attention, x, token_specs, patterns, freqs)
    torch.testing.assert_close(module(x, token_specs, freqs), expected, rtol=0, atol=FLOAT64_TOLERANCE)
    with pytest.raises(MissingAnchorTokenError, match="the chain starts at a"):
        module(x, specs(c_queries=4, b_anchors=5), freqs)
    # Patterns are asked for in every call: a subclass may depend on more than the groups.
    module.branches = ("b", "a", "c")
    y = module(x, token_specs, freqs)
    assert (y - expected).abs().max() > 1e-3


def test_foreign_objects_with_the_same_attributes() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_dim=DIM,
        num_heads=HEADS,
        use_rope=False,
        dropout=0.0,
        init_weights="torch",
        bias=True,
        head_dim=HEAD_DIM,
        branches=["surface", "volume"],
        anchor_suffix="_anchors",
        something_else=3,
    )
    module = CrossAnchorAttention(config)
    assert module.branches == ("surface", "volume") and module.anchor_suffix == "_anchors"
    ours = specs(surface_anchors=2, volume_anchors=3)
    theirs = [SimpleNamespace(name=spec.name, size=spec.size) for spec in ours]
    x = torch.randn(1, 5, DIM)
    assert torch.equal(module(x, theirs), module(x, ours))
    patterns = [SimpleNamespace(query_tokens=["a"], key_value_tokens=["a"])]
    mixed = MixedAttention(config)
    expected = mixed(x, specs(a=5), [AttentionPattern(["a"], ["a"])])
    assert torch.equal(mixed(x, specs(a=5), patterns), expected)


def test_configs_and_keywords_make_the_same_module() -> None:
    fields = {"num_heads": HEADS, "branches": ["surface", "volume"], "dropout": 0.1, "anchor_suffix": "_a"}
    config = CrossAnchorAttentionConfig(hidden_dim=DIM, **fields)
    assert config.head_dim == HEAD_DIM
    for module in (
        CrossAnchorAttention(config),
        CrossAnchorAttention(config=config),
        CrossAnchorAttention(hidden_dim=DIM, **fields),
        CrossAnchorAttention(dim=DIM, **fields),
        JointAnchorAttention(config),
    ):
        assert (module.branches, module.anchor_suffix) == (("surface", "volume"), "_a")
        mixed = module.mixed_attention
        assert (mixed.hidden_dim, mixed.num_heads, mixed.head_dim, mixed.dropout) == (DIM, HEADS, HEAD_DIM, 0.1)
    assert AttentionConfig(hidden_dim=DIM, num_heads=HEADS).init_weights == "truncnormal002"


def test_returns_a_tensor_unless_the_cache_is_asked_for() -> None:
    module = make(SelfAnchorAttention)
    x, token_specs = torch.randn(1, 5, DIM), specs(surface_anchors=2, volume_anchors=3)
    assert isinstance(module(x, token_specs), torch.Tensor)
    y, cache = module(x, token_specs, return_kv_cache=True)
    assert isinstance(y, torch.Tensor) and isinstance(cache, dict)
    alone = specs(surface_anchors=None, volume_anchors=None, volume_queries=5)
    assert isinstance(module(x, alone, kv_cache=cache), torch.Tensor)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_copies_are_equal_and_independent(module_class: type, duplicate: Callable[[Any], Any]) -> None:
    module = make(module_class)
    x, token_specs = torch.randn(1, 5, DIM), specs(surface_anchors=2, volume_anchors=3)
    expected = module(x, token_specs)
    twin = duplicate(module)
    assert torch.equal(twin(x, token_specs), expected)
    with torch.no_grad():
        twin.mixed_attention.proj.weight.zero_()
    assert torch.equal(module(x, token_specs), expected)


class LowRankAdapter(torch.nn.Linear):
    """A linear layer with a trained correction beside its weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


def test_a_replaced_projection_acts_in_every_call() -> None:
    module = make(SelfAnchorAttention)
    merged = copy.deepcopy(module)
    adapter = LowRankAdapter(module.mixed_attention.qkv)
    module.mixed_attention.qkv = adapter
    with torch.no_grad():
        merged.mixed_attention.qkv.weight += adapter.up.weight @ adapter.down.weight
    x = torch.randn(2, 12, DIM)
    anchors_alone = specs(surface_anchors=5, volume_anchors=7)
    with_queries = specs(surface_anchors=3, surface_queries=2, volume_anchors=3, volume_queries=4)
    for token_specs in (anchors_alone, with_queries):
        torch.testing.assert_close(module(x, token_specs), merged(x, token_specs), rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_half_precision_modules(module_class: type, dtype: torch.dtype) -> None:
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6)
    module = make(module_class, use_rope=True)
    x, freqs = torch.randn(2, 15, DIM), unit_freqs(2, 15)
    expected = module(x, token_specs, freqs)
    y = module.to(dtype)(x.to(dtype), token_specs, freqs)
    assert y.dtype == dtype
    # Roundings of the input, the weights, q or k, v, the attention and the output, of values of order one.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=6 * torch.finfo(dtype).eps)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6)
    module = make(JointAnchorAttention, use_rope=True, dropout=0.5)
    plain = make(JointAnchorAttention, use_rope=True)
    plain.load_state_dict(module.state_dict())
    x, freqs = torch.randn(2, 15, DIM), unit_freqs(2, 15)
    expected = plain(x, token_specs, freqs)
    assert torch.equal(module.eval()(x, token_specs, freqs), expected)
    module.train()
    torch.manual_seed(1)
    first = module(x, token_specs, freqs)
    torch.manual_seed(1)
    assert torch.equal(module(x, token_specs, freqs), first)
    # Dropped weights are made up for: the mean over many draws is the result without dropout.
    with torch.no_grad():
        draws = torch.stack([module(x, token_specs, freqs) for _ in range(400)])
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - expected).abs() < 6 * draws.std(0) / 400**0.5).all()


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_training_path_with_dropout_computes_the_same(module_class: type) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6, volume_queries=2, surface_more=0)
    # So rarely that nothing is dropped here.
    module = make(module_class, use_rope=True, dropout=1e-12).double()
    x = torch.randn(2, 17, DIM, dtype=torch.float64, requires_grad=True)
    freqs, mask = unit_freqs(2, 17, torch.float64), torch.rand(2, 17) < 0.6
    results = []
    for training in (True, False):
        y, cache = module.train(training)(x, token_specs, freqs, key_padding_mask=mask, return_kv_cache=True)
        results.append((y, cache["volume_anchors"]["k"], *torch.autograd.grad(y.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_no_dropout_after_the_output_projection() -> None:
    module = make(SelfAnchorAttention, init_weights="zeros", dropout=0.5).train()
    with torch.no_grad():
        module.mixed_attention.proj.bias.fill_(1.0)
    y = module(torch.randn(2, 40, DIM), specs(surface_anchors=20, volume_anchors=20))
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_autocast(dropout: float) -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=4, surface_queries=5, volume_anchors=6)
    module = make(JointAnchorAttention, use_rope=True, dropout=dropout)
    x, freqs = torch.randn(2, 15, DIM, requires_grad=True), unit_freqs(2, 15)
    expected = module(x, token_specs, freqs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cache = module(x, token_specs, freqs, return_kv_cache=True)
        cached = module(
            x[:, 4:9],
            specs(surface_anchors=None, surface_queries=5, volume_anchors=None),
            freqs[:, 4:9],
            kv_cache=cache,
        )
    assert y.dtype == cache["surface_anchors"]["k"].dtype == torch.bfloat16
    # Four roundings to 8 bits (q, k or v, attention, projection) of values of order one.
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(cached.float(), expected[:, 4:9], rtol=0, atol=tolerance)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_shapes_are_inferred_on_the_meta_device() -> None:
    token_specs = specs(surface_anchors=5, surface_queries=3, volume_anchors=4)
    with torch.device("meta"):
        module = make(SelfAnchorAttention, use_rope=True)
        x = torch.randn(2, 12, DIM, requires_grad=True)
        freqs = torch.empty(1, 12, HEAD_DIM // 2, dtype=torch.complex64)
    y = module(x, token_specs, freqs)
    y.sum().backward()
    assert y.shape == x.shape and y.device.type == "meta"
    assert x.grad is not None and x.grad.shape == x.shape
