"""Every error of the modules: its type, and the values in its text."""

from __future__ import annotations

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
    JointAnchorAttentionConfig,
    MissingAnchorTokenError,
    MissingBranchTokensError,
    MixedAttention,
    MultiBranchAnchorAttention,
    MultiBranchAnchorAttentionConfig,
    SelfAnchorAttention,
    UnexpectedTokenError,
)

DIM = 32
BRANCH_MODULES = [SelfAnchorAttention, CrossAnchorAttention, JointAnchorAttention]


def specs(**sizes: int | None) -> list[TokenSpec]:
    return [TokenSpec(name, size) for name, size in sizes.items()]


def branch_module(module_class: type, **fields: Any) -> Any:
    return module_class(**{"dim": DIM, "num_heads": 2, "branches": ("surface", "volume"), **fields})


def mixed(**fields: Any) -> MixedAttention:
    return MixedAttention(dim=DIM, num_heads=2, **fields)


def tokens(n: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, DIM)


@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_token_of_no_branch(module_class: type) -> None:
    with pytest.raises(UnexpectedTokenError, match=r"'wake_queries'.*\('surface', 'volume'\)"):
        branch_module(module_class)(tokens(6), specs(surface_anchors=2, volume_anchors=3, wake_queries=1))


@pytest.mark.parametrize("module_class", [SelfAnchorAttention, CrossAnchorAttention])
def test_branch_without_tokens(module_class: type) -> None:
    with pytest.raises(MissingBranchTokensError, match=r"'volume'.*'surface_anchors'"):
        branch_module(module_class)(tokens(2), specs(surface_anchors=2))


@pytest.mark.parametrize("module_class", [SelfAnchorAttention, CrossAnchorAttention])
def test_branch_without_anchors(module_class: type) -> None:
    with pytest.raises(MissingAnchorTokenError, match=r"'volume'.*'volume_anchors'.*'volume_queries'"):
        branch_module(module_class)(tokens(5), specs(surface_anchors=2, volume_queries=3))


def test_joint_needs_some_anchors() -> None:
    module = branch_module(JointAnchorAttention)
    with pytest.raises(MissingAnchorTokenError, match=r"_anchors.*\('surface_queries', 'volume_queries'\)"):
        module(tokens(5), specs(surface_queries=2, volume_queries=3))
    assert module(tokens(5), specs(surface_anchors=2, volume_queries=3)).shape == (2, 5, DIM)


@pytest.mark.parametrize("error", [UnexpectedTokenError, MissingBranchTokensError, MissingAnchorTokenError])
def test_exceptions_are_value_errors(error: type[Exception]) -> None:
    assert issubclass(error, ValueError)


@pytest.mark.parametrize("module_class", [*BRANCH_MODULES, MultiBranchAnchorAttention])
def test_no_branches(module_class: type) -> None:
    with pytest.raises(ValueError, match=r"branches list cannot be empty, got \(\)"):
        branch_module(module_class, branches=())


