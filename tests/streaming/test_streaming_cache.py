"""The cache of a stream: stored, moved, weighed, and read without a copy."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import OrderedDict, defaultdict
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchor_attention.modules.steps as steps_module
from anchor_attention.modules import JointAnchorAttention
from anchor_attention.streaming import Cache, cache_file
from anchor_attention.streaming.memory import PeakMemory
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
    cache.save(tmp_path / "cache.pt")
    loaded = Cache.load(tmp_path / "cache.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.pt"]
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
    Cache(tree).save(tmp_path / "cache.pt")
    seen: list[tuple[Tensor, Tensor]] = []
    operation = steps_module.anchor_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((k, v))
        return operation(q, k, v, *args, **kwargs)

    monkeypatch.setattr(steps_module, "anchor_attention", spy)
    alone = specs(surface_anchors=None, surface_queries=6, volume_anchors=None)
    x, freqs = torch.randn(3, 6, DIM), unit_freqs(3, 6)
    for origin in (Cache(tree), Cache.load(tmp_path / "cache.pt"), Cache(tree).to(dtype=torch.float32)):
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


class Encoding(NamedTuple):
    layers: list[Any]
    condition: Tensor


class Level(IntEnum):
    FINE = 3


def layer(dtype: torch.dtype = torch.float32, k: tuple[int, ...] = (1, 2, 3, 4), v: Any = None) -> dict[str, Tensor]:
    return {"k": torch.randn(k).to(dtype), "v": torch.randn(k if v is None else v).to(dtype)}


TREES: dict[str, Any] = {
    "groups of two dtypes": {"s": layer(torch.bfloat16), "v": layer(torch.float64)},
    "keys and values of two dtypes": {"s": layer() | {"v": torch.ones(1, 2, 3, 4).half()}, "v": layer(torch.float64)},
    "values of other widths": {"s": layer(v=(1, 2, 3, 6)), "v": layer(v=(1, 2, 3, 7))},
    "values of other lengths": {"s": layer(v=(1, 2, 5, 4)), "v": layer(v=(1, 2, 3, 4))},
    "flat values": {"s": layer(v=(3, 4)), "v": layer()},
    "other batches": {"s": layer(), "v": layer(k=(2, 2, 3, 4))},
    "no tokens": {"s": layer(k=(1, 2, 0, 4)), "v": layer()},
    "names that a format could use": {
        "__metadata__": torch.ones(3),
        "dict": {"tuple": (torch.ones(2),)},
        "a/b": 1,
        "a": {"b": 2},
    },
    "named tuples": Encoding([{"s": layer(), "v": layer()}], torch.zeros(3)),
    "an order": OrderedDict(b=torch.ones(1), a=torch.zeros(2)),
    "views": {"row": torch.arange(12.0).view(3, 4)[1], "column": torch.arange(12.0).view(3, 4)[:, 1]},
    "one row for all": torch.arange(4.0).expand(3, 4),
    "complex": {"c": torch.randn(3, dtype=torch.complex64).conj(), "d": torch.randn(2, dtype=torch.complex128)},
    "scalars": [torch.tensor(2), torch.empty(0, 3), None, True, -0.0, float("inf"), "", Level.FINE, np.float64(1.5)],
    "parameters": [nn.Parameter(torch.randn(3, 2))],
}


def check_same(found: Any, expected: Any) -> None:
    leaves, structure = torch.utils._pytree.tree_flatten(expected)
    found_leaves, found_structure = torch.utils._pytree.tree_flatten(found)
    assert found_structure == structure
    for one, other in zip(found_leaves, leaves, strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("name", TREES)
def test_what_was_saved_comes_back(name: str, tmp_path: Path) -> None:
    tree = TREES[name]
    cache = Cache(tree)
    cache.save(tmp_path / "cache.pt")
    loaded = Cache.load(tmp_path / "cache.pt").tree
    check_same(loaded if name != "an order" else OrderedDict(loaded), tree)
    check_same(cache.to("cpu").tree, tree)
    check_same(cache.to(dtype=torch.float64).to(dtype=torch.float32).to("cpu").tree, cache.to(dtype=torch.float32).tree)


def test_containers_keep_their_class(tmp_path: Path) -> None:
    tree = Encoding([torch.ones(2)], torch.zeros(3))
    Cache(tree).save(tmp_path / "cache.pt")
    loaded = Cache.load(tmp_path / "cache.pt").tree
    assert type(loaded) is Encoding and torch.equal(loaded.condition, tree.condition)
    with pytest.MonkeyPatch.context() as patch:
        # A program without the class reads the names all the same.
        patch.delitem(globals(), "Encoding")
        stranger = Cache.load(tmp_path / "cache.pt").tree
    assert type(stranger).__name__ == "Encoding" and torch.equal(stranger.condition, tree.condition)
    moved = Cache({"d": defaultdict(list, a=torch.ones(1)), "o": OrderedDict(a=torch.ones(1))}).to(dtype=torch.float16)
    assert type(moved.tree["d"]) is defaultdict and moved.tree["d"]["new"] == []
    assert type(moved.tree["o"]) is OrderedDict and moved.tree["o"]["a"].dtype == torch.float16


def test_of_a_view_only_its_own_memory_is_stored(tmp_path: Path) -> None:
    Cache([torch.zeros(1 << 20)[:10]]).save(tmp_path / "cache.pt")
    assert (tmp_path / "cache.pt").stat().st_size < 5000


def test_caches_that_can_not_be_stored_are_refused(tmp_path: Path) -> None:
    for tree, message in (
        ({1: torch.ones(1)}, "keys of the cache must be strings"),
        ([{"a": {1, 2}}], "got set at '0/a'"),
    ):
        with pytest.raises(ValueError, match=message):
            Cache(tree)
    for tensor in (torch.ones(1, device="meta"), torch.ones(2).to_sparse()):
        with pytest.raises(ValueError, match="tensors of a saved cache must be dense and hold data"):
            Cache({"x": tensor}).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_is_opened_by_torch_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    Cache({"x": torch.arange(3.0)}).save(path)
    assert torch.equal(torch.load(path, weights_only=True)["tree"]["dict"]["x"]["value"], torch.arange(3.0))
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is no file of a cache, or its end is missing"):
        Cache.load(path)
    cache_file.save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="must be a file of the format"):
        Cache.load(path)


def small_file(path: Path) -> bytes:
    Cache({"s": {"k": torch.ones(1, 1, 1, 2), "v": torch.ones(1, 1, 1, 2)}}).save(path)
    return path.read_bytes()


def test_every_missing_or_changed_byte_is_found(tmp_path: Path) -> None:
    content = small_file(tmp_path / "good.pt")
    spoilt = tmp_path / "spoilt.pt"

    def check(data: bytes) -> None:
        spoilt.write_bytes(data)
        with pytest.raises(ValueError, match=r"spoilt\.pt is (damaged|no file of a cache)"):
            cache_file.load_file(spoilt)

    # Every byte once, with another bit each time.
    for i in range(len(content)):
        check(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
    for i in [*range(0, len(content), 37), *range(len(content) - 80, len(content))]:
        check(content[:i])
        check(content[:i] + content[i + 1 :])
        check(content[:i] + b"\0" + content[i:])
    check(content + b"\0")


def test_a_file_that_is_cut_later_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    Cache([torch.ones(1 << 18)]).save(path)
    cache = Cache.load(path)
    os.truncate(path, 4096)
    assert cache.tree[0].sum() == 1 << 18
    with pytest.raises(ValueError, match="no file of a cache"):
        Cache.load(path)


FULL_DISK = """
    import resource, signal, sys, torch
    from anchor_attention.streaming import Cache

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        Cache([torch.ones(1 << 18)]).save(sys.argv[1])
    except (OSError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    content = small_file(path)
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "OSError" in run.stdout and "File too large" in run.stdout
    assert path.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["cache.pt"]


def test_loading_takes_one_layer_more_than_the_cache(tmp_path: Path) -> None:
    # Groups in memory of their own, as they come from a GPU: they are laid one behind the other.
    tree = [
        {"layer": {name: {kind: torch.randn(1, 2, n, 64) for kind in "kv"} for name, n in (("a", 100), ("b", 50))}}
        for _ in range(10)
    ]
    cache = Cache(tree)
    cache.save(tmp_path / "cache.pt")
    with PeakMemory() as memory:
        loaded = Cache.load(tmp_path / "cache.pt")
    assert memory.peak <= 1.1 * cache.nbytes and memory.bytes == cache.nbytes
    assert all(torch.equal(*pair) for pair in zip(cache.tensors(), loaded.tensors(), strict=True))
