"""What holds inside a ``with`` block (record, replay, use_backend) holds for the calls of that block alone."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anchor_attention
from anchor_attention import JointAnchorAttention, KeyRangeTable, TokenSpec, _context, use_backend
from anchor_attention.streaming import Cache, record, replay, stream
from tests.module_cases import DIM, make, specs

ANCHORS = specs(surface_anchors=5, volume_anchors=4)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Model(nn.Module):
    """Two layers, the second of which is called twice; ``fail`` is raised between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = make(JointAnchorAttention, init_weights="torch")
        self.second = make(JointAnchorAttention, init_weights="torch")
        self.fail: BaseException | None = None

    def forward(self, x: Tensor, token_specs: list[TokenSpec]) -> Tensor:
        x = x + self.first(x, token_specs)
        x = x + self.second(x, token_specs)
        fail, self.fail = self.fail, None
        if fail is not None:
            raise fail
        return x + self.second(x, token_specs)


def queries_of(n: int) -> list[TokenSpec]:
    return specs(surface_queries=n)


class Request:
    """Anchors and queries, and what one pass over both gives."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.anchors = torch.randn(2, 9, DIM, dtype=torch.float64, generator=generator)
        self.queries = torch.randn(2, 7, DIM, dtype=torch.float64, generator=generator)
        both = torch.cat((self.anchors, self.queries), dim=1)
        self.expected = model(both, [*ANCHORS, *queries_of(7)])[:, 9:]

    def check(self, out: Tensor) -> None:
        torch.testing.assert_close(out, self.expected, **CLOSE)


@pytest.fixture
def model() -> Iterator[Model]:
    with torch.no_grad():
        yield Model().double().eval()


def recorded(model: nn.Module, request: Request) -> dict[str, Any]:
    with record(model) as caches:
        model(request.anchors, ANCHORS)
    return caches


def run_threads(*functions: Callable[[], object]) -> None:
    def without_gradients(function: Callable[[], object]) -> object:
        with torch.no_grad():
            return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(without_gradients, function) for function in functions]:
            future.result()


def test_threads_that_share_a_model_record_and_replay_their_own(model: Model) -> None:
    requests = [Request(model, seed) for seed in range(4)]
    together = threading.Barrier(len(requests))

    def serve(request: Request) -> None:
        for _ in range(4):
            together.wait()
            caches = recorded(model, request)
            assert {name: len(calls) for name, calls in caches.items()} == {"first": 1, "second": 2}
            together.wait()
            with replay(model, caches):
                request.check(model(request.queries, queries_of(7)))

    run_threads(*(lambda request=request: serve(request) for request in requests))


def test_threads_stream_from_one_model_and_cache(model: Model) -> None:
    request = Request(model, 0)
    cache = Cache(recorded(model, request))

    def decode(tree: Any, chunk: Tensor) -> Any:
        with replay(model, tree):
            return model(chunk, queries_of(chunk.shape[1]))

    points = [torch.randn(2, 30, DIM, dtype=torch.float64) for _ in range(3)]
    expected = [stream(decode, cache, x, chunk_size=7).outputs for x in points]
    assert torch.equal(expected[0][:, :7], decode(cache.tree, points[0][:, :7]))

    def check(i: int) -> None:
        assert torch.equal(stream(decode, cache, points[i], chunk_size=7).outputs, expected[i])

    run_threads(*(lambda i=i: check(i) for i in range(3)))


def test_a_call_of_another_thread_is_left_alone(model: Model) -> None:
    inside, other = Request(model, 0), Request(model, 1)
    whole = torch.cat((other.anchors, other.queries), dim=1)
    with record(model) as caches:
        run_threads(lambda: other.check(model(whole, [*ANCHORS, *queries_of(7)])[:, 9:]))
        model(inside.anchors, ANCHORS)
    assert len(caches["second"]) == 2
    with replay(model, caches):
        run_threads(lambda: other.check(model(whole, [*ANCHORS, *queries_of(7)])[:, 9:]))
        inside.check(model(inside.queries, queries_of(7)))
        # A thread that is given the context belongs to the block.
        context = contextvars.copy_context()
        run_threads(lambda: inside.check(context.run(model, inside.queries, queries_of(7))))


def test_tasks_that_take_turns_replay_their_own(model: Model) -> None:
    requests = [Request(model, seed) for seed in range(3)]

    async def serve(request: Request) -> None:
        with record(model) as caches:
            await asyncio.sleep(0)
            model(request.anchors, ANCHORS)
            await asyncio.sleep(0)
        with replay(model, caches):
            for _ in range(3):
                await asyncio.sleep(0)
                request.check(model(request.queries, queries_of(7)))

    async def serve_all() -> None:
        await asyncio.gather(*(serve(request) for request in requests))

    asyncio.run(serve_all())


def test_generators_that_take_turns_replay_their_own(model: Model) -> None:
    requests = [Request(model, seed) for seed in range(2)]

    def decoded(request: Request, n: int) -> Iterator[Tensor]:
        with replay(model, recorded(model, request)):
            for _ in range(n):
                yield model(request.queries, queries_of(7))

    streams = [decoded(request, n) for request, n in zip(requests, (2, 4), strict=True)]
    whole = torch.cat((requests[1].anchors, requests[1].queries), dim=1)
    for turn in range(4):
        for request, decoding, n in zip(requests, streams, (2, 4), strict=True):
            if turn < n:
                request.check(next(decoding))
            # The caller is outside of both.
            requests[1].check(model(whole, [*ANCHORS, *queries_of(7)])[:, 9:])
    for decoding in streams:
        assert next(decoding, None) is None
    assert _context._blocks.get() == ()
    # Left without an end, in another thread too.
    left = decoded(requests[0], 2)
    next(left)
    run_threads(left.close)
    requests[1].check(model(whole, [*ANCHORS, *queries_of(7)])[:, 9:])


def test_context_managers_of_generators_stand_for_the_block_that_uses_them(model: Model) -> None:
    request = Request(model, 0)
    caches = recorded(model, request)

    @contextmanager
    def inner() -> Iterator[None]:
        with replay(model, caches):
            yield

    @contextmanager
    def outer() -> Iterator[None]:
        with inner():
            yield

    with outer():
        request.check(model(request.queries, queries_of(7)))
    with ExitStack() as stack:
        stack.enter_context(outer())
        request.check(model(request.queries, queries_of(7)))
    assert not _context.intercepted


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_retry_after_an_exception_reads_what_the_failed_call_read(model: Model, error: BaseException) -> None:
    request = Request(model, 0)
    with record(model) as caches:
        model.fail = error
        with pytest.raises(type(error)):
            model(request.anchors, ANCHORS)
        model(request.anchors, ANCHORS)
    assert {name: len(calls) for name, calls in caches.items()} == {"first": 1, "second": 2}
    with replay(model, caches):
        request.check(model(request.queries, queries_of(7)))
        model.fail = error
        with pytest.raises(type(error)):
            model(request.queries, queries_of(7))
        request.check(model(request.queries, queries_of(7)))
        # A call that its own arguments end does not count either.
        with pytest.raises(ValueError):
            model(request.queries, queries_of(8))
        request.check(model(request.queries, queries_of(7)))


def test_two_passes_of_a_recording_are_replayed_in_order(model: Model) -> None:
    requests = [Request(model, seed) for seed in range(2)]
    with record(model) as caches:
        for request in requests:
            model(request.anchors, ANCHORS)
    with replay(model, Cache(caches)):
        for request in (*requests, *requests):
            request.check(model(request.queries, queries_of(7)))


def test_an_inner_block_replays_instead_of_the_outer_one(model: Model) -> None:
    requests = [Request(model, seed) for seed in range(2)]
    outer, inner = (recorded(model, request) for request in requests)
    with replay(model, outer):
        with replay(model, inner), record(model) as caches:
            requests[1].check(model(requests[1].queries, queries_of(7)))
        requests[0].check(model(requests[0].queries, queries_of(7)))
    assert {name: len(calls) for name, calls in caches.items()} == {"first": 1, "second": 2}


def test_the_caller_gets_what_it_asks_for_while_recording(model: Model) -> None:
    request, module = Request(model, 0), model.first
    with record(model) as caches:
        out = module(request.anchors, ANCHORS)
        again, cache = module(request.anchors, ANCHORS, return_kv_cache=True)
    assert torch.equal(out, again) and cache is caches["first"][1]
    with replay(model, caches), pytest.raises(ValueError, match="'first' was called with a kv_cache of its own"):
        module(request.queries, queries_of(7), kv_cache=cache)


def test_nothing_recorded_is_an_error(model: Model) -> None:
    with pytest.raises(ValueError, match="model must have attention modules of this package, Linear has none"):
        with record(nn.Linear(2, 2)):
            pass
    with pytest.raises(
        RuntimeError, match=r"nothing was recorded: none of the attention modules \['first', 'second'\]"
    ):
        with record(model):
            pass
    # An error inside is the one that is seen.
    with pytest.raises(KeyError), record(model):
        raise KeyError
    assert not model._forward_hooks and not model._forward_pre_hooks


def compiled_ways(model: Model) -> list[tuple[str, nn.Module, Callable[..., Tensor]]]:
    def plain(x: Tensor, token_specs: list[TokenSpec]) -> Tensor:
        out: Tensor = model(x, token_specs)
        return out

    wrapped = torch.compile(model, backend="eager")
    return [
        ("wrapped", wrapped, wrapped),
        ("wrapped, plain model recorded", model, wrapped),
        ("function", model, torch.compile(plain, backend="eager")),
    ]


# The ways differ little, and each takes its time to compile.
@pytest.mark.parametrize("way", [0, *(pytest.param(way, marks=pytest.mark.slow) for way in (1, 2, 3))])
def test_compiled_models_are_recorded_and_replayed(model: Model, way: int) -> None:
    requests = [Request(model, seed) for seed in range(2)]
    whole = torch.cat((requests[1].anchors, requests[1].queries), dim=1)
    torch._dynamo.reset()
    if way < 3:
        _, target, call = compiled_ways(model)[way]
    else:
        target = call = Model().double().eval()
        target.load_state_dict(model.state_dict())
        target.compile(backend="eager")
    for request in requests:
        # Warmed up with the same shapes: nothing but the block itself can tell the calls apart.
        for _ in range(2):
            call(request.anchors, ANCHORS)
        with record(target) as caches:
            call(request.anchors, ANCHORS)
        assert {name: len(calls) for name, calls in caches.items()} == {"first": 1, "second": 2}
        with replay(model if way < 3 else target, caches):
            request.check(call(request.queries, queries_of(7)))
            run_threads(lambda: requests[1].check(call(whole, [*ANCHORS, *queries_of(7)])[:, 9:]))
        requests[1].check(call(whole, [*ANCHORS, *queries_of(7)])[:, 9:])
        # Recorded plain, replayed compiled; and with the names that older recordings of compiled models have.
        with replay(target, recorded(model, request)):
            request.check(call(request.queries, queries_of(7)))
        with replay(target, {f"_orig_mod.{name}": calls for name, calls in caches.items()}):
            request.check(call(request.queries, queries_of(7)))


def test_a_whole_graph_can_not_be_recorded_and_says_so(model: Model) -> None:
    request = Request(model, 0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(request.anchors, ANCHORS)
    with pytest.raises(Exception, match="compile without fullgraph=True"), record(compiled):
        compiled(request.anchors, ANCHORS)


def back_end(q: Tensor, table: KeyRangeTable) -> str:
    """The back-end of a call, told by its operations."""
    with torch.profiler.profile() as profile:
        anchor_attention.anchor_attention(q, q, q, table)
    names = {event.name for event in profile.events()}
    return "fused" if "anchor_attention::attention" in names else "reference"


def test_a_back_end_acts_on_its_own_thread_and_ends_with_its_block() -> None:
    seen: dict[str, str] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with use_backend("reference"):
            inside.set()
            assert leave.wait(60)
            seen["other"] = _context.backend

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    assert _context.backend == "fused"
    with use_backend("reference"):
        leave.set()
        thread.join()
        assert _context.backend == "reference"
        with use_backend("fused"):
            assert _context.backend == "fused"
        assert _context.backend == "reference"
    assert _context.backend == "fused" and seen == {"other": "reference"}


def test_back_ends_of_generators_and_decorators() -> None:
    def settings(name: str) -> Iterator[str]:
        with use_backend(name):
            while True:
                yield _context.backend

    one, two = settings("reference"), settings("fused")
    for _ in range(2):
        assert (next(one), next(two), next(one)) == ("reference", "fused", "reference")
        assert _context.backend == "fused"
    one.close()
    two.close()

    @use_backend("reference")
    def decorated(depth: int) -> list[str]:
        return [_context.backend, *(decorated(depth - 1) if depth else [])]

    assert decorated(2) == ["reference"] * 3 and _context.backend == "fused"
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert _context.backend == "fused"


def test_the_back_end_decides_on_the_operation() -> None:
    q, table = torch.randn(1, 6, 2, 8), KeyRangeTable.from_ranges([[0, 6]], [[0, 6]])
    assert back_end(q, table) == "fused"
    with use_backend("reference"):
        assert back_end(q, table) == "reference"
        run_threads(lambda: _equal(back_end(q, table), "fused"))


def _equal(found: object, expected: object) -> None:
    assert found == expected
