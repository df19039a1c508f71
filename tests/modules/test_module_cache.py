"""Cached keys and values: a cached call gives what one pass gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anchor_attention.modules import (
    CrossAnchorAttention,
    JointAnchorAttention,
    RopeFrequency,
    SelfAnchorAttention,
)
from tests.module_cases import (
    BRANCH_MODULES,
    DIM,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    HEAD_DIM,
    HEADS,
    make,
    queries_alone,
    rows_of,
    specs,
    total,
    unit_freqs,
)

CACHED_SPECS = {
    "anchors first": specs(surface_anchors=4, surface_queries=5, volume_anchors=6, volume_queries=3),
    "queries first": specs(volume_queries=3, surface_queries=5, volume_anchors=6, surface_anchors=4),
    "a branch is exhausted": specs(surface_anchors=4, surface_queries=5, volume_anchors=6),
    "a group is empty": specs(surface_anchors=4, surface_queries=0, volume_anchors=6, volume_queries=3),
    "anchors are empty": specs(surface_anchors=0, surface_queries=5, volume_anchors=6, volume_queries=3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotary", ["none", "complex", "real"])
@pytest.mark.parametrize("groups", CACHED_SPECS)
@pytest.mark.parametrize("module_class", BRANCH_MODULES)
def test_cached_call_equals_one_pass(module_class: type, groups: str, rotary: str, masked: bool) -> None:
    torch.manual_seed(0)
    token_specs = CACHED_SPECS[groups]
    n = total(token_specs)
    module = make(module_class, use_rope=rotary != "none").double()
    x = torch.randn(2, n, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) < 0.6 if masked else None
    alone, rows = queries_alone(token_specs)
    freqs: Any = None
    query_freqs: Any = None
    if rotary == "complex":
        freqs = unit_freqs(2, n, torch.float64)
        query_freqs = freqs[:, rows]
    if rotary == "real":
        freqs = RopeFrequency(HEAD_DIM, 3, implementation="real")(torch.randn(2, n, 3))
        query_freqs = tuple(angle[:, rows] for angle in freqs)

    y, cache = module(x, token_specs, freqs, key_padding_mask=mask, return_kv_cache=True)
    torch.testing.assert_close(y, module(x, token_specs, freqs, key_padding_mask=mask), rtol=0, atol=FLOAT64_TOLERANCE)
    assert set(cache) == {"surface_anchors", "volume_anchors"}
    for name, entry in cache.items():
        size = next(spec.size for spec in token_specs if spec.name == name)
        assert set(entry) == ({"k", "v", "mask"} if masked else {"k", "v"})
        assert entry["k"].shape == entry["v"].shape == (2, HEADS, size, HEAD_DIM)
        if mask is not None:
            assert torch.equal(entry["mask"], mask[:, rows_of(token_specs, [name])])

    y_cached = module(x[:, rows], alone, query_freqs, kv_cache=cache)
    torch.testing.assert_close(y_cached, y[:, rows], rtol=0, atol=FLOAT64_TOLERANCE)

    # Through the cache, gradients reach the tokens that it was made of.
    upstream = torch.randn_like(y_cached)
    (grad,) = torch.autograd.grad(y_cached, x, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(y[:, rows], x, upstream)
    torch.testing.assert_close(grad, expected, rtol=0, atol=100 * FLOAT64_TOLERANCE)

    # A mask of the queries says nothing about cached keys.
    query_mask = torch.zeros(2, len(rows), dtype=torch.bool)
    with_mask = module(x[:, rows], alone, query_freqs, key_padding_mask=query_mask, kv_cache=cache)
    torch.testing.assert_close(with_mask, y_cached, rtol=0, atol=0)


def test_streaming_in_uneven_chunks_equals_one_pass() -> None:
    torch.manual_seed(0)
    module = make(JointAnchorAttention, use_rope=True)
    n_surface, n_volume = 10, 17
    token_specs = specs(surface_anchors=3, volume_anchors=4, surface_queries=n_surface, volume_queries=n_volume)
    x, freqs = torch.randn(1, 34, DIM), unit_freqs(1, 34)
    expected = module(x, token_specs, freqs)
    _, cache = module(x[:, :7], specs(surface_anchors=3, volume_anchors=4), freqs[:, :7], return_kv_cache=True)
    for begin in range(0, n_volume, 6):
        surface = list(range(7 + begin, 7 + max(begin, min(begin + 6, n_surface))))
        volume = list(range(17 + begin, 17 + min(begin + 6, n_volume)))
        chunk = specs(
            surface_anchors=None, volume_anchors=None, surface_queries=len(surface), volume_queries=len(volume)
        )
        rows = surface + volume
        y = module(x[:, rows], chunk, freqs[:, rows], kv_cache=cache)
        torch.testing.assert_close(y, expected[:, rows], rtol=0, atol=FLOAT32_TOLERANCE)


def test_cached_and_fresh_keys_mix_and_are_handed_on() -> None:
    torch.manual_seed(0)
    token_specs = specs(surface_anchors=3, surface_queries=2, volume_anchors=4, volume_queries=5)
    module = make(JointAnchorAttention, use_rope=True)
    x, freqs = torch.randn(2, 14, DIM), unit_freqs(2, 14)
    mask = torch.rand(2, 14) < 0.7
    expected, expected_cache = module(x, token_specs, freqs, key_padding_mask=mask, return_kv_cache=True)
    surface_only = {"surface_anchors": expected_cache["surface_anchors"]}
    rows = slice(5, 14)
    y, cache = module(
        x[:, rows],
        specs(surface_anchors=None, volume_anchors=4, volume_queries=5),
        freqs[:, rows],
        key_padding_mask=mask[:, rows],
        kv_cache=surface_only,
        return_kv_cache=True,
    )
    torch.testing.assert_close(y, expected[:, rows], rtol=0, atol=FLOAT32_TOLERANCE)
    torch.testing.assert_close(cache, expected_cache, rtol=0, atol=FLOAT32_TOLERANCE)


def test_groups_that_only_absent_groups_read_are_cached_on_demand() -> None:
    module = make(CrossAnchorAttention).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    expected, expected_cache = module(x, specs(surface_anchors=4, volume_anchors=5), return_kv_cache=True)
    one_branch = specs(surface_anchors=4, volume_anchors=None)
    # Here nobody reads the surface: the volume is not in the input.
    y, cache = module(x[:, :4], one_branch, kv_cache=expected_cache, return_kv_cache=True)
    torch.testing.assert_close(y, expected[:, :4], rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(cache, expected_cache, rtol=0, atol=FLOAT64_TOLERANCE)


def test_cached_keys_without_a_mask_are_real() -> None:
    torch.manual_seed(0)
    module = make(CrossAnchorAttention).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    token_specs = specs(surface_anchors=4, volume_anchors=5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 1] = False
    _, cache = module(x, token_specs, key_padding_mask=mask, return_kv_cache=True)
    del cache["volume_anchors"]["mask"]
    y = module(
        x[:, :3], specs(surface_queries=2, volume_queries=1, surface_anchors=None, volume_anchors=None), kv_cache=cache
    )
    extended = torch.cat((x, x[:, :3]), dim=1)
    everything = specs(surface_anchors=4, volume_anchors=5, surface_queries=2, volume_queries=1)
    padded = torch.cat((mask, mask[:, :3]), dim=1)
    expected = module(extended, everything, key_padding_mask=padded)[:, 9:]
    torch.testing.assert_close(y, expected, rtol=0, atol=FLOAT64_TOLERANCE)


def test_cached_mask_does_not_change_with_the_callers_mask() -> None:
    module = make(SelfAnchorAttention)
    mask = torch.ones(1, 5, dtype=torch.bool)
    _, cache = module(
        torch.randn(1, 5, DIM), specs(surface_anchors=2, volume_anchors=3), key_padding_mask=mask, return_kv_cache=True
    )
    mask.zero_()
    assert cache["surface_anchors"]["mask"].all()


def test_a_cache_does_not_keep_the_projections_of_unread_tokens_alive() -> None:
    module = make(SelfAnchorAttention)
    with torch.no_grad():
        _, cache = module(
            torch.randn(1, 505, DIM),
            specs(surface_anchors=2, surface_queries=500, volume_anchors=3),
            return_kv_cache=True,
        )
    for entry in cache.values():
        for tensor in entry.values():
            assert tensor.untyped_storage().nbytes() <= 5 * DIM * tensor.element_size()


@pytest.mark.parametrize("fresh_anchors", [None, 4])
def test_a_cache_of_another_dtype_is_read_in_the_dtype_of_the_queries(fresh_anchors: int | None) -> None:
    module = make(JointAnchorAttention)
    with torch.no_grad():
        _, cache = module(torch.randn(1, 9, DIM), specs(surface_anchors=4, volume_anchors=5), return_kv_cache=True)
        x = torch.randn(1, 6 + (fresh_anchors or 0), DIM)
        token_specs = specs(surface_anchors=fresh_anchors, surface_queries=6, volume_anchors=None)
        for dtype in (torch.bfloat16, torch.float64):
            other = {name: {kind: part.to(dtype) for kind, part in entry.items()} for name, entry in cache.items()}
            same = {name: {kind: part.float() for kind, part in entry.items()} for name, entry in other.items()}
            out = module(x, token_specs, kv_cache=other)
            assert out.dtype == torch.float32 and torch.equal(out, module(x, token_specs, kv_cache=same))
