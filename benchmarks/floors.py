"""FLOPs and the least bytes of a call of each op: every input read once, every result written once.
``traffic.py`` counts what the CUDA kernels move beside that."""

import math
from collections.abc import Sequence

import torch

from rf_kernels.positions import table_dtype


def _elements(
    batch: int, tokens: int, heads: int, head_dim: int, pairs: Sequence[int], norm: bool
) -> tuple[int, int]:
    """Elements of one tensor, and the FLOPs of its norm (square, add, two products) and rotation (6 a
    pair)."""
    rows = batch * tokens * heads
    return rows * head_dim, rows * (4 * head_dim * norm + 6 * sum(pairs))


def rope_append(
    *,
    batch: int,
    tokens: int,
    q_heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype,
    pairs: Sequence[int] = (),
    norm: bool = True,
) -> dict[str, int]:
    """q, k, v read once; q_out, the key and the value slots written once."""
    kv_heads = q_heads if kv_heads is None else kv_heads
    q, q_flops = _elements(batch, tokens, q_heads, head_dim, pairs, norm)
    k, k_flops = _elements(batch, tokens, kv_heads, head_dim, pairs, norm)
    return {"flops": q_flops + k_flops, "bytes": dtype.itemsize * (2 * q + 4 * k)}


def ema_evict(
    *,
    batch: int,
    sink_frames: int,
    frame_tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    sources: int | None = None,
    temporal_pairs: int = 0,
    state: str = "compensated",
) -> dict[str, int]:
    """FLOPs and the least bytes of a call that fuses ``sources`` frames (all sink frames together; default
    one each) per sample.

    Bytes: source K and V read once; K and V state read and written where a source is fused; the sink's key
    slots written. With fewer sources than sink frames, the other frames read their key state and write their
    slot.
    """
    sources = sink_frames if sources is None else sources
    fused = min(sources, sink_frames)
    frame = batch * frame_tokens * heads * head_dim
    item = dtype.itemsize
    if dtype.itemsize != 2 or state == "published":
        k_state, v_read, v_written = item, item, item
    elif state == "compensated":
        k_state, v_read, v_written = 2 * item, 2 * item, 2 * item
    else:
        # the value slot is written from the float32 state, and not read
        k_state, v_read, v_written = 4, 4, 4 + item
    moved = sources * 2 * item + sink_frames * (k_state + item) + fused * (k_state + v_read + v_written)
    turned = batch * frame_tokens * heads * temporal_pairs * 6  # four products, two sums a pair
    flops = sources * 2 * frame * 3 + (sources + sink_frames) * turned
    return {"flops": flops, "bytes": moved * frame}


def dmd_gradient(
    shape,
    dtype: torch.dtype = torch.float32,
    prediction_dtype: torch.dtype | None = None,
    *,
    fake_uncond: bool = False,
    real_uncond: bool = True,
    flow: bool = False,
    normalize: bool = True,
    weight_elements: int = 0,
    mask_elements: int = 0,
) -> dict:
    """FLOPs and the floor in bytes: every input read once, the gradient written once."""
    elements = math.prod(shape)
    predictions = 2 + fake_uncond + real_uncond + (flow and normalize)
    size, prediction_size = dtype.itemsize, (prediction_dtype or dtype).itemsize
    bytes_ = elements * (size * (1 + normalize) + prediction_size * predictions)
    bytes_ += weight_elements * table_dtype(dtype).itemsize + mask_elements
    # guided: 3 each; difference, division, coefficient and product, two terms and their sums: 8; distance and
    # its sum: 2; flow: 3
    flops = elements * (3 * (fake_uncond + real_uncond) + 8 + 2 * normalize + 3 * flow)
    return {"flops": flops, "bytes": bytes_}


def sink_window_attention(
    batch: int,
    queries: int,
    heads: int,
    head_dim: int,
    *,
    kv_tokens: int | None = None,
    kv_heads: int | None = None,
    chunk_ends: list[int] | tuple[int, ...] | None = None,
    num_sink_tokens: int = 0,
    num_window_tokens: int | None = None,
    element_size: int = 2,
    backward: bool = False,
) -> dict[str, int]:
    """FLOPs of the matrix products (2 per multiply-add) and bytes of q, k, v, out and LSE, each moved once.

    Forward: ``4 * D * H`` FLOPs per visible (query, key) pair. Backward: 2.5 times that (five products,
    recomputation included). Bytes of the backward: q, k, v, out, grad_out and LSE read, grad_q, grad_k,
    grad_v written.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if chunk_ends is None:
        assert kv_tokens is not None
        pairs, tokens = queries * kv_tokens, kv_tokens
    else:
        pairs, tokens, begin = 0, queries, 0
        for end in chunk_ends:
            window = end if num_window_tokens is None else num_window_tokens
            pairs += (end - begin) * (
                min(num_sink_tokens, end) + end - max(min(num_sink_tokens, end), end - window)
            )
            begin = end
    flops = 4 * batch * heads * head_dim * pairs
    q_bytes = batch * queries * heads * head_dim * element_size
    kv_bytes = 2 * batch * tokens * kv_heads * head_dim * element_size
    lse_bytes = batch * heads * queries * (8 if element_size == 8 else 4)
    if backward:
        return {"flops": flops * 5 // 2, "bytes": 4 * q_bytes + 2 * kv_bytes + lse_bytes}
    return {"flops": flops, "bytes": 2 * q_bytes + kv_bytes + lse_bytes}
