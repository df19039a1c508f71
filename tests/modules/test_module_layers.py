"""The layers of a module are called wherever calling them is more than their weight says; checkpoints; construction."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from anchor_attention import AttentionPattern, JointAnchorAttention, MixedAttention, RopeFrequency, TokenSpec
from anchor_attention.modules import SelfAnchorAttention
from anchor_attention.modules.projection import is_plain_linear
from tests.module_cases import DIM, FLOAT32_TOLERANCE, HEAD_DIM, HEADS, make, queries_alone, specs, total, unit_freqs

# The queries are not read, so that keys and values are projected from a part of the tokens.
SPECS = specs(surface_anchors=5, surface_queries=7, volume_anchors=4, volume_queries=6)


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, total(SPECS), DIM)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def with_pre_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_own_forward(layer: nn.Linear) -> None:
    of_class = layer.forward
    layer.forward = lambda x: 2 * of_class(x)  # type: ignore[method-assign]


def with_own_class(layer: nn.Linear) -> None:
    layer.__class__ = Doubling


def pruned(layer: nn.Linear) -> None:
    prune.random_unstructured(layer, "weight", amount=0.5)


def weight_normed(layer: nn.Linear) -> None:
    nn.utils.weight_norm(layer)
    # As after load_state_dict: the weight itself is computed when the layer is called.
    with torch.no_grad():
        layer.weight_g.mul_(2)


def parametrised(layer: nn.Linear) -> None:
    parametrizations.spectral_norm(layer)


CHANGES = [with_hook, with_pre_hook, with_own_forward, with_own_class, pruned, weight_normed, parametrised]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_more_than_its_weight_is_called(change: Callable[[nn.Linear], None]) -> None:
    module = make(SelfAnchorAttention).eval()
    layer = module.mixed_attention.qkv
    assert is_plain_linear(layer)
    before = module(tokens(), SPECS)
    change(layer)
    assert not is_plain_linear(layer)
    x = tokens()
    found = module(x, SPECS)
    # The same outputs come of a plain layer with the values that this one answers with.
    plain = make(SelfAnchorAttention).eval()
    plain.mixed_attention.proj = module.mixed_attention.proj
    basis = torch.eye(DIM)
    with torch.no_grad():
        bias = layer(torch.zeros(1, DIM))[0]
        plain.mixed_attention.qkv.weight.copy_((layer(basis) - bias).T)
        plain.mixed_attention.qkv.bias.copy_(bias)
    torch.testing.assert_close(found, plain(x, SPECS), rtol=0, atol=10 * FLOAT32_TOLERANCE)
    assert before.shape == found.shape


def test_global_hooks_see_the_layer() -> None:
    module = make(SelfAnchorAttention)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, args, out: seen.append(layer))
    try:
        module(tokens(), SPECS)
    finally:
        handle.remove()
    assert module.mixed_attention.qkv in seen


def test_a_pruned_layer_trains() -> None:
    module = make(SelfAnchorAttention)
    pruned(module.mixed_attention.qkv)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        module(tokens(), SPECS).square().sum().backward()
        optimiser.step()


def separate(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {name: tensor for name, tensor in fused.items() if "qkv" not in name}
    for kind in ("weight", "bias"):
        parts.update({f"{n}.{kind}": part for n, part in zip("qkv", fused[f"qkv.{kind}"].chunk(3), strict=True)})
    return parts


def test_separate_projections_load_and_equal_fused_ones_may_stand_beside_them() -> None:
    fused = MixedAttention(dim=DIM, num_heads=HEADS, init_weights="torch").state_dict()
    for state in (separate(fused), {**fused, **separate(fused)}):
        module = MixedAttention(dim=DIM, num_heads=HEADS)
        module.load_state_dict(state)
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in fused.items())


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_separate_projections_of_wrong_sizes_are_refused(kind: str) -> None:
    module = MixedAttention(dim=DIM, num_heads=HEADS)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = separate(before)
    # Together they have the rows of the fused one.
    state[f"q.{kind}"] = state[f"q.{kind}"][: DIM // 2]
    state[f"k.{kind}"] = torch.cat((state[f"k.{kind}"], state[f"q.{kind}"]))
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state)
    for name in ("q", "k"):
        assert f"size mismatch for {name}.{kind}" in str(error.value)
    assert "issing" not in str(error.value)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_separate_projections_that_differ_from_fused_ones_are_refused() -> None:
    fused = MixedAttention(dim=DIM, num_heads=HEADS).state_dict()
    other = {**fused, **separate(fused), "q.weight": torch.zeros(DIM, DIM)}
    with pytest.raises(RuntimeError, match=r"qkv.weight and q.weight, k.weight, v.weight are both .* differ"):
        MixedAttention(dim=DIM, num_heads=HEADS).load_state_dict(other)


def test_a_size_that_only_equals_an_integer_spoils_nothing() -> None:
    module = make(SelfAnchorAttention, branches=("s",))
    x = torch.randn(1, 9, DIM)
    for size in (np.float32(6), 6.0, True):
        groups = [SimpleNamespace(name="s_anchors", size=size), TokenSpec("s_queries", 3)]
        with pytest.raises(ValueError, match="size of token 's_anchors' must be an integer or None"):
            module(x, groups)
    expected = module(x, specs(s_anchors=6, s_queries=3))
    groups = [SimpleNamespace(name="s_anchors", size=np.int64(6)), TokenSpec("s_queries", 3)]
    assert torch.equal(module(x, groups), expected)


@pytest.mark.parametrize("qk_norm", [False, True, "rms"])
def test_norms_are_applied_in_fresh_and_cached_calls(qk_norm: bool | str) -> None:
    module = make(JointAnchorAttention, use_rope=True, qk_norm=qk_norm).double()
    mixed = module.mixed_attention
    assert (set(mixed.state_dict()) >= {"q_norm.weight", "k_norm.weight"}) == (qk_norm == "rms")
    if qk_norm == "rms":
        nn.init.uniform_(mixed.q_norm.weight, 0.5, 2.0)
        nn.init.uniform_(mixed.k_norm.weight, 0.5, 2.0)
    x, freqs = tokens().double(), unit_freqs(2, total(SPECS), torch.float64)
    found, cache = module(x, SPECS, freqs, return_kv_cache=True)

    q, k, v = mixed.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    if qk_norm:
        eps = torch.finfo(torch.float64).eps
        q, k = (heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt() for heads in (q, k))
    if qk_norm == "rms":
        q, k = q * mixed.q_norm.weight, k * mixed.k_norm.weight
    pairs = (torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous()) * freqs[:, :, None] for heads in (q, k))
    q, k = (torch.view_as_real(heads).flatten(-2).transpose(1, 2) for heads in pairs)
    keys = [*range(5), *range(12, 16)]
    out = nn.functional.scaled_dot_product_attention(q, k[:, :, keys], v.transpose(1, 2)[:, :, keys])
    torch.testing.assert_close(found, mixed.proj(out.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)

    alone, rows = queries_alone(SPECS)
    cached = module(x[:, rows], alone, freqs[:, rows], kv_cache=cache)
    torch.testing.assert_close(cached, found[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("module_class", [SelfAnchorAttention, JointAnchorAttention])
@pytest.mark.parametrize("groups", [SPECS, specs(surface_anchors=12, volume_anchors=10)])
def test_strided_masks_and_factors_are_taken(module_class: type, groups: list[TokenSpec]) -> None:
    module = make(module_class, use_rope=True)
    x, mask, freqs = tokens(3), torch.rand(total(groups), 3) < 0.8, unit_freqs(3, total(groups))
    strided = freqs.transpose(1, 2).contiguous().transpose(1, 2)
    expected = module(x, groups, freqs, key_padding_mask=mask.T.contiguous())
    assert torch.equal(module(x, groups, strided, key_padding_mask=mask.T), expected)


def test_a_cache_of_one_sample_serves_all_and_vmap_maps_over_caches() -> None:
    module = make(JointAnchorAttention)
    anchors = specs(surface_anchors=5, volume_anchors=4)
    alone = specs(surface_anchors=None, surface_queries=7, volume_anchors=None)
    with torch.no_grad():
        _, cache = module(torch.randn(1, 9, DIM), anchors, return_kv_cache=True)
        x = torch.randn(3, 7, DIM)
        each = torch.cat([module(x[i : i + 1], alone, kv_cache=cache) for i in range(3)])
        torch.testing.assert_close(module(x, alone, kv_cache=cache), each, rtol=0, atol=FLOAT32_TOLERANCE)

        _, cache = module(torch.randn(3, 9, DIM), anchors, return_kv_cache=True)
        mapped = {name: {kind: part[:, None] for kind, part in entry.items()} for name, entry in cache.items()}
        found = torch.vmap(lambda q, c: module(q, alone, kv_cache=c))(x[:, None], mapped)[:, 0]
        torch.testing.assert_close(found, module(x, alone, kv_cache=cache), rtol=0, atol=FLOAT32_TOLERANCE)


def test_a_cache_of_another_type_is_converted() -> None:
    module = make(JointAnchorAttention).eval()
    with torch.no_grad():
        _, cache = module(torch.randn(1, 9, DIM), specs(surface_anchors=5, volume_anchors=4), return_kv_cache=True)
        half = {name: {kind: part.bfloat16() for kind, part in entry.items()} for name, entry in cache.items()}
        calls = {
            7: specs(surface_anchors=None, surface_queries=7, volume_anchors=None),
            9: specs(surface_anchors=2, surface_queries=7, volume_anchors=None),
        }
        for n, groups in calls.items():
            x = torch.randn(1, n, DIM)
            expected, found = module(x, groups, kv_cache=cache), module(x, groups, kv_cache=half)
            assert found.dtype == torch.float32
            # Keys and values of order one, rounded to 8 bits of mantissa.
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-2)


def wrong_calls() -> Iterator[Any]:
    groups = specs(s_anchors=4)
    x = torch.randn(1, 4, DIM)
    cached = specs(s_anchors=None, s_queries=4)
    entry = {"k": torch.zeros(1, HEADS, 3, HEAD_DIM), "v": torch.zeros(1, HEADS, 3, HEAD_DIM)}
    yield "tokens split into heads", lambda m: m(torch.randn(1, HEADS, 4, HEAD_DIM), groups), "scaled_dot_product"
    yield "array", lambda m: m(x.numpy(), groups), "x must be a Tensor, got ndarray: torch.from_numpy"
    yield "dict of sizes", lambda m: m(x, {"s_anchors": 4}), r"sequence of TokenSpec, got dict: write \[TokenSpec\("
    yield "pairs", lambda m: m(x, [("s_anchors", 4)]), r"hold TokenSpec objects, got \('s_anchors', 4\)"
    yield "list as mask", lambda m: m(x, groups, key_padding_mask=[True] * 4), "key_padding_mask must be a Tensor"
    yield "number as cache", lambda m: m(x, cached, kv_cache=5), "kv_cache must be .*, got int"
    yield "pair in cache", lambda m: m(x, cached, kv_cache={"s_anchors": tuple(entry.values())}), "hold 'k' and 'v'"
    yield "no k", lambda m: m(x, cached, kv_cache={"s_anchors": {**entry, "k": None}}), r"\['k'\] must be a Tensor"


@pytest.mark.parametrize("name, call, message", list(wrong_calls()))
def test_wrong_arguments_are_named(name: str, call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make(SelfAnchorAttention, branches=("s",)))


def test_wrong_patterns_and_factors_are_named() -> None:
    module = MixedAttention(dim=DIM, num_heads=HEADS, use_rope=True)
    x, groups, freqs = torch.randn(2, 4, DIM), specs(a=4), unit_freqs(2, 4)
    with pytest.raises(ValueError, match="sequence of AttentionPattern, got dict"):
        module(x, groups, {"a": "a"}, freqs=freqs)
    with pytest.raises(ValueError, match=r"must hold AttentionPattern objects, got \('a', 'a'\)"):
        module(x, groups, [("a", "a")], freqs=freqs)
    patterns = [AttentionPattern(["a"], ["a"])]
    for wrong in (freqs[:, :3], freqs[..., :3], freqs.real, unit_freqs(3, 4)):
        with pytest.raises(ValueError, match=rf"freqs must be complex \(2 or 1, 4, {HEAD_DIM // 2}\), .*got"):
            module(x, groups, patterns, freqs=wrong)
    with pytest.raises(ValueError, match=r"freqs\[1\] must be real angles \(2 or 1, 4, width\)"):
        module(x, groups, patterns, freqs=(torch.zeros(2, 4, 4), torch.zeros(2, 3, 4)))


def test_wrong_keywords_say_what_was_meant() -> None:
    with pytest.raises(TypeError, match="MixedAttention has no field 'embed_dim': did you mean 'hidden_dim'"):
        MixedAttention(embed_dim=DIM, num_heads=HEADS)
    with pytest.raises(TypeError, match="has no field 'anchor_sufix': did you mean 'anchor_suffix'"):
        make(SelfAnchorAttention, anchor_sufix="_a")
    with pytest.raises(TypeError, match=r"config must be an object with the fields .*got 32: give fields as keywords"):
        MixedAttention(32)
    with pytest.raises(TypeError, match=r"MixedAttention needs num_heads$"):
        MixedAttention(dim=DIM)
    with pytest.raises(TypeError, match=r"MixedAttention needs hidden_dim, num_heads, which the TokenSpec lacks"):
        MixedAttention(TokenSpec("a", 1))
    parameters = inspect.signature(SelfAnchorAttention).parameters
    assert {"hidden_dim", "num_heads", "branches", "use_rope", "qk_norm"} <= set(parameters)
    assert repr(parameters["bias"].default) == "True"


def test_repr_shows_what_was_configured() -> None:
    text = repr(make(SelfAnchorAttention, use_rope=True, qk_norm="rms"))
    for part in ("branches=('surface', 'volume')", f"hidden_dim={DIM}", f"num_heads={HEADS}", "use_rope=True", "'rms'"):
        assert part in text


def test_deferred_initialisation() -> None:
    with torch.device("meta"):
        module = make(SelfAnchorAttention, qk_norm="rms", init_weights="truncnormal002")
        rope = RopeFrequency(hidden_dim=16, input_dim=3)
    right = RopeFrequency(hidden_dim=16, input_dim=3).omega
    rope.to_empty(device="cpu")
    assert torch.equal(rope.omega, right)
    rope.omega.fill_(-7.0)
    rope.reset_parameters()
    assert torch.equal(rope.omega, right)

    module.to_empty(device="cpu")
    for part in reversed(list(module.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    mixed = module.mixed_attention
    assert not mixed.qkv.bias.any() and 0.01 < mixed.qkv.weight.std() < 0.03
    assert torch.equal(mixed.q_norm.weight, torch.ones(HEAD_DIM))


def test_modules_can_be_copied_and_saved() -> None:
    module = make(SelfAnchorAttention, qk_norm="rms")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = tokens()
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x, SPECS), module(x, SPECS))
