"""Many calls at once and for long: threads, forks and interrupts change no bit, and memory stays where it was."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anchor_attention import KeyRangeTable, LatentAttention, SelfAnchorAttention, anchor_attention, merge_attention
from anchor_attention.streaming import record, replay, stream
from tests.generators import unit_freqs
from tests.module_cases import make, specs, total

N_THREADS = 32
# Whole runs stay under a minute on one old core.
pytestmark = pytest.mark.slow


def job(seed: int) -> tuple[Tensor, ...]:
    """A call of its own sizes, dtype, table and mask, forward and backward: every bit follows from the seed."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = rng.choice((1, 3)), rng.choice((8, 24, 64))
    n, m = rng.randint(1, 200), rng.randint(1, 200)
    q, k, v = (
        torch.randn(1, size, heads, head_dim, generator=generator).to(dtype).requires_grad_() for size in (n, m, m)
    )
    cut = rng.randint(0, n)
    table = KeyRangeTable.from_ranges([[0, cut], [cut, n], [cut, n]], [[0, m], [0, m // 2], [m // 3, m]])
    mask = torch.rand(1, m, generator=generator) < 0.8 if rng.random() < 0.5 else None
    out, lse = anchor_attention(q, k, v, table, key_mask=mask, return_lse=True)
    grads = torch.autograd.grad((out.double().square().sum() + lse[lse.isfinite()].sum()), (q, k, v))
    return out.detach(), lse.detach(), *grads


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True))


def test_calls_of_many_threads_give_the_bits_of_one() -> None:
    # Backward sums depend on how many threads share a call, and torch hands its number to new threads only.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = [job(seed) for seed in range(40)]
        start = threading.Barrier(N_THREADS)

        def work(thread: int) -> list[int]:
            torch.set_num_threads(1)
            order = list(range(40)) * 3
            random.Random(thread).shuffle(order)
            start.wait()
            return [seed for seed in order if not same(job(seed), expected[seed])]

        with ThreadPoolExecutor(N_THREADS) as pool:
            assert [wrong for wrong in pool.map(work, range(N_THREADS)) if wrong] == []
    finally:
        torch.set_num_threads(before)


def test_modules_shared_by_many_threads_keep_their_plans_apart() -> None:
    module = make(SelfAnchorAttention, use_rope=True).eval()
    cases = [specs(surface_anchors=3 + i % 4, surface_queries=i, volume_anchors=2 + i % 3) for i in range(24)]
    inputs = [(torch.randn(1, total(case), 32), case, unit_freqs(1, total(case), 16)) for case in cases]
    with torch.no_grad():
        expected = [module(*arguments) for arguments in inputs]
        start = threading.Barrier(N_THREADS)

        def work(thread: int) -> int:
            order = list(range(len(inputs))) * 4
            random.Random(thread).shuffle(order)
            start.wait()
            with torch.no_grad():  # of each thread
                return sum(not torch.equal(module(*inputs[i]), expected[i]) for i in order)

        with ThreadPoolExecutor(N_THREADS) as pool:
            assert sum(pool.map(work, range(N_THREADS))) == 0


FORKS = """
    import os, sys, threading, torch
    from anchor_attention import KeyRangeTable, anchor_attention

    torch.manual_seed(0)
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (300, 200, 200))
    table = KeyRangeTable.from_ranges([[0, 300]], [[0, 200]])
    expected = anchor_attention(q, k, v, table)
    done = threading.Event()

    def busy():
        torch.set_num_threads(1)
        while not done.is_set():
            anchor_attention(q, k, v, table)

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(anchor_attention(q, k, v, table), expected) else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    done.set()
    for thread in threads:
        thread.join()
    print(sum(code != 0 for code in codes), len(codes))
"""


def test_forks_among_busy_threads() -> None:
    """No lock of ours is held in the child for ever: every child computes, and computes the same."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(FORKS)], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["0", "20"], run.stderr


INTERRUPTS = """
    import signal, time, torch
    from anchor_attention import KeyRangeTable, anchor_attention

    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, requires_grad=True) for n in (1500, 1500, 1500))
    table = KeyRangeTable.from_ranges([[0, 1500]], [[0, 1500]])

    def step():
        out = anchor_attention(q, k, v, table)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = step()
    begin = time.perf_counter()
    step()
    length = time.perf_counter() - begin
    signal.signal(signal.SIGALRM, ring)
    interrupted = 0
    for i in range(60):
        signal.setitimer(signal.ITIMER_REAL, max(1e-4, length * (i % 20) / 20))
        try:
            step()
        except Alarm:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if i % 10 == 9:
            assert all(torch.equal(a, b) for a, b in zip(step(), expected)), i
    print(interrupted)
"""


def test_interrupts_at_any_moment_leave_later_calls_alone() -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTS)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 20


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def operation_soak() -> Callable[[int], Any]:
    return lambda i: job(i % 200)


def error_soak() -> Callable[[int], Any]:
    q, k, v = (torch.randn(1, n, 2, 16) for n in (30, 20, 20))

    def refused(i: int) -> None:
        with pytest.raises(RuntimeError, match="out of bounds"):
            anchor_attention(q, k, v, KeyRangeTable.from_ranges([[0, 30]], [[0, 21 + i]]))

    return refused


def module_soak() -> Callable[[int], Any]:
    module, latent = make(SelfAnchorAttention), LatentAttention(dim=32, num_heads=2, num_latents=5)

    def step(i: int) -> None:
        # Other sizes in every call: plans are made anew, and old ones must go.
        groups = specs(surface_anchors=1 + i % 97, surface_queries=i % 89, volume_anchors=1 + i % 83)
        x = torch.randn(1, total(groups), 32, requires_grad=True)
        (module(x, groups) + latent(x)).square().sum().backward()

    return step


def streaming_soak() -> Callable[[int], Any]:
    module = make(SelfAnchorAttention).eval()
    model = torch.nn.ModuleDict({"attention": module})

    def step(i: int) -> None:
        groups = specs(surface_anchors=1 + i % 40, volume_anchors=5)
        with torch.no_grad(), record(model) as caches:
            module(torch.randn(1, total(groups), 32), groups)

        def decode(cache: Any, chunk: Tensor) -> Tensor:
            with replay(model, cache):
                return module(chunk, specs(surface_queries=chunk.shape[1]))

        stream(decode, caches, torch.randn(50, 32), chunk_size=20)

    return step


def merging_soak() -> Callable[[int], Any]:
    def step(i: int) -> None:
        parts = [(torch.randn(1, 40, 2, 16, requires_grad=True), torch.randn(1, 2, 40)) for _ in range(2 + i % 3)]
        out, _ = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
        out.sum().backward()

    return step


SOAKS = {
    "operation": (operation_soak, 1500),
    "errors": (error_soak, 4000),
    "modules": (module_soak, 1500),
    "streaming": (streaming_soak, 600),
    "merging": (merging_soak, 3000),
}


@pytest.mark.parametrize("name", SOAKS)
def test_memory_stays_where_it_was(name: str) -> None:
    """The second half of the calls may take what one fragmented heap does, not what thousands of lost objects do."""
    make_step, calls = SOAKS[name]
    step = make_step()
    for i in range(calls):
        step(i)
    before, objects = resident_bytes(), len(gc.get_objects())
    for i in range(calls):
        step(calls + i)
    # A kilobyte a call would be the smallest tensor or table of these that could be lost.
    assert resident_bytes() - before < 1024 * calls + 4 * 2**20
    gc.collect()
    assert len(gc.get_objects()) - objects < calls / 2
