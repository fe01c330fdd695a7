"""``sink_window_attention``: softmax attention over one or two intervals of keys, with online softmax; and
its gradients.

A launch serves the queries of one chunk, which all see the same keys: [0, sink_end) and [window_begin,
window_end). The dense prefix is one chunk with one interval, whose end a row may have of its own; a whole
sequence is a launch a chunk. Every sum has one order: a query tile walks its keys, a key tile (in the
backward) the queries that see it, and chunks that see a key add to its gradient launch after launch. No
atomics.

    p = exp(scale q k - lse),   dv = p^T do,   ds = p (do v - delta),   dq = scale ds k,   dk = scale ds^T q,
    delta = sum(out do)

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import INTERPRET, config_of, lanes, launch, next_power, round_to, target, widen


class Config(NamedTuple):
    """Tile sizes of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


def config(head_dim: int, dtype: torch.dtype, backward: bool) -> Config:
    """Fixed by what a tile takes of registers and shared memory, not by trial: the same bits on every
    machine.

    Half precision, D <= 128: 128 x 64 tiles are 64 accumulators for each thread of 8 warps, and two stages of
    keys and values take 64 KiB, which the 99 KiB of sm_120 and the 64 KiB of gfx942 hold. The backward has
    two accumulators and four operands: half of it. Wider heads take a quarter; float32 needs three operands
    where half precision has one, and takes less again. Spills have
    bounds in tests/ops/test_triton_compiled.py."""
    wide = head_dim > 128
    if dtype == torch.float32:
        if backward:
            return Config(16, 16, 8, 1) if wide else Config(32, 16, 8, 1)
        return Config(16, 16, 4, 1) if wide else Config(32, 32, 8, 1)
    if backward:
        return Config(32, 32, 8, 1) if wide else Config(64, 64, 8, 1)
    return Config(64, 32, 8, 1) if wide else Config(128, 64, 8, 2)


class View(NamedTuple):
    """A tensor ``[B, tokens, heads, D]`` as kernels take it: the memory, and the strides."""

    base: torch.Tensor
    b: int
    t: int
    h: int


class Chunk(NamedTuple):
    """Queries [begin, end) that see the keys [0, sink_end) and [window_begin, window_end)."""

    begin: int
    end: int
    sink_end: int
    window_begin: int
    window_end: int


def chunks_of(queries, kv_tokens, tokens, chunk_ends, num_sink_tokens, num_window_tokens) -> list[Chunk]:
    if chunk_ends is None:
        return [Chunk(0, queries, tokens if kv_tokens is None else kv_tokens, 0, 0)]
    chunks, begin = [], 0
    for end in chunk_ends:
        sink_end = min(num_sink_tokens, end)
        window = end if num_window_tokens is None else num_window_tokens
        chunks.append(Chunk(begin, end, sink_end, max(sink_end, end - window), end))
        begin = end
    return chunks


