"""``rope_append`` and ``rope``: one program a token and tensor reads the token, and writes it normalised and
rotated.

    x^ = x / sqrt(mean(x^2) + eps) * weight,     (x, y) -> (x cos - y sin, x sin + y cos)

Arithmetic is float32, rounded once, at the write. A rotation takes three roundings a value, as on every
backend (no fused multiply-add). The angles of a token are read once for all of its heads."""

import triton
import triton.language as tl

from .common import (
    Tile,
    config_of,
    head_tile,
    launch,
    load_pairs,
    pair_mask,
    round_to,
    store_pairs,
    warps,
    widen,
)

# A thread has two accesses of 16 bytes in half precision, so that x, its weights and its angles fit in 64
# registers. Wider tokens are taken tile by tile.
TILE = Tile(4096, each=16)


@triton.constexpr_function
def _before(axes, axis):
    """Pairs of the axes in front of ``axis``."""
    return sum(axes[:axis])


@triton.jit
def _angles(table, at, token, lengths, offsets, pair, AXES: tl.constexpr):
    """cos and sin of pairs ``pair`` of a token, whose coordinates are its digits to the bases ``lengths``."""
    row = pair.to(tl.int64)
    rest = token
    for axis in tl.static_range(len(AXES) - 1, -1, -1):
        coordinate = rest
        if axis > 0:
            coordinate = rest % lengths[axis]
            rest = rest // lengths[axis]
        mine = (pair >= _before(AXES, axis)) & (pair < _before(AXES, axis + 1))
        here = offsets[axis] + tl.cast(coordinate, tl.int64) * AXES[axis] + (pair - _before(AXES, axis))
        row = tl.where(mine, here, row)
    inside = pair < _before(AXES, len(AXES))
    cos = tl.load(table + at + 2 * row, mask=inside, other=1.0)
    sin = tl.load(table + at + 2 * row + 1, mask=inside, other=0.0)
    return cos, sin


@triton.jit
def _scale(squares, COUNT: tl.constexpr, eps):
    # Both correctly rounded: the approximate ones differ from machine to machine.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, 1.0 * COUNT) + eps))


@triton.jit
def _pairs(
    source,
    source_at,
    target,
    target_at,
    weight,
    weight_at,
    scale,
    table,
    table_at,
    token,
    lengths,
    offsets,
    inside,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BEGIN: tl.constexpr,
    COUNT: tl.constexpr,
    JOINED: tl.constexpr,
    AXES: tl.constexpr,
):
    """Pairs BEGIN .. BEGIN + COUNT of some heads."""
    PAIRS: tl.constexpr = triton.next_power_of_2(COUNT)
    pair = tl.arange(0, PAIRS)
    pair = tl.where(pair < COUNT, pair + BEGIN, _before(AXES, len(AXES)))  # those beyond have no angle
    cos, sin = _angles(table, table_at, token, lengths, offsets, pair, AXES)
    mask = pair_mask(inside, 2 * COUNT if JOINED else COUNT, PAIRS, JOINED)
    x, y = load_pairs(source, source_at, FIRST, SECOND, mask, PAIRS, JOINED)
    if weight is not None:
        wx, wy = load_pairs(weight, weight_at, FIRST, SECOND, mask, PAIRS, JOINED)
        x = x * scale[:, None] * wx
        y = y * scale[:, None] * wy
    cos, sin = cos[None, :], sin[None, :]
    turned_x, turned_y = x * cos - y * sin, x * sin + y * cos
    store_pairs(target, target_at, FIRST, SECOND, mask, PAIRS, JOINED, turned_x, turned_y)


@triton.jit
def _load(row, at, dim, mask):
    return widen(tl.load(row + at[:, None] + dim, mask=mask, other=0.0))


@triton.jit
def _token(
    source,
    source_head,
    target,
    target_head,
    weight,
    table,
    table_at,
    token,
    lengths,
    offsets,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    AXES: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """All heads of one token, TILE heads at a time. LAYOUT and NORM are the codes of the registered op."""
    TOTAL: tl.constexpr = _before(AXES, len(AXES))
    dim = tl.arange(0, DIMS)[None, :]
    scale = tl.full((TILE,), 1.0, tl.float32)
    if weight is not None and NORM == 1:  # one mean over all heads
        squares = tl.zeros((TILE, DIMS), tl.float32)
        for first in range(0, HEADS, TILE):
            head = first + tl.arange(0, TILE)
            x = _load(source, head * source_head, dim, (head < HEADS)[:, None] & (dim < DIM))
            squares += x * x
        scale = scale * _scale(tl.sum(squares), HEADS * DIM, eps)

    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)
        inside = head < HEADS
        source_at, target_at = head * source_head, head * target_head
        weight_at = head * DIM if NORM == 1 else head * 0
        if weight is not None and NORM == 2:  # a mean for each head
            x = _load(source, source_at, dim, inside[:, None] & (dim < DIM))
            scale = _scale(tl.sum(x * x, 1), DIM, eps)

        if LAYOUT == 2:
            for axis in tl.static_range(len(AXES)):
                if AXES[axis] > 0:
                    _pairs(
                        source,
                        source_at,
                        target,
                        target_at,
                        weight,
                        weight_at,
                        scale,
                        table,
                        table_at,
                        token,
                        lengths,
                        offsets,
                        inside,
                        2 * _before(AXES, axis),
                        2 * _before(AXES, axis) + AXES[axis],
                        _before(AXES, axis),
                        AXES[axis],
                        False,
                        AXES,
                    )
        elif TOTAL > 0:
            _pairs(
                source,
                source_at,
                target,
                target_at,
                weight,
                weight_at,
                scale,
                table,
                table_at,
                token,
                lengths,
                offsets,
                inside,
                0,
                TOTAL,
                0,
                TOTAL,
                LAYOUT == 0,
                AXES,
            )

        if DIM > 2 * TOTAL:  # dims that do not turn
            rest = 2 * TOTAL + tl.arange(0, triton.next_power_of_2(DIM - 2 * TOTAL))[None, :]
            mask = inside[:, None] & (rest < DIM)
            value = tl.load(source + source_at[:, None] + rest, mask=mask)
            if weight is not None:
                w = _load(weight, weight_at, rest, mask)
                value = round_to(widen(value) * scale[:, None] * w, target.dtype.element_ty)
            tl.store(target + target_at[:, None] + rest, value, mask=mask)


