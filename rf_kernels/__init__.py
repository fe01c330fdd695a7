"""rf_kernels: the kernels under streaming video generation. Public names only; see docs/ for one page per
op."""

import sys

try:
    from ._backend import ArgumentError, Dispatch, backend, build_info, last_dispatch
    from .cache import (
        KV,
        CacheSpec,
        Chunk,
        ChunkBatch,
        ChunkPlan,
        EMASink,
        NonFiniteError,
        NoSink,
        Opening,
        Ring,
        SinkPolicy,
        SinkState,
        SinkWindowCache,
        SinkWindowRows,
        StaticSink,
        StreamClosedError,
    )
    from .ops.dmd_gradient import DMDAux, DMDOptions, dmd_gradient, dmd_loss, reward_weight
    from .ops.ema_evict import ema_evict
    from .ops.rope_append import rope, rope_append
    from .ops.sink_window_attention import sink_window_attention
    from .positions import RoPE, RoPE3D
except ImportError:
    # `python -m rf_kernels.doctor` exists to explain this very error, and is the only thing that gets past
    # it.
    if "rf_kernels.doctor" not in sys.orig_argv:
        raise

__version__ = "0.1.0"

__all__ = [
    "KV",
    "ArgumentError",
    "CacheSpec",
    "Chunk",
    "ChunkBatch",
    "ChunkPlan",
    "DMDAux",
    "DMDOptions",
    "Dispatch",
    "EMASink",
    "NoSink",
    "NonFiniteError",
    "Opening",
    "Ring",
    "RoPE",
    "RoPE3D",
    "SinkPolicy",
    "SinkState",
    "SinkWindowCache",
    "SinkWindowRows",
    "StaticSink",
    "StreamClosedError",
    "backend",
    "build_info",
    "dmd_gradient",
    "dmd_loss",
    "ema_evict",
    "last_dispatch",
    "reward_weight",
    "rope",
    "rope_append",
    "sink_window_attention",
]
