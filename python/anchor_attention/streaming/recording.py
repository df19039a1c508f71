"""Caches of a model made of this package's modules, without a change to the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..modules import MixedAttention, MultiBranchAnchorAttention
from ..patterns import TokenSpec
from .cache import Cache


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Collects the caches of all attention modules that are called inside the ``with`` block.

    The dictionary that it gives holds, by the name of the module, the cache of each call in order;
    ``Cache(dictionary)`` can be saved and moved.

    Args:
        model: Any module whose mixed and branch attention modules are called without ``return_kv_cache``.
    """
    caches: dict[str, list[Any]] = {}
    handles = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "return_kv_cache": True}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            out, cache = output
            caches.setdefault(name, []).append(cache)
            return out

        return hook

    for name, module in _attention_modules(model):
        handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
        handles.append(module.register_forward_hook(keep(name)))
    try:
        yield caches
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay(model: nn.Module, cache: Any) -> Iterator[None]:
    """Lets the attention modules read recorded keys and values: the model is called with the queries alone.

    Groups that are recorded and not in a call's ``token_specs`` are read from the cache. A module that was called
    several times while recording gets its caches in that order, again and again.

    Args:
        model: The model that was recorded.
        cache: What :func:`record` gave, or a :class:`Cache` of it.

    Raises:
        ValueError: In the call of a module that was not recorded.
    """
    tree = cache.tree if isinstance(cache, Cache) else cache
    turns: dict[str, int] = {}

    def feed(name: str, signature: inspect.Signature) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if name not in tree:
                raise ValueError(f"module {name!r} was not recorded, only {sorted(tree)}")
            turn = turns.get(name, 0)
            turns[name] = (turn + 1) % len(tree[name])
            entries = tree[name][turn]
            call = dict(signature.bind(*args, **kwargs).arguments)
            present = {spec.name for spec in call["token_specs"]}
            cached = [TokenSpec(group, None) for group in entries if group not in present]
            return (), {**call, "token_specs": [*cached, *call["token_specs"]], "kv_cache": entries}

        return hook

    handles = [
        module.register_forward_pre_hook(feed(name, inspect.signature(module.forward)), with_kwargs=True)
        for name, module in _attention_modules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    inner = {id(module.mixed_attention) for module in model.modules() if isinstance(module, MultiBranchAnchorAttention)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (MixedAttention, MultiBranchAnchorAttention)) and id(module) not in inner
    ]
