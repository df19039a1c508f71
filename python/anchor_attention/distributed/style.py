"""Modules that are called with the tokens of one process and attend to the anchors of all."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from .collectives import process_group
from .layouts import AGREEMENTS, Layouts
from .sharded_modules import shard
from .sharded_steps import Sharding
from .sharded_table import GATHER_LIMIT


class SequenceParallelAttention(ParallelStyle):
    """Attention of the tokens of each process to the anchors of all. A style of ``parallelize_module``::

        parallelize_module(model, mesh, {"blocks.*.attention": SequenceParallelAttention()})

    Each process calls the model with its own tokens, ``token_specs``, ``freqs`` and ``key_padding_mask``, and gets its
    rows. All name the same groups in the same order; sizes may differ, and be 0. The result is that of one process that
    holds every token in group order, process by process within a group. Parameters are the same on every process, and
    the sum of their gradients over the processes is the gradient: where DDP or FSDP take the mean over these
    processes, multiply the loss by their number.

    A cache that is asked for holds the keys of all processes; calls that read nothing else are local. All other calls,
    and their backward passes, are made by every process in the same order.

    Args:
        case: ``"gathered"`` or ``"ring"``. If not given, keys are gathered where those of all processes, padded to
            equal numbers, take no more than ``gather_limit`` bytes with their values; and always for a cache, and where
            weights are dropped.
        gather_limit: Bytes.
        agree: When sizes are agreed on, by one small message. ``"pass"``: once for all layers between two calls of the
            same module, whose sizes must not change in between. ``"call"``: in every call. ``"once"``: sizes that a
            process has seen before are not agreed on again: you guarantee that those of the others are as they were.

    Raises:
        ValueError: If an argument is invalid; when the style is applied, if the module holds no attention that can
            share its keys, or the mesh has several dimensions.
    """

    def __init__(self, *, case: str | None = None, gather_limit: int = GATHER_LIMIT, agree: str = "pass") -> None:
        super().__init__()
        if case not in (None, "gathered", "ring"):
            raise ValueError(f"case must be 'gathered', 'ring' or None, got {case!r}")
        if agree not in AGREEMENTS:
            raise ValueError(f"agree must be one of {AGREEMENTS}, got {agree!r}")
        self._case = case
        self._gather_limit = gather_limit
        self._agree = agree
        self._layouts: dict[str, Layouts] = {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = process_group(device_mesh)
        # One for all modules of the style: they agree once for all of them.
        layouts = self._layouts.setdefault(group.group_name, Layouts(group, self._agree))
        if not shard(module, Sharding(layouts, self._case, self._gather_limit)):
            raise ValueError(
                f"module must hold anchor attention of this package, got {type(module).__name__}: "
                "accelerate models of noether first"
            )
        return module
