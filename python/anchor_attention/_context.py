"""State that holds inside a ``with`` block, and only for the calls that belong to it.

Blocks are kept in a context variable: other threads and other asyncio tasks do not see them, and overlapping blocks may
end in any order. A block that a generator has entered rests while that generator is suspended, since the caller shares
the context.

``backend`` and ``intercepted`` are attributes that are computed when they are read. torch.compile reads module
attributes while it traces, in the calling thread, and guards on their values; it can't read a context variable at all.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch

DEFAULT_BACKEND = "fused"

Forward = TypeVar("Forward", bound=Callable[..., Any])
Entered = TypeVar("Entered", bound="Block")


class Block:
    """A ``with`` block. Each object is entered only once."""

    def __init__(self) -> None:
        self.ended = False
        self._generator: FrameType | None = None

    def __enter__(self: Entered) -> Entered:
        self._generator = _generator_around(sys._getframe(1))
        _blocks.set((*_open_blocks(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended = True
        self._generator = None
        # Not a reset to what was there before: blocks of generators end in any order, or in another context.
        _blocks.set(_open_blocks())

    @property
    def rests(self) -> bool:
        """Whether it has ended, or the generator that entered it is suspended."""
        return self.ended or (self._generator is not None and self._generator.f_back is None)

    @property
    def holds(self) -> bool:
        """Whether a call that is made now belongs to the block."""
        return self in _blocks.get() and not self.rests


class BackendBlock(Block):
    """Runs the functional calls on a back-end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Interception(Block):
    """Intercepts the calls of modules.

    Attributes:
        shadows: Whether it replaces the enclosing blocks of this kind, instead of acting in addition to them.
    """

    shadows = False

    def covers(self, module: torch.nn.Module) -> bool:
        """Whether it acts on a module."""
        raise NotImplementedError

    def call(self, module: torch.nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Calls ``forward`` with these arguments, by name, or with others, and returns what the caller gets."""
        raise NotImplementedError


_blocks: ContextVar[tuple[Block, ...]] = ContextVar("anchor_attention_blocks", default=())


def _open_blocks() -> tuple[Block, ...]:
    return tuple(block for block in _blocks.get() if not block.ended)


def _generator_around(frame: FrameType | None) -> FrameType | None:
    """The frame of the generator whose ``with`` statement enters a block; ``None`` if it is no generator.

    A context manager that is written as a generator stands for the statement that uses it.
    """
    while frame is not None:
        suspends = frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)
        if not _of_contextlib(frame) and not (suspends and _of_contextlib(frame.f_back)):
            return frame if suspends else None
        frame = frame.f_back
    return None


def _of_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


def __getattr__(name: str) -> Any:
    if name == "backend":
        for block in reversed(_blocks.get()):
            if isinstance(block, BackendBlock) and not block.rests:
                return block.name
        return DEFAULT_BACKEND
    if name == "intercepted":
        return any(isinstance(block, Interception) and not block.rests for block in _blocks.get())
    if name == "call_outside_graph":
        return _call_outside_graph()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def interceptable(forward: Forward) -> Forward:
    """Lets the blocks that hold intercept a module's ``forward``, compiled or not."""
    this = sys.modules[__name__]

    @functools.wraps(forward)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if this.intercepted:
            # What a block does (collecting, counting) is not part of a graph.
            through = this.call_outside_graph if torch.compiler.is_compiling() else call_intercepted
            return through(forward, self, args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def call_intercepted(
    forward: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls ``forward`` through every block that holds, the innermost first."""
    bound = _signature(forward).bind(module, *args, **kwargs).arguments
    bound.pop(next(iter(bound)))
    call = functools.partial(forward, module)
    blocks = [b for b in _blocks.get() if isinstance(b, Interception) and not b.rests and b.covers(module)]
    innermost = next((block for block in reversed(blocks) if block.shadows), None)
    for block in blocks:
        if block is innermost or not block.shadows:
            call = functools.partial(_through, block, module, call)
    return call(**bound)


def _through(block: Interception, module: torch.nn.Module, forward: Callable[..., Any], /, **arguments: Any) -> Any:
    return block.call(module, forward, arguments)


_signature = functools.lru_cache(inspect.signature)


@functools.cache
def _call_outside_graph() -> Callable[..., Any]:
    # Made when it is first traced: at import it would load the compiler.
    reason = "record and replay run attention modules outside the graph: compile without fullgraph=True to use them"
    disabled: Callable[..., Any] = torch.compiler.disable(call_intercepted, reason=reason)  # type: ignore[no-untyped-call]
    return disabled
