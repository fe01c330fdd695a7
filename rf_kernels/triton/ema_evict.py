"""``ema_evict``: one program a token of a sink frame reads its state once, fuses the tokens that leave, and
writes state and slot.

    state <- alpha * state + (1 - alpha) * R(turn) source,     slot <- R(shift) state

The state is a pair hi + lo of the cache's dtype, float32, or the cache's dtype alone with every product and
sum rounded to it."""

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

COMPENSATED, FLOAT32, PUBLISHED = (tl.constexpr(code) for code in range(3))

# A thread has one access of 16 bytes in half precision. A program waits for its sources one after the other
# (is the token finite?), so many threads with little each hide that better than few with much.
TILE = Tile(4096, each=8)
# Sources of one launch: a bit each says whether the token is fused. More go launch after launch; what the
# state holds in between is what it is rounded to anyway, so the cut changes no bit.
_GROUP = 32


@triton.jit
def _turn(table, shift, x, y, PAIRS: tl.constexpr, TURNED: tl.constexpr):
    """Pair i turned by row i - shift of the table; rows outside, and the angle zero, change no bit."""
    row = tl.arange(0, PAIRS) - shift
    inside = (row >= 0) & (row < TURNED)
    cos = tl.load(table + 2 * row, mask=inside, other=1.0)[None, :]
    sin = tl.load(table + 2 * row + 1, mask=inside, other=0.0)[None, :]
    still = (cos == 1.0) & (sin == 0.0)
    turned_x = tl.fma(x, cos + tl.zeros_like(x), -(y * sin))
    turned_y = tl.fma(x, sin + tl.zeros_like(x), y * cos)
    return tl.where(still, x, turned_x), tl.where(still, y, turned_y)


@triton.jit
def _join(hi, lo):
    return tl.where(lo == 0.0, hi, hi + lo)  # -0 + 0 would lose the sign of a zero


@triton.jit
def _low(value, dtype: tl.constexpr):
    """What is left of a float32 value besides its rounding; the difference is exact."""
    return value - widen(round_to(value, dtype))


@triton.jit
def _fuse(state, x, keep, tail, take, STATE: tl.constexpr, dtype: tl.constexpr):
    """One eviction. The result is what the state's storage holds."""
    if STATE == PUBLISHED:
        kept = widen(round_to(state * keep, dtype))
        taken = widen(round_to(x * take, dtype))
        return widen(round_to(kept + taken, dtype))
    # alpha is keep + tail; tail * state is added to the small term first: there it is not rounded away.
    zero = tl.zeros_like(state)
    new = tl.fma(state, keep + zero, tl.fma(state, tail + zero, x * take))
    if STATE == COMPENSATED:
        hi = widen(round_to(new, dtype))
        new = _join(hi, widen(round_to(new - hi, dtype)))
    return new


@triton.jit
def _stream(
    frame0,
    frame_stride,
    head_stride,
    state,
    state_lo,
    state_row,
    table,
    sources,
    weights,
    group,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIMS: tl.constexpr,
    PAIRS: tl.constexpr,
    JOINED: tl.constexpr,
    TURNED: tl.constexpr,
    SHIFT: tl.constexpr,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    RUN: tl.constexpr,
    KEYS: tl.constexpr,
    STATE: tl.constexpr,
):
    """Some dims of the keys or values of a token: DIMS from FIRST on (JOINED; without RUN dims at OUT0 and at
    OUT1), or DIMS pairs at FIRST and SECOND. The first TURNED rows of ``table`` turn pairs from SHIFT on."""
    keep, tail, take = weights
    frame, first, size, fused, init, last, all_sources = group
    dtype: tl.constexpr = frame0.dtype.element_ty
    separate: tl.constexpr = (
        KEYS and state is not None
    )  # else the slot is the state: untouched where nothing comes in
    changed = (init != 0) | (fused != 0)
    if changed | separate:
        for head_first in range(0, HEADS, TILE):
            head = head_first + tl.arange(0, TILE)
            at, state_at = head * head_stride, head * DIM
            mask = pair_mask(head < HEADS, DIMS, PAIRS, JOINED)
            if RUN > 0:
                dim = FIRST + tl.arange(0, 2 * PAIRS)[None, :]
                mask &= ((dim < OUT0) | (dim >= OUT0 + RUN)) & ((dim < OUT1) | (dim >= OUT1 + RUN))
            slot = frame0 + frame * frame_stride

            if init != 0:
                x, y = load_pairs(slot, at, FIRST, SECOND, mask, PAIRS, JOINED)
            else:
                if separate or STATE == FLOAT32:
                    x, y = load_pairs(state + state_row, state_at, FIRST, SECOND, mask, PAIRS, JOINED)
                else:
                    x, y = load_pairs(slot, at, FIRST, SECOND, mask, PAIRS, JOINED)
                if STATE == COMPENSATED:
                    low_x, low_y = load_pairs(
                        state_lo + state_row, state_at, FIRST, SECOND, mask, PAIRS, JOINED
                    )
                    x, y = _join(x, low_x), _join(y, low_y)

            for i in range(size):
                if (fused >> i) & 1:
                    source = frame0 + tl.load(sources + i).to(tl.int64) * frame_stride
                    new_x, new_y = load_pairs(source, at, FIRST, SECOND, mask, PAIRS, JOINED)
                    if TURNED > 0:
                        turn = table + (first + i) * (2 * TURNED)
                        new_x, new_y = _turn(turn, SHIFT, new_x, new_y, PAIRS, TURNED)
                    x = _fuse(x, new_x, keep, tail, take, STATE, dtype)
                    y = _fuse(y, new_y, keep, tail, take, STATE, dtype)

            if changed:
                if separate or STATE == FLOAT32:
                    store_pairs(state + state_row, state_at, FIRST, SECOND, mask, PAIRS, JOINED, x, y)
                if STATE == COMPENSATED:
                    low_x, low_y = _low(x, dtype), _low(y, dtype)
                    store_pairs(
                        state_lo + state_row, state_at, FIRST, SECOND, mask, PAIRS, JOINED, low_x, low_y
                    )
            if separate:
                if last:
                    if TURNED > 0:
                        x, y = _turn(table + all_sources * (2 * TURNED), SHIFT, x, y, PAIRS, TURNED)
                    store_pairs(slot, at, FIRST, SECOND, mask, PAIRS, JOINED, x, y)
            elif fused != 0:
                store_pairs(slot, at, FIRST, SECOND, mask, PAIRS, JOINED, x, y)


