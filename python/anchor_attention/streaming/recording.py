"""Caches for a model made of this package's modules, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._context import Interception
from ..modules import MixedAttention, MultiBranchAnchorAttention
from ..patterns import TokenSpec
from .cache import Cache

# Wrappers that prefix the model's names with one of their own: compiled models, sharded ones, checkpointed layers.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Collects the caches of all attention modules that are called inside the ``with`` block.

    The dictionary that it yields holds, by module name, the cache of each call in order; ``Cache(dictionary)`` can be
    saved and moved. What a failed call of the model has left is dropped when the model is called again.

    The block sees only the calls of its own thread (its own task under asyncio); in a generator, those that the
    generator makes. A compiled model runs its attention modules outside the graph inside the block.

    Args:
        model: Any module with mixed and branch attention modules of this package.

    Raises:
        ValueError: If the model has no such module.
        RuntimeError: If none of them was called inside the block.
    """
    caches: dict[str, list[Any]] = {}
    with _Recording(model, caches) as block, _noted_passes(model, block):
        yield caches
    if not caches:
        raise RuntimeError(
            f"nothing was recorded: none of the attention modules {sorted(block.names.values())} was called inside the "
            "block, by its own thread"
        )


@contextmanager
def replay(model: nn.Module, cache: Any) -> Iterator[None]:
    """Lets the attention modules read recorded keys and values: the model is called with the queries alone.

    Groups that are recorded and not in a call's ``token_specs`` are read from the cache. A module that was called
    several times while recording gets its caches in that order, again and again; a call of the model after one that
    failed gets those of the one that failed. The block acts on the same calls as that of :func:`record`.

    Args:
        model: The model that was recorded, compiled or not.
        cache: What :func:`record` gave, or a :class:`Cache` of it.

    Raises:
        ValueError: If the model has no attention module; in the call of a module that was not recorded, or that has a
            ``kv_cache`` of its own.
    """
    tree = cache.tree if isinstance(cache, Cache) else cache
    with _Replay(model, {plain_name(name): calls for name, calls in tree.items()}) as block:
        with _noted_passes(model, block):
            yield


class _Attached(Interception):
    """Acts on the attention modules of a model.

    Attributes:
        names: The name of each module, by its identity.
        mark: State at the beginning of the model's call, ``None`` outside one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        inner = {
            id(module.mixed_attention) for module in model.modules() if isinstance(module, MultiBranchAnchorAttention)
        }
        self.names = {
            id(module): plain_name(name)
            for name, module in model.named_modules()
            if isinstance(module, (MixedAttention, MultiBranchAnchorAttention)) and id(module) not in inner
        }
        self.mark: Any = None
        if not self.names:
            raise ValueError(f"model must have attention modules of this package, {type(model).__name__} has none")

    def covers(self, module: nn.Module) -> bool:
        """Whether it is one of these modules."""
        return id(module) in self.names

    def begin_pass(self) -> None:
        """Called when the model is: undoes what a call that never ended has done."""
        if self.mark is not None:
            self.restore(self.mark)
        self.mark = self.state()

    def state(self) -> dict[str, int]:
        """How many calls of each module are done."""
        raise NotImplementedError

    def restore(self, state: dict[str, int]) -> None:
        """Goes back to a state."""
        raise NotImplementedError


class _Recording(_Attached):
    def __init__(self, model: nn.Module, caches: dict[str, list[Any]]) -> None:
        super().__init__(model)
        self.caches = caches

    def call(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        name = self.names[id(module)]
        out, cache = forward(**{**arguments, "return_kv_cache": True})
        self.caches.setdefault(name, []).append(cache)
        return (out, cache) if arguments.get("return_kv_cache") else out

    def state(self) -> dict[str, int]:
        return {name: len(calls) for name, calls in self.caches.items()}

    def restore(self, state: dict[str, int]) -> None:
        for name in list(self.caches):
            del self.caches[name][state.get(name, 0) :]
            if not self.caches[name]:
                del self.caches[name]


class _Replay(_Attached):
    shadows = True

    def __init__(self, model: nn.Module, recorded: dict[str, Any]) -> None:
        super().__init__(model)
        self.recorded = recorded
        self.turns: dict[str, int] = {}

    def call(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        name = self.names[id(module)]
        if not self.recorded.get(name):
            raise ValueError(f"module {name!r} was not recorded, only {sorted(self.recorded)}")
        if arguments.get("kv_cache") is not None:
            raise ValueError(f"module {name!r} was called with a kv_cache of its own inside replay: give one of them")
        turn = self.turns.get(name, 0)
        entries = self.recorded[name][turn % len(self.recorded[name])]
        present = {spec.name for spec in arguments["token_specs"]}
        cached = [TokenSpec(group, None) for group in entries if group not in present]
        token_specs = [*cached, *arguments["token_specs"]]
        result = forward(**{**arguments, "token_specs": token_specs, "kv_cache": entries})
        self.turns[name] = turn + 1
        return result

    def state(self) -> dict[str, int]:
        return dict(self.turns)

    def restore(self, state: dict[str, int]) -> None:
        self.turns = dict(state)


@contextmanager
def _noted_passes(model: nn.Module, block: _Attached) -> Iterator[None]:
    """Tells the block where a call of the model begins and ends well.

    Only these two hooks are on the module; in calls that don't belong to the block they do nothing.
    """
    if id(model) in block.names:
        yield
        return

    def begin(module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and block.holds:
            block.begin_pass()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and block.holds:
            block.mark = None

    handles = (model.register_forward_pre_hook(begin), model.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_name(name: str) -> str:
    """A module's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
