"""The collectives of torch.distributed that this package uses, in the functional form that graphs can hold.

They are private in torch, and have no public form that starts a transfer without waiting for it under a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Registers the operations.
from torch.distributed import _functional_collectives  # noqa: F401  # isort: skip

Mesh = DeviceMesh | dist.ProcessGroup | None


class ProcessError(RuntimeError):
    """Another process of the group has failed, has ended, or did not answer in time."""


class Processes(NamedTuple):
    """The processes that share keys: the name of their group, how many they are, and which of them this one is."""

    name: str
    size: int
    rank: int


def process_group(mesh: Mesh) -> dist.ProcessGroup:
    """The group of a mesh of one dimension, of a group, or of all processes (``None``).

    Raises:
        ValueError: If it is something else, a mesh of several dimensions, or there is no default group.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {mesh}: choose one by mesh[name]")
        return mesh.get_group()
    if mesh is None:
        if not dist.is_initialized():
            raise ValueError("mesh is None, but there is no default group: call torch.distributed.init_process_group")
        return cast(dist.ProcessGroup, dist.group.WORLD)
    if not isinstance(mesh, dist.ProcessGroup):
        raise ValueError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {type(mesh).__name__}")
    return mesh


def processes_of(group: dist.ProcessGroup) -> Processes:
    """The processes of a group, as plain numbers that a compiler may read."""
    return Processes(group.group_name, group.size(), group.rank())


def gather(local: Tensor, processes: Processes, what: str) -> Tensor:
    """Starts to gather (n, …) of every process into (processes · n, …). The result is to be waited for."""
    return _explained(
        lambda: torch.ops._c10d_functional.all_gather_into_tensor(local, processes.size, processes.name), what
    )


def scatter_sum(parts: Tensor, processes: Processes, what: str) -> Tensor:
    """Starts to sum (processes · n, …) over the processes, each of which gets its (n, …). To be waited for."""
    return _explained(
        lambda: torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", processes.size, processes.name), what
    )


def sum_all(local: Tensor, processes: Processes, what: str) -> Tensor:
    """Starts to sum a tensor over the processes, each of which gets the sum. To be waited for."""
    return _explained(lambda: torch.ops._c10d_functional.all_reduce(local, "sum", processes.name), what)


def send_on(block: Tensor, n_received: int, processes: Processes, what: str) -> Tensor:
    """Starts to send (n, …) to the next process, and to receive (n_received, …) of the one before. To be waited for."""
    following, before = (processes.rank + 1) % processes.size, (processes.rank - 1) % processes.size
    to = [block.shape[0] if rank == following else 0 for rank in range(processes.size)]
    of = [n_received if rank == before else 0 for rank in range(processes.size)]
    return _explained(lambda: torch.ops._c10d_functional.all_to_all_single(block, of, to, processes.name), what)


def wait(tensor: Tensor, what: str) -> Tensor:
    """Waits for what a collective was started for.

    Raises:
        ProcessError: If a process has failed, has ended or did not take part in time; the message says in ``what``.
    """
    return _explained(lambda: torch.ops._c10d_functional.wait_tensor(tensor), what)


def exchange_numbers(numbers: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Gathers equally many integers of every process, on the host.

    Raises:
        ProcessError: As :func:`wait`.
    """
    local = torch.tensor(list(numbers), dtype=torch.int64, device=_device_of_numbers(group))
    what = "agreement on sizes"
    gathered = wait(gather(local, processes_of(group), what), what)
    rows: list[list[int]] = gathered.view(group.size(), -1).tolist()
    return rows


def _device_of_numbers(group: dist.ProcessGroup) -> torch.device:
    """Where small numbers are exchanged: in the host's memory if the group can do that."""
    types = [str(device.type) for device in group._device_types]
    if "cpu" in types or not types:
        return torch.device("cpu")
    return torch.device(types[0], torch.accelerator.current_device_index())


def _explained(start: Callable[[], Any], what: str) -> Tensor:
    if torch.compiler.is_compiling():
        traced: Tensor = start()
        return traced
    try:
        tensor: Tensor = start()
    except RuntimeError as error:
        raise _process_error(what, error) from error
    return tensor


def _process_error(what: str, error: RuntimeError) -> ProcessError:
    reason = next(iter(str(error).splitlines()), "")
    return ProcessError(
        f"{what}: a process of the group has failed, has ended or did not take part within the timeout ({reason})"
    )