@triton.jit
def _rope(
    x,
    x_b,
    x_t,
    x_h,
    out,
    out_b,
    out_t,
    out_h,
    weight,
    table,
    table_b,
    lengths,
    offsets,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    AXES: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
):
    token, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token64 = token.to(tl.int64)
    _token(
        x + b * x_b + token64 * x_t,
        x_h,
        out + b * out_b + token64 * out_t,
        out_h,
        weight,
        table,
        b * table_b,
        token,
        lengths,
        offsets,
        eps,
        HEADS,
        DIM,
        AXES,
        LAYOUT,
        NORM,
        TILE,
        DIMS,
    )


@triton.jit
def _append(
    k,
    k_b,
    k_t,
    k_h,
    k_cache,
    kc_b,
    kc_t,
    kc_h,
    v,
    v_b,
    v_t,
    v_h,
    v_cache,
    vc_b,
    vc_t,
    vc_h,
    slots,
    slots_b,
    slots_f,
    frame_tokens,
    capacity,
    weight,
    table,
    table_b,
    lengths,
    offsets,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    AXES: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
):
    token, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token64 = token.to(tl.int64)
    slot = tl.load(slots + b * slots_b + token // frame_tokens * slots_f).to(tl.int64)
    if (slot >= 0) & (slot < capacity):  # a frame without a place in the cache is not written
        place = slot * frame_tokens + token % frame_tokens
        if tl.program_id(2) == 0:
            _token(
                k + b * k_b + token64 * k_t,
                k_h,
                k_cache + b * kc_b + place * kc_t,
                kc_h,
                weight,
                table,
                b * table_b,
                token,
                lengths,
                offsets,
                eps,
                HEADS,
                DIM,
                AXES,
                LAYOUT,
                NORM,
                TILE,
                DIMS,
            )
        elif v is not None:
            _token(
                v + b * v_b + token64 * v_t,
                v_h,
                v_cache + b * vc_b + place * vc_t,
                vc_h,
                None,
                None,
                0,
                token,
                lengths,
                offsets,
                eps,
                HEADS,
                DIM,
                (),
                0,
                0,
                TILE,
                DIMS,
            )


def _rotation(x, angles, axes, layout):
    """(table, its batch stride, lengths, offsets) and the constants."""
    if angles is None:
        return (None, 0, (), ()), {"AXES": (), "LAYOUT": 0}
    batch_stride = angles.stride(0) if angles.shape[0] > 1 else 0
    tables = (angles, batch_stride, tuple(axes[0::3]), tuple(axes[2::3]))
    return tables, {"AXES": tuple(axes[1::3]), "LAYOUT": layout}


def kernel_name(heads: int, head_dim: int, dtype) -> str:
    return f"rope_append {dtype} {heads} x {head_dim}"


def _shape(x, norm):
    heads, head_dim = x.shape[2:]
    config = config_of(kernel_name(heads, head_dim, x.dtype), TILE)
    tile, dims = head_tile(heads, head_dim, config.elements)
    return {
        "HEADS": heads,
        "DIM": head_dim,
        "NORM": norm,
        "TILE": tile,
        "DIMS": dims,
        "num_warps": warps(tile * dims, config.each),
    }


def _strides(x):
    return (None, 0, 0, 0) if x is None else (x, *x.stride()[:3])


def rope(x, angles, axes, layout, weight, norm, eps, out):
    if x.numel() == 0:
        return
    tables, rotation = _rotation(x, angles, axes, layout)
    constants = _shape(x, norm) | rotation
    launch(
        _rope, (x.shape[1], x.shape[0]), x, *_strides(x), *_strides(out), weight, *tables, eps, **constants
    )


def rope_append(q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight, norm, eps, q_out):
    if k.numel() > 0:
        tables, rotation = _rotation(k, angles, axes, layout)
        frames = slots.shape[-1]
        frame_tokens = k.shape[1] // frames
        slot_strides = (slots.stride(0) if slots.ndim == 2 else 0, slots.stride(-1))
        launch(
            _append,
            (k.shape[1], k.shape[0], 1 if v is None else 2),
            k,
            *_strides(k),
            *_strides(k_cache),
            *_strides(v),
            *_strides(v_cache),
            slots,
            *slot_strides,
            frame_tokens,
            k_cache.shape[1] // frame_tokens,
            k_weight,
            *tables,
            eps,
            **_shape(k, norm),
            **rotation,
        )
    rope(q, angles, axes, layout, q_weight, norm, eps, q_out)
