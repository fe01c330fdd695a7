"""``ema_evict``: re-phase the sink frames and fuse the frames that leave the window into them."""

from collections.abc import Sequence

import torch

from .._backend import (
    argument_error,
    choice,
    integer,
    integers,
    invoke,
    number,
    ops,
    refuse_grad,
    refuse_negative,
    register_fake,
    wrote,
)
from ..profiling import nvtx_annotated

STATES = {"compensated": 0, "float32": 1, "published": 2}
NONFINITE = {"skip": True, "propagate": False}


@nvtx_annotated
def ema_evict(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
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
            (1). **Mutated**: the sink slots. ``v_cache`` None: keys alone, and ``v_state`` is None too.
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
    written = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_state": k_state,
        "k_state_lo": k_state_lo,
        "v_state": v_state,
        "skipped": skipped,
    }
    refuse_grad("ema_evict", **written, turns=turns, alpha=alpha)
    refuse_negative("ema_evict", **written)
    if not isinstance(alpha, torch.Tensor):
        if not 0 <= number("ema_evict", "alpha", alpha) <= 1:
            raise argument_error("ema_evict", "alpha", "a number in [0, 1], or a tensor", repr(alpha))
        device = k_cache.device if isinstance(k_cache, torch.Tensor) else "cpu"
        alpha = torch.full((), alpha, dtype=torch.float64, device=device)
    invoke(
        ops.ema_evict.default,
        k_cache,
        v_cache,
        k_state,
        k_state_lo,
        v_state,
        schedule,
        turns,
        alpha,
        integer("ema_evict", "frame_tokens", frame_tokens),
        integers("ema_evict", "temporal", temporal),
        STATES[state],
        NONFINITE[on_nonfinite],
        skipped,
    )
    wrote(*written.values())


@register_fake("ema_evict")
def _fake(*args):
    return None
