"""Timing of anchor attention beside plain PyTorch on the same patterns: ``python -m anchor_attention.benchmark``."""

from .operation import PASSES, OperationInputs, make_operation_inputs, operation_contestant
from .peers import PEERS, Attention, NotSupportedError, prepare_peer
from .timing import Quartiles, interleave, ratios

__all__ = [
    "PASSES",
    "PEERS",
    "Attention",
    "NotSupportedError",
    "OperationInputs",
    "Quartiles",
    "interleave",
    "make_operation_inputs",
    "operation_contestant",
    "prepare_peer",
    "ratios",
]
