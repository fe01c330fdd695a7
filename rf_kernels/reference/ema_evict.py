"""Oracle of ``ema_evict`` in plain PyTorch: the formula of docs/ema_evict.md, frame by frame, rounded only
where a state or a slot is stored.

Everything between two stored values is float64, save "published", which is the eager arithmetic of the
published code.
"""

import torch


def _turn(x, table, temporal):
    """R_t on the last dim of ``x`` (float64): pair i, dims (x0 + i*step, y0 + i*step), by table[i] = (cos,
    sin)."""
    x0, y0, step = temporal
    pairs = table.shape[0]
    if pairs == 0:
        return x
    first = slice(x0, x0 + (pairs - 1) * step + 1, step)
    second = slice(y0, y0 + (pairs - 1) * step + 1, step)
    cos, sin = table.double().unbind(-1)
    a, b = x[..., first], x[..., second]
    still = (cos == 1) & (sin == 0)  # the angle zero keeps every bit, also beside an infinity
    out = x.clone()
    out[..., first] = torch.where(still, a, a * cos - b * sin)
    out[..., second] = torch.where(still, b, a * sin + b * cos)
    return out


def _split(x, dtype):
    """A float64 value as hi + lo of ``dtype``."""
    hi = x.to(dtype)
    return hi, (x - hi.double()).to(dtype)


def _average(state, x, alpha, precision, dtype):
    """One eviction of a float64 state whose storage is ``precision``; the result is what that storage
    holds."""
    if precision == "published":
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        keep, take = alpha.to(compute), (1 - alpha).to(compute)
        kept, taken = (state.to(compute) * keep).to(dtype), (x.to(compute) * take).to(dtype)
        return (kept + taken).double()
    new = alpha * state + (1 - alpha) * x
    if precision == "float32":
        return new.float().double()
    hi, lo = _split(new, dtype)
    return hi.double() + lo.double()


def ema_evict(
    k_cache,
    v_cache,
    k_state=None,
    k_state_lo=None,
    v_state=None,
    *,
    schedule,
    turns,
    alpha,
    frame_tokens,
    temporal=(0, 1, 2),
    state="compensated",
    on_nonfinite="skip",
    skipped=None,
):
    """Re-phase the sink frames and fuse the frames that leave into them, in place; arguments as
    ``rf_kernels.ema_evict``.

    Source: the recursion of Reward Forcing (arXiv 2512.04678), ``sink <- alpha sink + (1 - alpha) evicted``
    on un-rotated keys.
    """
    if v_cache is None:  # keys alone: values that nobody looks at
        v_cache = torch.zeros_like(k_cache)
        if v_state is None and k_state_lo is not None:
            v_state = torch.zeros_like(k_state_lo)
        elif k_state is not None and k_state.dtype != k_cache.dtype:
            v_state = torch.zeros_like(k_state)
    dtype = k_cache.dtype
    precision = state if dtype in (torch.bfloat16, torch.float16) else "published"
    batch, n = k_cache.shape[0], frame_tokens
    sink_frames = schedule.shape[-2]
    schedule = schedule.expand(batch, *schedule.shape[-2:]).tolist()
    turns = turns.expand(batch, *turns.shape[-4:])
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=k_cache.device)
    if alpha.dim() < 2:
        alpha = alpha.reshape(-1, 1).expand(sink_frames, n)

    def read(hi, lo, wide, slot, init):
        if init:
            return slot.double()
        if precision == "float32":
            return wide.double()
        return hi.double() + lo.double() if precision == "compensated" else hi.double()

    for b in range(batch):
        for j in range(sink_frames):
            init, count, *sources = schedule[b][j]
            rows = slice(j * n, (j + 1) * n)
            k_slot, v_slot = k_cache[b, rows], v_cache[b, rows]
            k_hi = k_slot if k_state is None else k_state[b, rows]
            k_lo, v_extra = (None if t is None else t[b, rows] for t in (k_state_lo, v_state))
            k = read(k_hi, k_lo, k_hi, k_slot, init)
            v = read(v_slot, v_extra, v_extra, v_slot, init)
            a = alpha[j, :, None, None]
            fused = torch.zeros(n, 1, 1, dtype=torch.bool, device=k_cache.device)
            for i, e in enumerate(sources[:count]):
                source = slice(e * n, (e + 1) * n)
                k_source, v_source = k_cache[b, source], v_cache[b, source]
                taken = torch.ones_like(fused)
                if on_nonfinite == "skip":
                    taken = (k_source.isfinite() & v_source.isfinite()).all(-1).all(-1)[:, None, None]
                    if skipped is not None:
                        skipped += (~taken).sum()
                turned = _turn(k_source.double(), turns[b, j, i], temporal)
                k = torch.where(taken, _average(k, turned, a, precision, dtype), k)
                v = torch.where(taken, _average(v, v_source.double(), a, precision, dtype), v)
                fused |= taken

            def store(target, value, where):
                target.copy_(torch.where(where, value.to(target.dtype), target))

            changed = fused | bool(init)
            if precision == "compensated":
                store(k_lo, _split(k, dtype)[1], changed)
                store(v_extra, _split(v, dtype)[1], changed)
            elif precision == "float32":
                store(v_extra, v, changed)
            store(k_hi, k, changed)
            store(v_slot, v, fused)
            if k_state is not None:
                k_slot.copy_(_turn(k, turns[b, j, -1], temporal))
