"""Real processes, joined by gloo, that run functions of the tests."""

from __future__ import annotations

import os
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from socket import IPPROTO_TCP, SOCK_STREAM, socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

# Seconds after which a collective without its partners fails, where the test is not about that.
TIMEOUT = 60.0


class Failed(Exception):
    """What a process has raised, with its traceback as text; or "is gone"."""


class Processes:
    """Processes that wait for functions. Any of the first n can be used, as groups of their own.

    Args:
        size: How many there are.
        timeout: Seconds of their collectives.
    """

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, timeout, self._folder.name, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def outcomes(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """Calls ``function(mesh, *args)`` in the first ``world`` processes: results, or :class:`Failed`.

        The mesh has one dimension, "tokens", of these processes.
        """
        for pipe in self.pipes[:world]:
            pipe.send((function, world, args))
        found: list[Any] = []
        for pipe in self.pipes[:world]:
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append(Failed("is gone"))
        return found

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        """As :meth:`outcomes`, but what one raises is raised here."""
        found = self.outcomes(function, world, *args)
        for rank, outcome in enumerate(found):
            if isinstance(outcome, Failed):
                raise RuntimeError(f"process {rank} of {world}: {outcome}")
        return found

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
            process.kill()
        self._folder.cleanup()


@contextmanager
def processes(size: int, timeout: float = TIMEOUT) -> Iterator[Processes]:
    """Processes that end with the block."""
    pool = Processes(size, timeout)
    try:
        yield pool
    finally:
        pool.close()


def _serve(rank: int, size: int, timeout: float, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    within = timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=within)
    groups = [dist.new_group(list(range(n)), timeout=within) for n in range(1, size + 1)]
    meshes = [
        DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tokens",)) if rank < n else None
        for n, group in enumerate(groups, start=1)
    ]
    while True:
        try:
            function, world, args = pipe.recv()
        except EOFError:
            break
        try:
            outcome = function(meshes[world - 1], *args)
            pipe.send(outcome)
        except Exception as error:  # Whatever a test provokes.
            pipe.send(Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    # Not by an orderly shutdown, which would wait for those that a test has killed.
    os._exit(0)


def bytes_sent() -> int:
    """Bytes that the sockets of this process have sent so far, each once, as the kernel counts them."""
    inodes: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("socket:"):
                continue
            with socket(fileno=os.dup(int(name))) as connection:
                if connection.type != SOCK_STREAM:
                    continue
                # Of struct tcp_info: tcpi_bytes_sent, and tcpi_bytes_retrans of them.
                info = connection.getsockopt(IPPROTO_TCP, 11, 256)
                sent, again = struct.unpack_from("QQ", info, 200)
                inodes[target] = sent - again
        except OSError:
            continue
    return sum(inodes.values())
