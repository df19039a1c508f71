"""The cache of a stream: stored, moved, weighed, and read without a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anchor_attention.modules.mixed as mixed_module
from anchor_attention.modules import JointAnchorAttention
from anchor_attention.streaming import Cache
from tests.module_cases import DIM, make, specs, unit_freqs


def ragged_cache() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = make(JointAnchorAttention, use_rope=True)
    token_specs = specs(surface_anchors=5, volume_anchors=4)
    mask = torch.rand(3, 9) < 0.6
    x, freqs = torch.randn(3, 9, DIM), unit_freqs(3, 9)
    with torch.no_grad():
        _, layer = module(x, token_specs, freqs, key_padding_mask=mask, return_kv_cache=True)
    return module, {"layers": [layer, (layer, None)], "condition": torch.randn(3, 2), "angle": 1.5, "n": True}


def test_a_saved_cache_is_the_same(tmp_path: Path) -> None:
    module, tree = ragged_cache()
    cache = Cache(tree)
    cache.save(tmp_path / "cache.safetensors")
    loaded = Cache.load(tmp_path / "cache.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    leaves, structure = torch.utils._pytree.tree_flatten(cache.tree)
    loaded_leaves, loaded_structure = torch.utils._pytree.tree_flatten(loaded.tree)
    assert structure == loaded_structure
    for expected, found in zip(leaves, loaded_leaves, strict=True):
        if isinstance(expected, Tensor):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        else:
            assert found == expected and type(found) is type(expected)

    alone = specs(surface_anchors=None, surface_queries=6, volume_anchors=None)
    x, freqs = torch.randn(3, 6, DIM), unit_freqs(3, 6)
    assert torch.equal(
        module(x, alone, freqs, kv_cache=tree["layers"][0]), module(x, alone, freqs, kv_cache=loaded.tree["layers"][0])
    )


def test_cached_groups_are_read_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, tree = ragged_cache()
    Cache(tree).save(tmp_path / "cache.safetensors")
    seen: list[tuple[Tensor, Tensor]] = []
    operation = mixed_module.anchor_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((k, v))
        return operation(q, k, v, *args, **kwargs)

    monkeypatch.setattr(mixed_module, "anchor_attention", spy)
    alone = specs(surface_anchors=None, surface_queries=6, volume_anchors=None)
    x, freqs = torch.randn(3, 6, DIM), unit_freqs(3, 6)
    for origin in (Cache(tree), Cache.load(tmp_path / "cache.safetensors"), Cache(tree).to(dtype=torch.float32)):
        layer = origin.tree["layers"][0]
        with torch.no_grad():
            expected = module(x, alone, freqs, kv_cache={name: _copied(entry) for name, entry in layer.items()})
            found = module(x, alone, freqs, kv_cache=layer)
        assert torch.equal(found, expected)
        (copied_k, _), (k, v) = seen[-2:]
        assert k.untyped_storage().data_ptr() == layer["surface_anchors"]["k"].untyped_storage().data_ptr()
        assert v.untyped_storage().data_ptr() == layer["volume_anchors"]["v"].untyped_storage().data_ptr()
        assert copied_k.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()


def _copied(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind: tensor.clone() for kind, tensor in entry.items()}


def test_moving_and_weighing_a_cache() -> None:
    _, tree = ragged_cache()
    cache = Cache({"layers": tree["layers"][:1], "condition": tree["condition"]})
    heads, head_dim = 2, DIM // 2
    tokens = 3 * heads * 9 * head_dim
    assert cache.nbytes == 2 * 4 * tokens + 3 * 9 + 4 * 6
    half = cache.to(dtype=torch.float16)
    assert half.nbytes == 2 * 2 * tokens + 3 * 9 + 2 * 6
    assert half.tree["layers"][0]["surface_anchors"]["mask"].dtype == torch.bool
    (cost,) = cache.costs()
    assert cost.layer == "layers/0" and cost.tokens == {"surface_anchors": 5, "volume_anchors": 4}
    assert cost.nbytes == 2 * 4 * tokens + 3 * 9 and cost.flops_per_query == 4 * 9 * DIM
    assert "surface_anchors 5, volume_anchors 4" in cache.cost_table()
    assert repr(cache) == "Cache(1 layers, 0.0 MiB)"
    # The same memory under two names is one memory.
    assert Cache([tree["condition"], tree["condition"]]).nbytes == 4 * 6


def test_caches_that_can_not_be_stored_are_refused(tmp_path: Path) -> None:
    for tree, message in (
        ({1: torch.ones(1)}, "keys of the cache must be strings"),
        ([{"a": {1, 2}}], "got set at '0/a'"),
        ({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "called 'a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            Cache(tree)
    with pytest.raises(ValueError, match="must be one of"):
        Cache([torch.ones(1, dtype=torch.complex128)]).save(tmp_path / "x")


def test_the_file_is_in_the_safetensors_format(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    Cache({"x": torch.tensor([True, False, True]), "y": torch.arange(3.0)}).save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    assert length % 8 == 0
    assert header["y"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert header["x"] == {"dtype": "BOOL", "shape": [3], "data_offsets": [12, 15]}
    assert data == torch.arange(3.0).numpy().tobytes() + bytes([1, 0, 1])
    assert all(isinstance(value, str) for value in header["__metadata__"].values())

    # Other writers need not align: the bool first, the floats at an odd address.
    del header["x"], header["y"]
    header = {
        **header,
        "x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "y": {"dtype": "F32", "shape": [3], "data_offsets": [3, 15]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes([1, 0, 1]) + torch.arange(3.0).numpy().tobytes())
    assert torch.equal(Cache.load(path).tree["y"], torch.arange(3.0))

    for spoilt in (
        content[:5],
        (2**60).to_bytes(8, "little") + content[8:],
        content[:8] + b"?" * length + data,
        content[:-1],
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"safetensors|can't have shape"):
            Cache.load(path)
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="must be a file of the format"):
        Cache.load(path)
