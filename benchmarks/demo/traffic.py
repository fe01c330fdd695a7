"""Bytes that the cache path moves for one chunk: norm, RoPE, writing, rolling, the sink's average,
concatenation. Projections and the attention itself are left out. All three figures are counts, not
measurements.

- published: the published path runs under a dispatch mode that adds up the bytes of every operand and result
  of every PyTorch kernel it calls (views are free); its attention is replaced by a function that touches
  nothing.
- ours: what the kernels read and write (``benchmarks.traffic``): rows, norm weights, and the chunk's plan.
- floor: the least that the job can move (``benchmarks.floors``).
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import floors, published, traffic


class ByteCounter(TorchDispatchMode):
    """Adds up bytes read and written by every kernel call inside the context."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in operands}
        is_view = (
            results
            and all(t.untyped_storage().data_ptr() in storages for t in results)
            and not func._schema.is_mutable
        )
        if not is_view:
            if func._schema.name in ("aten::copy_", "aten::fill_"):
                operands = operands[1:]  # the destination is written, not read
            self.bytes += sum(t.numel() * t.element_size() for t in operands + results)
        return out


def published_bytes(config, stream, grid, batch: int, dtype: torch.dtype, forwards: int) -> int:
    """One layer, one chunk in the steady state, ``forwards`` forwards."""
    n, chunk = grid[0] * grid[1], stream.chunk_frames
    capacity, num_sink_tokens = stream.local_attn_size * n, stream.sink_frames * n
    cache = published.EMASinkKVCache(batch, capacity, config.num_heads, config.head_dim, dtype)
    norms = [published.RMSNorm(config.dim, config.eps).to(dtype) for _ in range(2)]
    table = published.rope_table(config.head_dim)
    q, k, v = (
        torch.zeros(batch, chunk * n, config.num_heads, config.head_dim, dtype=dtype) for _ in range(3)
    )
    tokens = chunk * n

    def forward(start):
        q_n, k_n = (norm(x.flatten(2)).view_as(x) for norm, x in zip(norms, (q, k), strict=True))
        end = cache.append(k_n, v, start, num_sink_tokens, stream.alpha)
        window = published.read_window(end, tokens, n, num_sink_tokens, capacity)
        published.cached_attention(
            q_n, cache, window, (chunk, *grid), num_sink_tokens, table, lambda q, k, v: q
        )

    with torch.no_grad():
        steady = -(-stream.local_attn_size // chunk) + 1
        for index in range(steady):
            forward(index * tokens)
        with ByteCounter() as counter:
            for _ in range(forwards):
                forward(steady * tokens)
    return counter.bytes


def count(config, stream, grid, batch: int, dtype: torch.dtype, forwards: int) -> dict:
    """Bytes per chunk over all layers: published, ours, floor, and the ratios."""
    n, frames, rope = grid[0] * grid[1], stream.chunk_frames, config.rope
    heads = {"batch": batch, "head_dim": config.head_dim, "dtype": dtype}
    append = {"tokens": frames * n, "q_heads": config.num_heads, **heads}
    angles = sum(length * pairs for length, pairs in zip((frames, *grid), rope.pairs, strict=True))
    ours = forwards * sum(
        traffic.rope_append(frames=frames, kv_heads=config.num_heads, angles=angles, **append).values()
    )
    floor = forwards * floors.rope_append(**append)["bytes"]
    if stream.sink_frames and stream.sink_policy != "none":
        ema = stream.sink_policy == "ema"
        # Consecutive frames leave, so sink frame j absorbs every S-th of them. A static sink keeps its keys
        # in the cache's dtype.
        counts = [len(range(j, frames, stream.sink_frames)) if ema else 0 for j in range(stream.sink_frames)]
        evict = {
            "frame_tokens": n,
            "heads": config.num_heads,
            "state": stream.sink_state if ema else "published",
            **heads,
        }
        ours += sum(traffic.ema_evict(counts=counts, temporal_pairs=rope.temporal_pairs, **evict).values())
        floor += floors.ema_evict(sink_frames=stream.sink_frames, sources=sum(counts), **evict)["bytes"]
    layers = config.num_layers
    result = {
        "published": layers * published_bytes(config, stream, grid, batch, dtype, forwards),
        "ours": layers * ours,
        "floor": layers * floor,
    }
    result["published / ours"] = result["published"] / result["ours"]
    result["ours / floor"] = result["ours"] / result["floor"]
    return result
