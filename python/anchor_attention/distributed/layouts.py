"""When the modules of a model agree on sizes with the other processes: once per pass, not per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from .agreement import agree, fail
from .collectives import processes_of

AGREEMENTS = ("pass", "call", "once")

Rows = tuple[tuple[int, ...], ...]


class Layouts:
    """What the processes of a group have agreed on, for the modules that share it.

    A pass ends when a module is called again: at the next step, or as a checkpoint computes its forward anew. Every
    process sees the same calls, so all of them find that out by themselves.

    Args:
        group: The processes.
        when: ``"pass"``: once per pass and set of groups. ``"call"``: in every call. ``"once"``: sizes that this
            process has seen before are not agreed on again.
    """

    def __init__(self, group: dist.ProcessGroup, when: str) -> None:
        self.group = group
        self.processes = processes_of(group)
        self.when = when
        self.agreements = 0
        self._called: set[int] = set()
        self._agreed: dict[Any, tuple[tuple[int, ...], Rows]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        # A copy of a model runs in the same processes.
        return self

    def rows(self, module: nn.Module, description: str, numbers: Sequence[int]) -> Rows:
        """Returns the numbers of every process.

        Args:
            module: The module that is called.
            description: What must be the same on every process.
            numbers: Those of this process.

        Raises:
            ValueError: If the descriptions differ, or the numbers of this process have changed within a pass.
            ProcessError: If a process fails, has ended or does not answer in time.
        """
        own = tuple(numbers)
        if self._begins(module):
            self._called.clear()
            self._agreed.clear()
        self._called.add(id(module))
        key = description if self.when == "pass" else (description, own)
        if key in self._agreed:
            agreed, rows = self._agreed[key]
            if agreed != own:
                raise ValueError(
                    f"token_specs must not change their sizes within a pass, got {agreed} and then {own} keys: "
                    "use SequenceParallelAttention(agree='call')"
                )
            return rows
        self.agreements += 1
        rows = tuple(tuple(row) for row in agree(description, list(own), self.group))
        if self.when != "call":
            self._agreed[key] = (own, rows)
        return rows

    def fail(self, module: nn.Module, error: Exception) -> None:
        """Tells the other processes, where they wait for an agreement with this one, that it can't go on."""
        if self.when == "call" or (self.when == "pass" and self._begins(module)):
            self.agreements += 1
            self._called.clear()
            fail(error, self.group)

    def _begins(self, module: nn.Module) -> bool:
        return self.when == "pass" and (not self._called or id(module) in self._called)