def _precision() -> str:
    """How float32 is multiplied. The matrix units of NVIDIA's GPUs round it to 11 bits; three such products
    have 22. Where they have no such mode, and on AMD, the product is float32's own."""
    return "tf32x3" if target() and target().backend == "cuda" and target().arch >= 80 else "ieee"


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        return tl.dot(widen(a), widen(b), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _rows(base, at, stride, end, DIM: tl.constexpr, DIMS: tl.constexpr):
    """Rows ``at`` of a [rows, DIM] matrix; zero from row ``end`` on, which is not read."""
    dim = tl.arange(0, DIMS)
    mask = (at < end)[:, None] & (dim < DIM)[None, :]
    return tl.load(base + at.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, at, stride, end, value, DIM: tl.constexpr, DIMS: tl.constexpr):
    dim = tl.arange(0, DIMS)
    mask = (at < end)[:, None] & (dim < DIM)[None, :]
    tl.store(
        base + at.to(tl.int64)[:, None] * stride + dim[None, :],
        round_to(value, base.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _head(x, b, h):
    """Where the matrix of a head begins."""
    return x.base + b * x.b + h * x.h


@triton.jit
def _attend(
    q,
    acc,
    total,
    largest,
    k,
    k_t,
    v,
    v_t,
    bias,
    begin,
    end,
    scale,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Adds the keys [begin, end) to the softmax of a query tile."""
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        logits = (
            _dot(
                q,
                tl.trans(_rows(k, at, k_t, end, DIM, DIMS)),
                tl.zeros((q.shape[0], KEYS), tl.float32),
                PRECISION,
            )
            * scale
        )
        if BIAS:
            logits += tl.load(bias + at, mask=at < end, other=0.0)[None, :]
        logits = tl.where((at < end)[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(logits - safe[:, None])
        decay = tl.exp(largest - safe)
        total = total * decay + tl.sum(p, 1)
        acc = _dot(
            round_to(p, v.dtype.element_ty),
            _rows(v, at, v_t, end, DIM, DIMS),
            acc * decay[:, None],
            PRECISION,
        )
        largest = new
    return acc, total, largest


@triton.jit
def _row_end(row, end):
    """The number of keys that a row of its own sees, between 0 and the capacity."""
    return tl.minimum(tl.maximum(tl.load(row), 0), end)


@triton.jit
def _forward(
    q,
    k,
    v,
    out,
    lse,
    rows,
    bias,
    bias_b,
    queries,
    chunk,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    end, sink_end = chunk.end, chunk.sink_end
    row = chunk.begin + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    if ROWS:
        sink_end = _row_end(rows + b, sink_end)
    if BIAS:
        bias += b * bias_b
    k_at, v_at = _head(k, b, h // GROUP), _head(v, b, h // GROUP)
    tile = _rows(_head(q, b, h), row, q.t, end, DIM, DIMS)
    acc = tl.zeros((QUERIES, DIMS), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    for window in tl.static_range(2):
        acc, total, largest = _attend(
            tile,
            acc,
            total,
            largest,
            k_at,
            k.t,
            v_at,
            v.t,
            bias,
            chunk.window_begin if window else 0,
            chunk.window_end if window else sink_end,
            scale,
            DIM,
            DIMS,
            KEYS,
            PRECISION,
            BIAS,
        )
    none = total == 0.0  # no key at all: out is 0, lse is -inf
    total = tl.where(none, 1.0, total)
    acc = acc / total[:, None]
    _store_rows(_head(out, b, h), row, out.t, end, acc, DIM, DIMS)
    value = tl.where(none, float("-inf"), largest + tl.log(total))
    tl.store(lse + (b * HEADS + h) * queries + row, value, mask=row < end)


@triton.jit
def _load_lse(lse, at, mask):
    """Infinite for a query without any weight (not -infinite: its p is 0) and for what is no query."""
    value = tl.load(lse + at, mask=mask, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def _grad_q_of(
    q,
    do,
    row_lse,
    delta,
    grad,
    k,
    k_t,
    v,
    v_t,
    bias,
    begin,
    end,
    scale,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
):
    for first in range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        keys = _rows(k, at, k_t, end, DIM, DIMS)
        values = _rows(v, at, v_t, end, DIM, DIMS)
        zero = tl.zeros((q.shape[0], KEYS), tl.float32)
        logits = _dot(q, tl.trans(keys), zero, PRECISION) * scale
        if BIAS:
            logits += tl.load(bias + at, mask=at < end, other=0.0)[None, :]
        p = tl.exp(logits - row_lse[:, None])
        ds = tl.where(
            (at < end)[None, :], p * (_dot(do, tl.trans(values), zero, PRECISION) - delta[:, None]), 0.0
        )
        grad = _dot(round_to(ds, k.dtype.element_ty), keys, grad, PRECISION)
    return grad


@triton.jit
def _backward_q(
    q,
    k,
    v,
    out,
    do,
    grad,
    lse,
    deltas,
    rows,
    bias,
    bias_b,
    queries,
    chunk,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    end, sink_end = chunk.end, chunk.sink_end
    row = chunk.begin + tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    b, h = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    if ROWS:
        sink_end = _row_end(rows + b, sink_end)
    if BIAS:
        bias += b * bias_b
    k_at, v_at = _head(k, b, h // GROUP), _head(v, b, h // GROUP)
    tile = _rows(_head(q, b, h), row, q.t, end, DIM, DIMS)
    do_tile = _rows(_head(do, b, h), row, do.t, end, DIM, DIMS)
    out_tile = _rows(_head(out, b, h), row, out.t, end, DIM, DIMS)
    delta = tl.sum(widen(out_tile) * widen(do_tile), 1)
    at = (b * HEADS + h) * queries + row
    tl.store(deltas + at, delta, mask=row < end)
    row_lse = _load_lse(lse, at, row < end)
    sums = tl.zeros((QUERIES, DIMS), tl.float32)
    for window in tl.static_range(2):
        sums = _grad_q_of(
            tile,
            do_tile,
            row_lse,
            delta,
            sums,
            k_at,
            k.t,
            v_at,
            v.t,
            bias,
            chunk.window_begin if window else 0,
            chunk.window_end if window else sink_end,
            scale,
            DIM,
            DIMS,
            KEYS,
            PRECISION,
            BIAS,
        )
    _store_rows(_head(grad, b, h), row, grad.t, end, sums * scale, DIM, DIMS)


@triton.jit
def _backward_kv(
    q,
    k,
    v,
    do,
    grad_k,
    grad_v,
    lse,
    deltas,
    rows,
    bias,
    bias_b,
    queries,
    chunk,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """A tile of keys: of the sink, or, behind its tiles, of the window. ADD: chunks before this one have left
    their part."""
    tile, kv_heads = tl.program_id(0), HEADS // GROUP
    b, kv = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    sink_end, window_begin, end = chunk.sink_end, chunk.window_begin, chunk.end
    if ROWS:  # tiles behind the end are of an empty window: nothing is read or written
        sink_end = _row_end(rows + b, sink_end)
    sink_tiles = tl.cdiv(sink_end, KEYS)
    in_window = tile >= sink_tiles
    at = tl.where(in_window, window_begin + (tile - sink_tiles) * KEYS, tile * KEYS) + tl.arange(0, KEYS)
    last = tl.where(in_window, chunk.window_end, sink_end)
    keys = _rows(_head(k, b, kv), at, k.t, last, DIM, DIMS)
    values = _rows(_head(v, b, kv), at, v.t, last, DIM, DIMS)
    gk, gv = _head(grad_k, b, kv), _head(grad_v, b, kv)
    sum_k, sum_v = tl.zeros((KEYS, DIMS), tl.float32), tl.zeros((KEYS, DIMS), tl.float32)
    for h in range(kv * GROUP, kv * GROUP + GROUP):
        for first in range(chunk.begin, end, QUERIES):
            row = first + tl.arange(0, QUERIES)
            mask = row < end
            queries_tile = _rows(_head(q, b, h), row, q.t, end, DIM, DIMS)
            do_tile = _rows(_head(do, b, h), row, do.t, end, DIM, DIMS)
            row_lse = _load_lse(lse, (b * HEADS + h) * queries + row, mask)
            delta = tl.load(deltas + (b * HEADS + h) * queries + row, mask=mask, other=0.0)
            zero = tl.zeros((KEYS, QUERIES), tl.float32)
            # Transposed, [keys, queries]. An infinite key times the zeros beyond the chunk is NaN.
            logits = _dot(keys, tl.trans(queries_tile), zero, PRECISION) * scale
            if BIAS:
                logits += tl.load(bias + b * bias_b + at, mask=at < last, other=0.0)[:, None]
            p = tl.exp(logits - row_lse[None, :])
            p = tl.where((row_lse < float("inf"))[None, :], p, 0.0)
            sum_v = _dot(round_to(p, do.base.dtype.element_ty), do_tile, sum_v, PRECISION)
            ds = p * (_dot(values, tl.trans(do_tile), zero, PRECISION) - delta[None, :])
            sum_k = _dot(round_to(ds, q.base.dtype.element_ty), queries_tile, sum_k, PRECISION)
    sum_k = sum_k * scale
    if ADD:
        sum_k += _rows(gk, at, grad_k.t, last, DIM, DIMS)
        sum_v += _rows(gv, at, grad_v.t, last, DIM, DIMS)
    _store_rows(gk, at, grad_k.t, last, sum_k, DIM, DIMS)
    _store_rows(gv, at, grad_v.t, last, sum_v, DIM, DIMS)


def kernel_name(head_dim: int, dtype: torch.dtype, backward: bool) -> str:
    return f"sink_window_attention{'_backward' if backward else ''} {dtype} {head_dim}"


def _view(t):
    return View(t, *t.stride()[:3])


def _constants(q, k, backward, rows=None, bias=None):
    tile = config_of(kernel_name(q.shape[3], q.dtype, backward), config(q.shape[3], q.dtype, backward))
    constants = {
        "HEADS": q.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "DIM": q.shape[3],
        "DIMS": max(16, next_power(q.shape[3])),
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "PRECISION": _precision(),
        "ROWS": rows is not None,
        "BIAS": bias is not None,
        "num_warps": tile.warps * 32 // lanes(),
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # no rounding in here is promised
    }
    return tile, constants


def sink_window_attention(
    q, k, v, kv_tokens, softmax_scale, chunk_ends, num_sink_tokens, num_window_tokens, rows, bias, out, lse
):
    batch, queries, heads, _ = q.shape
    if out.numel() == 0:
        return
    tile, constants = _constants(q, k, False, rows, bias)
    for chunk in chunks_of(queries, kv_tokens, k.shape[1], chunk_ends, num_sink_tokens, num_window_tokens):
        grid = (triton.cdiv(chunk.end - chunk.begin, tile.queries), batch * heads)
        launch(
            _forward,
            grid,
            q,
            _view(q),
            _view(k),
            _view(v),
            _view(out),
            lse,
            rows,
            bias,
            0 if bias is None else bias.stride(0),
            queries,
            chunk,
            softmax_scale,
            **constants,
        )


def sink_window_attention_backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    kv_tokens,
    softmax_scale,
    chunk_ends,
    num_sink_tokens,
    num_window_tokens,
    rows,
    bias,
    grad_q,
    grad_k,
    grad_v,
):
    """The gradients come zeroed: a key that nobody sees, and a query that sees none, have none."""
    batch, queries, heads, _ = q.shape
    if q.numel() == 0 or k.numel() == 0:
        return
    chunks = chunks_of(queries, kv_tokens, k.shape[1], chunk_ends, num_sink_tokens, num_window_tokens)
    # A single chunk writes what it has. Parts of several are summed in float32.
    several = len(chunks) > 1
    sum_k, sum_v = grad_k, grad_v
    if several and k.dtype != torch.float32:
        sum_k, sum_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    tile, constants = _constants(q, k, True, rows, bias)
    inputs = (_view(q), _view(k), _view(v))
    for chunk in chunks:
        key_tiles = triton.cdiv(chunk.sink_end, tile.keys) + triton.cdiv(
            chunk.window_end - chunk.window_begin, tile.keys
        )
        if key_tiles == 0:
            continue
        bias_stride = 0 if bias is None else bias.stride(0)
        span = (lse, delta, rows, bias, bias_stride, queries, chunk, softmax_scale)
        grid = (triton.cdiv(chunk.end - chunk.begin, tile.queries), batch * heads)
        launch(_backward_q, grid, q, *inputs, _view(out), _view(grad_out), _view(grad_q), *span, **constants)
        grid = (key_tiles, batch * k.shape[2])
        launch(
            _backward_kv,
            grid,
            q,
            *inputs,
            _view(grad_out),
            _view(sum_k),
            _view(sum_v),
            *span,
            **constants,
            ADD=several,
        )
    if sum_k is not grad_k:
        grad_k.copy_(sum_k)
        grad_v.copy_(sum_v)
