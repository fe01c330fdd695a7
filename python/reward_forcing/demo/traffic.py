"""Bytes that the cache path moves for one chunk: norm, RoPE, writing, rolling, the sink's average, concatenation. Projections and the
attention itself are left out. All three figures are counts, not measurements.

- published: the published path runs under a dispatch mode that adds up the bytes of every operand and result of every PyTorch kernel it
  calls (views are free); its attention is replaced by a function that touches nothing.
- ours: what the ops say they move (``rope_append.cost``, ``ema_evict.cost``), and the norm weights and the chunk's plan (cosines and
  sines, slots, schedule), which every call reads.
- floor: what no implementation with this state can avoid. Every forward reads q, k, v and writes them once; a first forward also
  reads the K and V that leave, reads and writes the sink's state, and writes the sink's slots.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rf_kernels as rf
from rf_kernels.reference import published


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
            results and all(t.untyped_storage().data_ptr() in storages for t in results) and not func._schema.is_mutable
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
    q, k, v = (torch.zeros(batch, chunk * n, config.num_heads, config.head_dim, dtype=dtype) for _ in range(3))
    tokens = chunk * n

    def forward(start):
        q_n, k_n = (norm(x.flatten(2)).view_as(x) for norm, x in zip(norms, (q, k), strict=True))
        end = cache.append(k_n, v, start, num_sink_tokens, stream.alpha)
        window = published.read_window(end, tokens, n, num_sink_tokens, capacity)
        published.cached_attention(q_n, cache, window, (chunk, *grid), num_sink_tokens, table, lambda q, k, v: q)

    with torch.no_grad():
        steady = -(-stream.local_attn_size // chunk) + 1
        for index in range(steady):
            forward(index * tokens)
        with ByteCounter() as counter:
            for _ in range(forwards):
                forward(steady * tokens)
    return counter.bytes


def _evict_floor(config, stream, frame_tokens: int, dtype: torch.dtype) -> int:
    item, elements = dtype.itemsize, frame_tokens * config.dim
    if stream.sink_policy != "ema":
        return stream.sink_frames * elements * 2 * item  # the key state read, the key slot written
    half = dtype in (torch.bfloat16, torch.float16)
    state, value_slot = item, 0  # "published": the value slot is the state
    if half and stream.sink_state == "compensated":
        state = 2 * item  # hi and lo; the value slot is hi
    elif half and stream.sink_state == "float32":
        state, value_slot = 4, item
    per_sink_frame = (
        2 * 2 * state + item + value_slot
    )  # state of K and V read and written; slots that are not state written
    return elements * (stream.chunk_frames * 2 * item + stream.sink_frames * per_sink_frame)


def count(config, stream, grid, batch: int, dtype: torch.dtype, forwards: int, plan_bytes: int) -> dict:
    """Bytes per chunk over all layers: published, ours, floor, and the ratios."""
    n = grid[0] * grid[1]
    tokens = batch * stream.chunk_frames * n * config.dim
    row = dtype.itemsize * tokens
    append = rf.rope_append.cost(
        batch=batch, tokens=stream.chunk_frames * n, q_heads=config.num_heads, head_dim=config.head_dim, dtype=dtype
    )["bytes"]
    weights = 2 * config.dim * dtype.itemsize
    sinks = stream.sink_frames > 0 and stream.sink_policy != "none"
    evict = evict_floor = 0
    if sinks:
        evict = rf.ema_evict.cost(
            batch=batch, sink_frames=stream.sink_frames, frame_tokens=n, heads=config.num_heads, head_dim=config.head_dim,
            dtype=dtype, sources=stream.chunk_frames if stream.sink_policy == "ema" else 0, state=stream.sink_state,
        )["bytes"]  # fmt: skip
        evict_floor = _evict_floor(config, stream, batch * n, dtype)
    layers = config.num_layers
    result = {
        "published": layers * published_bytes(config, stream, grid, batch, dtype, forwards),
        "ours": layers * (forwards * (append + weights + plan_bytes) + evict + plan_bytes),
        "floor": layers * (forwards * 6 * row + evict_floor),
    }
    result["published / ours"] = result["published"] / result["ours"]
    result["ours / floor"] = result["ours"] / result["floor"]
    return result
