"""The KV cache of a stream: its geometry, the chunks that go through it, and what its sink does."""

from .cache import SinkWindowCache, StreamClosedError
from .chunk import KV, Chunk
from .plan import CacheSpec, ChunkPlan, Ring
from .rows import ChunkBatch, SinkWindowRows
from .sinks import EMASink, NonFiniteError, NoSink, SinkPolicy, SinkState, StaticSink
from .stream import Opening

__all__ = [
    "KV",
    "CacheSpec",
    "Chunk",
    "ChunkBatch",
    "ChunkPlan",
    "EMASink",
    "NoSink",
    "NonFiniteError",
    "Opening",
    "Ring",
    "SinkPolicy",
    "SinkState",
    "SinkWindowCache",
    "SinkWindowRows",
    "StaticSink",
    "StreamClosedError",
]