@pytest.mark.parametrize("module_class", [CrossAnchorAttention, JointAnchorAttention])
def test_one_branch_is_too_few(module_class: type) -> None:
    with pytest.raises(ValueError, match=r"at least two branches, got 1: \('surface',\)\. Otherwise use SelfAnchor"):
        branch_module(module_class, branches=("surface",))


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ("surface", "sequence of names, got 'surface'"),
        (("a", "a"), r"must differ from each other, got \('a', 'a'\)"),
        (("a", ""), r"must be non-empty strings, got \('a', ''\)"),
        (("a", 3), r"must be non-empty strings, got \('a', 3\)"),
    ],
)
def test_malformed_branches(branches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branch_module(SelfAnchorAttention, branches=branches)


def test_empty_suffix() -> None:
    with pytest.raises(ValueError, match="anchor_suffix must be a non-empty string, got ''"):
        branch_module(SelfAnchorAttention, anchor_suffix="")


@pytest.mark.parametrize("config_class", [CrossAnchorAttentionConfig, JointAnchorAttentionConfig])
def test_configs_check_by_themselves(config_class: type) -> None:
    with pytest.raises(ValueError, match="at least two branches"):
        config_class(hidden_dim=DIM, num_heads=2, branches=("surface",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dim": 30, "num_heads": 4}, "hidden_dim=30 and num_heads=4"),
        ({"hidden_dim": 0, "num_heads": 4}, "hidden_dim must be a positive integer, got 0"),
        ({"hidden_dim": 32, "num_heads": -1}, "num_heads must be a positive integer, got -1"),
        ({"hidden_dim": 32.0, "num_heads": 2}, "hidden_dim must be a positive integer, got 32.0"),
        ({"hidden_dim": 32, "num_heads": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"hidden_dim": 32, "num_heads": 2, "dropout": -0.1}, "got -0.1"),
        ({"hidden_dim": 32, "num_heads": 2, "init_weights": "xavier"}, "init_weights must be one of .*got 'xavier'"),
    ],
)
def test_malformed_fields(fields: dict[str, Any], message: str) -> None:
    for make in (AttentionConfig, MixedAttention, lambda **f: MixedAttention(SimpleNamespace(**f))):
        with pytest.raises(ValueError, match=message):
            make(**fields)


def test_configs_are_frozen() -> None:
    config = MultiBranchAnchorAttentionConfig(hidden_dim=DIM, num_heads=2, branches=["a"])
    assert config.branches == ("a",)
    with pytest.raises(AttributeError):
        config.hidden_dim = 64


def test_constructor_arguments() -> None:
    config = AttentionConfig(hidden_dim=DIM, num_heads=2)
    with pytest.raises(TypeError, match=r"either a config or its fields, got AttentionConfig and \['use_rope'\]"):
        MixedAttention(config, use_rope=True)
    with pytest.raises(TypeError, match="num_heads"):
        MixedAttention(dim=DIM)
    with pytest.raises(TypeError, match="n_heads"):
        MixedAttention(dim=DIM, num_heads=2, n_heads=2)
    with pytest.raises(TypeError, match="dim is another name for hidden_dim: give one, got 32, 64"):
        MixedAttention(dim=DIM, hidden_dim=64, num_heads=2)
    assert MixedAttention(SimpleNamespace(hidden_dim=DIM, num_heads=2, qk_norm=True)).qk_norm


def test_abstract_base() -> None:
    module = branch_module(MultiBranchAnchorAttention)
    with pytest.raises(
        NotImplementedError, match="MultiBranchAnchorAttention must implement _create_attention_patterns"
    ):
        module(tokens(5), specs(surface_anchors=2, volume_anchors=3))


def test_rope_usage_mismatch() -> None:
    freqs = torch.ones(1, 5, DIM // 4, dtype=torch.complex64)
    patterns = [AttentionPattern(["a"], ["a"])]
    with pytest.raises(ValueError, match="RoPE usage mismatch: use_rope=True, but freqs=None"):
        mixed(use_rope=True)(tokens(5), specs(a=5), patterns)
    with pytest.raises(ValueError, match="RoPE usage mismatch: use_rope=False, but freqs=Tensor"):
        mixed()(tokens(5), specs(a=5), patterns, freqs=freqs)
    with pytest.raises(ValueError, match="RoPE usage mismatch"):
        branch_module(SelfAnchorAttention, use_rope=True)(tokens(5), specs(surface_anchors=2, volume_anchors=3))


@pytest.mark.parametrize("n_tokens", [0, 4, 6])
def test_total_size(n_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"Token specs total size 5 .* of x, {n_tokens}; .*\('b', 3\)"):
        mixed()(tokens(n_tokens), specs(a=2, b=3), [AttentionPattern(["a", "b"], ["a"])])


def test_query_in_several_patterns() -> None:
    two = [AttentionPattern(["a"], ["a"]), AttentionPattern(["b", "a"], ["b"])]
    with pytest.raises(ValueError, match="Token 'a' cannot be a query in multiple attention patterns"):
        mixed()(tokens(5), specs(a=2, b=3), two)
    with pytest.raises(ValueError, match="Token 'a' cannot be a query in multiple attention patterns"):
        mixed()(tokens(2), specs(a=2), [AttentionPattern(["a", "a"], ["a"])])


def test_query_set_must_match() -> None:
    with pytest.raises(ValueError, match=r"set of query tokens must exactly match.*\['b', 'c'\]"):
        mixed()(tokens(5), specs(a=2, b=3, c=0), [AttentionPattern(["a"], ["b"])])
    with pytest.raises(ValueError, match=r"set of query tokens must exactly match.*\['x', 'z'\]"):
        mixed()(tokens(2), specs(a=2), [AttentionPattern(["z", "a", "x"], ["a"])])


def test_unknown_key() -> None:
    with pytest.raises(ValueError, match=r"'z' is not defined in `token_specs`.*\['a', 'b'\]"):
        mixed()(tokens(5), specs(a=2, b=3), [AttentionPattern(["a", "b"], ["a", "z"])])


def test_duplicate_names() -> None:
    doubled = [TokenSpec("surface_anchors", 2), TokenSpec("volume_anchors", 2), TokenSpec("surface_anchors", 2)]
    with pytest.raises(ValueError, match=r"token_specs must not hold a name twice.*'surface_anchors'"):
        mixed()(tokens(6), doubled, [AttentionPattern(["surface_anchors", "volume_anchors"], ["volume_anchors"])])
    with pytest.raises(ValueError, match="token_specs must not hold a name twice"):
        branch_module(SelfAnchorAttention)(tokens(6), doubled)
    # A cached group and one of the input can't share a name either.
    with pytest.raises(ValueError, match="token_specs must not hold a name twice"):
        mixed()(tokens(2), [TokenSpec("a", 2), TokenSpec("a", None)], [AttentionPattern(["a"], ["a"])])


def test_negative_size_of_a_foreign_spec() -> None:
    with pytest.raises(ValueError, match="size of token 'a' must be at least 0, got -1"):
        mixed()(tokens(2), [SimpleNamespace(name="a", size=-1)], [AttentionPattern(["a"], ["a"])])


def test_shape_of_x() -> None:
    patterns = [AttentionPattern(["a"], ["a"])]
    for shape in ((5, DIM), (2, 5, DIM + 1), (1, 2, 5, DIM)):
        with pytest.raises(ValueError, match=r"x must be \(batch, tokens, 32\), got shape \("):
            mixed()(torch.randn(shape), specs(a=5), patterns)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), "key_padding_mask must have dtype torch.bool, got torch.float32"),
        (torch.ones(2, 5, dtype=torch.uint8), "must have dtype torch.bool, got torch.uint8"),
        (torch.ones(5, dtype=torch.bool), r"key_padding_mask must be 2-D \(batch, tokens\), got shape \(5,\)"),
        (torch.ones(2, 1, 1, 5, dtype=torch.bool), r"must be 2-D .*\(2, 1, 1, 5\)"),
        (torch.ones(2, 4, dtype=torch.bool), r"length of x, \(2, 5\), got \(2, 4\)"),
        (torch.ones(1, 5, dtype=torch.bool), r"batch size and length of x, \(2, 5\), got \(1, 5\)"),
    ],
)
def test_key_padding_mask(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed()(tokens(5), specs(a=5), [AttentionPattern(["a"], ["a"])], key_padding_mask=mask)
    with pytest.raises(ValueError, match=message):
        branch_module(SelfAnchorAttention)(tokens(5), specs(surface_anchors=2, volume_anchors=3), key_padding_mask=mask)


def entry(**changes: Any) -> dict[str, Any]:
    return {"k": torch.randn(2, 2, 3, DIM // 2), "v": torch.randn(2, 2, 3, DIM // 2), **changes}


def test_empty_cache() -> None:
    cached = specs(a=None, b=4)
    patterns = [AttentionPattern(["a", "b"], ["a"])]
    for cache in ({}, None):
        with pytest.raises(ValueError, match="kv_cache is empty"):
            mixed()(tokens(4), cached, patterns, kv_cache=cache)
    with pytest.raises(ValueError, match="kv_cache is empty"):
        mixed()(tokens(4), specs(b=4), [AttentionPattern(["b"], ["b"])], kv_cache={})


def test_token_missing_in_the_cache() -> None:
    patterns = [AttentionPattern(["b"], ["a", "c"])]
    with pytest.raises(ValueError, match=r"'c' has no size and is missing in kv_cache, which holds \['a'\]"):
        mixed()(tokens(4), specs(a=None, b=4, c=None), patterns, kv_cache={"a": entry()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 2, 3)}, r"kv_cache\['a'\]\['k'\] must be \(batch=2, heads=2, tokens, head_dim=16\)"),
        ({"k": torch.randn(1, 2, 3, 16)}, r"kv_cache\['a'\]\['k'\] .* got shape \(1, 2, 3, 16\)"),
        ({"k": torch.randn(2, 3, 2, 16)}, r"kv_cache\['a'\]\['k'\] .* got shape \(2, 3, 2, 16\)"),
        ({"v": torch.randn(2, 2, 4, 16)}, r"kv_cache\['a'\]\['v'\] .*\(2, 2, 3, 16\), got \(2, 2, 4, 16\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"kv_cache\['a'\]\['mask'\] must be bool of shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, r"kv_cache\['a'\]\['mask'\] .* got torch.float32"),
    ],
)
def test_malformed_cache_entry(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed()(tokens(4), specs(a=None, b=4), [AttentionPattern(["b"], ["a"])], kv_cache={"a": entry(**changes)})


def test_cache_entry_without_values() -> None:
    cache = {"a": {"k": torch.randn(2, 2, 3, 16)}}
    with pytest.raises(ValueError, match=r"kv_cache\['a'\] must hold 'k' and 'v', got \['k'\]"):
        mixed()(tokens(4), specs(a=None, b=4), [AttentionPattern(["b"], ["a"])], kv_cache=cache)


def test_an_error_is_raised_again_and_leaves_no_trace() -> None:
    module = branch_module(SelfAnchorAttention)
    wrong, right = specs(surface_anchors=2, volume_queries=3), specs(surface_anchors=2, volume_anchors=3)
    for _ in range(2):
        with pytest.raises(MissingAnchorTokenError):
            module(tokens(5), wrong)
        assert module(tokens(5), right).shape == (2, 5, DIM)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x", r"x must be on the device of the module's weights \(cpu\), got meta"),
        ("freqs", r"freqs must be on the device of x \(cpu\), got meta"),
        ("key_padding_mask", r"key_padding_mask must be on the device of x \(cpu\), got meta"),
    ],
)
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_one_argument_without_data(module_class: type, name: str, message: str) -> None:
    module = branch_module(module_class, use_rope=True)
    arguments = {
        "x": tokens(9),
        "freqs": torch.ones(1, 9, 8, dtype=torch.complex64),
        "key_padding_mask": torch.ones(2, 9, dtype=torch.bool),
    }
    groups = specs(surface_anchors=4, volume_anchors=5)
    module(token_specs=groups, **arguments)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=message):
        module(token_specs=groups, **arguments)
    # All of it without data is a model that is only measured.
    without = {name: argument.to("meta") for name, argument in arguments.items()}
    assert module.to("meta")(token_specs=groups, **without).shape == (2, 9, DIM)


def test_rotation_angles_of_an_axis_without_data() -> None:
    module = branch_module(SelfAnchorAttention, use_rope=True)
    angles = tuple(torch.zeros(1, 9, width) for width in (4, 4, 6))
    groups = specs(surface_anchors=4, volume_anchors=5)
    module(tokens(9), groups, angles)
    with pytest.raises(ValueError, match=r"freqs\[1\] must be on the device of x \(cpu\), got meta"):
        module(tokens(9), groups, (angles[0], angles[1].to("meta"), angles[2]))
