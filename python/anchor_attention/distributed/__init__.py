"""Attention to the keys of several processes: queries stay where they are, keys and values travel.

Imported on its own, by ``import anchor_attention.distributed``: it loads ``torch.distributed``.
"""

from .attention import sharded_attention
from .collectives import ProcessError
from .dtensors import dtensor_attention
from .sharded_table import GATHER_LIMIT, KeyShape, ShardedTable
from .streaming import stream_sharded
from .style import SequenceParallelAttention

__all__ = [
    "GATHER_LIMIT",
    "KeyShape",
    "ProcessError",
    "SequenceParallelAttention",
    "ShardedTable",
    "dtensor_attention",
    "sharded_attention",
    "stream_sharded",
]