@triton.jit
def _nonfinite(
    row, head_stride, HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr
):
    """Elements of a token that are infinite or NaN."""
    dim = tl.arange(0, DIMS)[None, :]
    found = tl.zeros((TILE, DIMS), tl.int32)
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[:, None]
        x = widen(tl.load(row + head * head_stride + dim, mask=(head < HEADS) & (dim < DIM), other=0.0))
        found += tl.where(tl.abs(x) < float("inf"), 0, 1)
    return tl.sum(found)


@triton.jit
def _evict(
    k_cache,
    k_b,
    k_t,
    k_h,
    v_cache,
    v_b,
    v_t,
    v_h,
    k_state,
    k_state_lo,
    v_state,
    schedule,
    schedule_b,
    turns,
    turns_b,
    alpha,
    alpha_f,
    alpha_t,
    skipped,
    frames,
    sources,
    first,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    X0: tl.constexpr,
    Y0: tl.constexpr,
    STEP: tl.constexpr,
    STATE: tl.constexpr,
    SKIP: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    t, frame, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    frame_tokens, sink_frames = tl.num_programs(0), tl.num_programs(1)
    entry = schedule + b * schedule_b + frame * (2 + sources)
    count = tl.minimum(tl.maximum(tl.load(entry + 1), 0), sources)
    k = k_cache + b * k_b + t.to(tl.int64) * k_t  # this token in frame slot 0
    k_frame = frame_tokens.to(tl.int64) * k_t
    if v_cache is not None:
        v = v_cache + b * v_b + t.to(tl.int64) * v_t
        v_frame = frame_tokens.to(tl.int64) * v_t

    if (first == 0) | (first < count):
        size = tl.minimum(count - first, GROUP)
        fused, left_out = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
        for i in range(size):
            # On a GPU nobody has looked at the schedule: a source outside the frames after the sink is left
            # out.
            source = tl.load(entry + 2 + first + i).to(tl.int64)
            if (source >= sink_frames) & (source < frames):
                bad = 0
                if SKIP:
                    bad = _nonfinite(k + source * k_frame, k_h, HEADS, DIM, TILE, DIMS)
                    if v_cache is not None:
                        bad += _nonfinite(v + source * v_frame, v_h, HEADS, DIM, TILE, DIMS)
                fused |= tl.where(bad == 0, 1, 0) << i
                left_out += tl.where(bad == 0, 0, 1)

        a = tl.load(alpha + frame * alpha_f + t * alpha_t)  # float64
        keep = a.to(tl.float32)
        weights = (keep, (a - keep.to(tl.float64)).to(tl.float32), (1.0 - a).to(tl.float32))
        init = tl.where((tl.load(entry) != 0) & (first == 0), 1, 0)
        group = (frame.to(tl.int64), first, size, fused, init, first + size == count, sources)
        state_row = ((b * sink_frames + frame) * frame_tokens + t) * (HEADS * DIM)
        table = turns + b * turns_b + frame * (sources + 1) * (2 * TURNED)
        order = entry + 2 + first
        HALF: tl.constexpr = DIMS // 2 if DIMS > 1 else 1

        if TURNED == 0 or (STEP == 2 and X0 % 2 == 0 and DIM % 2 == 0):  # the whole head in one piece
            _stream(
                k,
                k_frame,
                k_h,
                k_state,
                k_state_lo,
                state_row,
                table,
                order,
                weights,
                group,
                HEADS,
                DIM,
                TILE,
                0,
                0,
                DIM,
                HALF,
                True,
                TURNED,
                X0 // 2,
                0,
                0,
                0,
                True,
                STATE,
            )
        elif STEP == 1 and DIM % 2 == 0 and Y0 - X0 == DIM // 2:  # its first half with its second
            _stream(
                k,
                k_frame,
                k_h,
                k_state,
                k_state_lo,
                state_row,
                table,
                order,
                weights,
                group,
                HEADS,
                DIM,
                TILE,
                0,
                DIM // 2,
                DIM // 2,
                HALF,
                False,
                TURNED,
                X0,
                0,
                0,
                0,
                True,
                STATE,
            )
        else:
            # The dims that turn, then the others.
            JOINED: tl.constexpr = STEP == 2
            _stream(
                k,
                k_frame,
                k_h,
                k_state,
                k_state_lo,
                state_row,
                table,
                order,
                weights,
                group,
                HEADS,
                DIM,
                TILE,
                X0,
                Y0,
                2 * TURNED if JOINED else TURNED,
                triton.next_power_of_2(TURNED),
                JOINED,
                TURNED,
                0,
                0,
                0,
                0,
                True,
                STATE,
            )
            _stream(
                k,
                k_frame,
                k_h,
                k_state,
                k_state_lo,
                state_row,
                table,
                order,
                weights,
                group,
                HEADS,
                DIM,
                TILE,
                0,
                0,
                DIM,
                HALF,
                True,
                0,
                0,
                X0,
                X0 if JOINED else Y0,
                2 * TURNED if JOINED else TURNED,
                True,
                STATE,
            )
        if v_cache is not None:
            _stream(
                v,
                v_frame,
                v_h,
                v_state,
                v_state,
                state_row,
                table,
                order,
                weights,
                group,
                HEADS,
                DIM,
                TILE,
                0,
                0,
                DIM,
                HALF,
                True,
                0,
                0,
                0,
                0,
                0,
                False,
                STATE,
            )
        if skipped is not None:
            if left_out > 0:
                tl.atomic_add(skipped, left_out, sem="relaxed")  # of integers: any order gives the same sum


def kernel_name(heads: int, head_dim: int, dtype) -> str:
    return f"ema_evict {dtype} {heads} x {head_dim}"


def ema_evict(
    k_cache,
    v_cache,
    k_state,
    k_state_lo,
    v_state,
    schedule,
    turns,
    alpha,
    frame_tokens,
    temporal,
    state,
    skip_nonfinite,
    skipped,
):
    batch, tokens, heads, head_dim = k_cache.shape
    sink_frames, sources = schedule.shape[-2], schedule.shape[-1] - 2
    if k_cache.numel() == 0 or sink_frames == 0:
        return
    pairs = turns.shape[-2]
    config = config_of(kernel_name(heads, head_dim, k_cache.dtype), TILE)
    tile, dims = head_tile(heads, head_dim, config.elements)
    constants = {
        "HEADS": heads,
        "DIM": head_dim,
        "TURNED": pairs,
        "X0": temporal[0] if pairs else 0,
        "Y0": temporal[1] if pairs else 1,
        "STEP": temporal[2] if pairs else 2,
        "STATE": state if k_cache.element_size() == 2 else PUBLISHED.value,  # float32 is its own state
        "SKIP": skip_nonfinite,
        "TILE": tile,
        "DIMS": dims,
        "GROUP": _GROUP,
        "num_warps": warps(tile * dims, config.each),
    }
    plan = (
        schedule,
        schedule.stride(0) if schedule.ndim == 3 else 0,
        turns,
        turns.stride(0) if turns.ndim == 5 else 0,
        alpha,
        alpha.stride(0) if alpha.ndim >= 1 else 0,
        alpha.stride(1) if alpha.ndim == 2 else 0,
    )
    for first in range(0, max(sources, 1), _GROUP):
        launch(
            _evict,
            (frame_tokens, sink_frames, batch),
            k_cache,
            k_cache,
            *k_cache.stride()[:3],
            v_cache,
            *((0, 0, 0) if v_cache is None else v_cache.stride()[:3]),
            k_state,
            k_state_lo,
            v_state,
            *plan,
            skipped,
            tokens // frame_tokens,
            sources,
            first,
            **constants,
        )
