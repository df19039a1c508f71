"""Peak memory of a call above its inputs, as the operating system sees it.

The peak resident set of a process counts everything: torch's tensors, what a kernel allocates by itself, what a library
keeps. Each measurement has a process of its own, forked from one that has only imported what is needed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from anchor_attention.benchmark import NotSupportedError

from .cases import Case, make_contest
from .workloads import shrink

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
# mallopt's number for the size from which a block is mapped on its own, and so goes back to the system when freed.
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD = 64 * 1024


def peak_above_inputs(case: Case, peer: str, threads: int) -> int:
    """Bytes that a call needs at its peak beyond its inputs and weights: outputs, gradients, temporaries, packed forms.

    Raises:
        NotSupportedError: If the system does not tell, or the process ended without a result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, case, peer, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the process ended without a result"
    process.join()
    if isinstance(result, str):
        raise NotSupportedError(result)
    return int(result)


def _measure(sender: Connection, case: Case, peer: str, threads: int) -> None:
    try:
        sender.send(_peak(case, peer, threads))
    except (OSError, NotSupportedError) as error:
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def _peak(case: Case, peer: str, threads: int) -> int:
    map_large_blocks()
    torch.set_num_threads(threads)
    # Code pages, thread stacks and a library's one-time tables are not what a call costs.
    small = make_contest(Case(case.level, shrink(case.workload, 16), case.pattern, case.dtype, case.passes), (peer,))
    small.contestants[peer](small.make_inputs())
    contest = make_contest(case, (peer,))
    contestant = contest.contestants.get(peer)
    if contestant is None:
        raise NotSupportedError(contest.not_supported[peer])
    inputs = contest.make_inputs()
    return peak_of(lambda: contestant(inputs))


def map_large_blocks() -> None:
    """Has every large block of this process mapped on its own from now on: what is freed is then seen to be."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of this process at the peak of a call, its results included, above those before.

    Raises:
        NotSupportedError: If the system does not tell.
    """
    gc.collect()
    # What lies free in the heap would serve the call unseen.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _kibibytes("VmRSS")
    results = call()
    peak = _kibibytes("VmHWM")
    del results
    return (peak - before) * 1024


def _kibibytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise NotSupportedError(f"{STATUS} has no {field}")
