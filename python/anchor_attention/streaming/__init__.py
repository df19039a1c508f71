"""Any number of queries against anchors that are encoded once: a cache of all layers, and chunks of queries.

A model that has ``encode`` and ``decode``, however it holds its caches::

    cache = Cache(model.encode(anchors))
    stream(model.decode, cache, points, pressures, chunk_size=65536, checkpoint="run.json", progress=True)

A model without caches of its own, made of this package's modules::

    with torch.no_grad(), record(model) as caches:
        model(anchors)

    def decode(cache, chunk):
        with replay(model, cache):
            return model(chunk)

    stream(decode, Cache(caches), points, memory_budget=2**30)
"""

from .cache import Cache, LayerCost
from .checkpoint import Checkpoint
from .decoding import StreamReport, stream
from .derivatives import WithJacobian
from .memory import chunk_size_for_budget
from .progress import Progress
from .recording import record, replay

__all__ = [
    "Cache",
    "Checkpoint",
    "LayerCost",
    "Progress",
    "StreamReport",
    "WithJacobian",
    "chunk_size_for_budget",
    "record",
    "replay",
    "stream",
]
