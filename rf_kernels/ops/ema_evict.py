"""``ema_evict``: re-phase the sink frames and fuse the frames that leave the window into them."""

from collections.abc import Sequence

import torch

from .._backend import argument_error, as_list, choice, invoke, ops, refuse_grad, register_fake
from ..profiling import nvtx_annotated

STATES = {"compensated": 0, "float32": 1, "published": 2}
NONFINITE = {"skip": True, "propagate": False}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@nvtx_annotated
def ema_evict(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_state: torch.Tensor | None = None,
    k_state_lo: torch.Tensor | None = None,
    v_state: torch.Tensor | None = None,
    *,
    schedule: torch.Tensor,
    turns: torch.Tensor,
    alpha: torch.Tensor | float,
    frame_tokens: int,
    temporal: Sequence[int] = (0, 1, 2),
    state: str = "compensated",
    on_nonfinite: str = "skip",
    skipped: torch.Tensor | None = None,
) -> None:
    """Fuse leaving frames into the sink frames of a KV cache and turn the sink's keys to their new phase, in
    place.

    For each sample and sink frame j = 0..S-1, token by token (``n = frame_tokens`` tokens a frame)::

        if init:            k_state <- k slot j;  v_state <- v slot j
        for i < count:      k_state <- alpha * k_state + (1 - alpha) * R(turns[j, i]) k_cache[source i]
                            v_state <- alpha * v_state + (1 - alpha) * v_cache[source i]
        k slot j <- R(turns[j, E]) k_state;  v slot j <- v_state (untouched when nothing was fused)

    ``R`` turns the temporal pairs of a head and leaves its other dims alone; the angle zero changes no bit.
    Rotations commute with the average, so with keys stored rotated this is the recursion of Reward Forcing
    (arXiv 2512.04678, EMA-Sink) on un-rotated keys.

    Args:
        k_cache, v_cache: ``[B, T, H, D]``, float64, float32, bfloat16 or float16; T a multiple of n; frame
            slot f is tokens ``f*n .. (f+1)*n``; the sink frames are slots 0..S-1. Any strides but the last
            (1). **Mutated**: the sink slots.
        k_state, k_state_lo, v_state: ``[B, S*n, H, D]``, contiguous. **Mutated** where a frame is initialised
            or fused. What is needed:

            =================  =====================  ==================  ===================
            state              k_state                k_state_lo          v_state
            =================  =====================  ==================  ===================
            "compensated"      cache dtype (hi)       cache dtype         cache dtype (lo)
            "float32"          float32                None                float32
            "published"        cache dtype            None                None
            =================  =====================  ==================  ===================

            float32 and float64 caches are their own state: as "published", whatever ``state`` says. With nt =
            0, ``k_state`` of the cache's dtype may be None: the key slot is the state, as for values.
        schedule: int32 ``[S, 2 + E]`` or ``[B, S, 2 + E]``, on the caches' device: init (0 or 1), count, then
            E source frame slots (the first ``count`` are read, in this order), each in S..T/n-1 and at most
            once in a sample.
        turns: cos and sin ``[S, E + 1, nt, 2]`` or ``[B, S, E + 1, nt, 2]``; float64 for float64 caches, else
            float32. ``turns[j, i]`` is R_t(j - e_i), from the phase of the source to that of the state;
            ``turns[j, E]`` is R_t(shift).
        alpha: share that the sink keeps, in [0, 1]: a float, or a float64 tensor ``[]``, ``[S]`` or ``[S,
            n]``.
        frame_tokens: n, tokens of a frame.
        temporal: ``(x0, y0, step)``: temporal pair i is dims ``(x0 + i*step, y0 + i*step)``
            (``RoPE.temporal_dims``).
        state: "compensated": hi + lo of the cache's dtype; "float32"; "published": the cache's dtype, every
            product and sum rounded to it, bit for bit the eager ``alpha*sink + (1-alpha)*evicted``.
        on_nonfinite: "skip": a source token with a NaN or infinity anywhere in its K or V is fused in
            neither, and counted; "propagate": non-finite elements stay non-finite in the sink.
        skipped: int64 ``[1]``, **mutated**: the number of skipped (sample, source token) is added.

    Raises:
        ArgumentError: before anything is written. On CUDA the values of ``schedule`` and ``alpha`` tensors
            are not looked at (that would synchronise): a source slot that is out of range is left out, a
            count is limited to 0..E.
    """
    choice("ema_evict", "state", STATES, state)
    choice("ema_evict", "on_nonfinite", NONFINITE, on_nonfinite)
    refuse_grad(
        "ema_evict", k_cache=k_cache, v_cache=v_cache, k_state=k_state, k_state_lo=k_state_lo, v_state=v_state
    )
    if not isinstance(alpha, torch.Tensor):
        if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise argument_error("ema_evict", "alpha", "a number in [0, 1], or a tensor", repr(alpha))
        device = k_cache.device if isinstance(k_cache, torch.Tensor) else "cpu"
        alpha = torch.full((), alpha, dtype=torch.float64, device=device)
    invoke(
        ops.ema_evict,
        k_cache,
        v_cache,
        k_state,
        k_state_lo,
        v_state,
        schedule,
        turns,
        alpha,
        frame_tokens,
        as_list("ema_evict", "temporal", temporal),
        STATES[state],
        NONFINITE[on_nonfinite],
        skipped,
    )


@register_fake("ema_evict")
def _fake(*args):
    return None


def _half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def supports(
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    head_dim: int = 128,
    temporal: Sequence[int] = (0, 1, 2),
    temporal_pairs: int = 0,
) -> tuple[bool, str]:
    """Whether ``ema_evict`` serves such a cache, and how (or why not). Looks at no GPU."""
    if dtype not in _DTYPES:
        return False, f"dtype {dtype}: float64, float32, bfloat16 or float16 are supported"
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return False, f"device {kind}: there are a CPU and a CUDA backend"
    if head_dim < 1 or 2 * temporal_pairs > head_dim:
        return False, f"{temporal_pairs} temporal pairs do not fit in head_dim {head_dim}"
    x0, y0, step = temporal
    inside = x0 >= 0 and y0 + (temporal_pairs - 1) * step < head_dim
    if temporal_pairs and not (
        inside and ((step == 2 and y0 == x0 + 1) or (step == 1 and y0 >= x0 + temporal_pairs))
    ):
        expected = "neighbours (x0, x0 + 1, 2) or two runs (x0, y0, 1) inside the head"
        return False, f"temporal dims {tuple(temporal)}: {expected}"
    width = 8 if kind == "cpu" else 16 // dtype.itemsize
    span = -(-temporal_pairs // width) * width
    aligned = head_dim % width == 0 and (
        temporal_pairs == 0
        or (
            x0 % width == 0 and (step == 2 or (y0 % width == 0 and x0 + span <= y0 and y0 + span <= head_dim))
        )
    )
    if not aligned:
        return (
            True,
            f"scalar path: head_dim {head_dim} or the place of its temporal pairs is no multiple of {width}",
        )
    return True, f"vectors of {width} elements" + (" or more" if kind == "cpu" else "")


def cost(
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
    if not _half(dtype) or state == "published":
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


ema_evict.supports = supports
ema_evict.cost = cost
