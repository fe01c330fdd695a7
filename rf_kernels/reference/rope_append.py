"""Oracle of ``rope_append`` and ``rope``: RMSNorm, rotation and cache write as separate, plain PyTorch steps.

The formulas are those of the op's page (docs/rope_append.md). Everything is evaluated in the dtype it is
given (float64 for an oracle), without rounding in between beyond that dtype's own; ``accumulate`` upcasts
first and rounds once at the end.
"""

import math

import torch

LAYOUTS = ("adjacent", "half", "axis_half")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, norm: str | None = "model", eps: float = 1e-6
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` for x [B, N, H, D]: the mean over (H, D) with weight [H * D]
    ("model"), or over D with weight [D] ("head"). Without a weight there is no norm."""
    if weight is None:
        return x
    if norm == "model":
        mean = x.square().mean(dim=(-2, -1), keepdim=True)
        return x / torch.sqrt(mean + eps) * weight.to(x.dtype).view(x.shape[-2:])
    if norm == "head":
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(x.dtype)
    raise ValueError(f"norm: expected 'model' or 'head' with a weight, found {norm!r}")


def token_angles(angles: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """cos and sin of every token and pair, [1 or B, N, P, 2], from the table ``angles`` [1 or B, R, 2]."""
    lengths, pairs, offsets = axes[0::3], axes[1::3], axes[2::3]
    parts = []
    for axis, (length, count, offset) in enumerate(zip(lengths, pairs, offsets, strict=True)):
        rows = angles[:, offset : offset + length * count].reshape(len(angles), length, count, 2)
        # Tokens are the grid of all axes, axis 0 slowest: this axis' rows are broadcast over the other axes.
        shape = [1] * len(lengths)
        shape[axis] = length
        rows = rows.reshape(len(angles), *shape, count, 2).expand(-1, *lengths, count, 2)
        parts.append(rows.reshape(len(angles), math.prod(lengths), count, 2))
    return torch.cat(parts, dim=2)


def pair_dims(axes: list[int], layout: str = "adjacent") -> tuple[torch.Tensor, torch.Tensor]:
    """Dims (x, y) of every pair, int64 [P] each."""
    pairs = axes[1::3]
    total = sum(pairs)
    if layout == "adjacent":
        x = 2 * torch.arange(total)
        return x, x + 1
    if layout == "half":
        x = torch.arange(total)
        return x, x + total
    if layout == "axis_half":
        starts = [2 * sum(pairs[:a]) for a in range(len(pairs))]
        x = torch.cat([start + torch.arange(n) for start, n in zip(starts, pairs, strict=True)])
        return x, x + torch.cat([torch.full((n,), n) for n in pairs])
    raise ValueError(f"layout: expected one of {LAYOUTS}, found {layout!r}")


def rotate(x: torch.Tensor, angles: torch.Tensor | None, axes=(), layout: str = "adjacent") -> torch.Tensor:
    """Every pair (x, y) of x [B, N, H, D] becomes (x cos - y sin, x sin + y cos); dims beyond the pairs
    stay."""
    if angles is None:
        return x
    table = token_angles(angles, list(axes)).to(x.dtype)[:, :, None]
    cos, sin = table[..., 0], table[..., 1]
    dim_x, dim_y = (dims.to(x.device) for dims in pair_dims(list(axes), layout))
    out = x.clone()
    out[..., dim_x] = x[..., dim_x] * cos - x[..., dim_y] * sin
    out[..., dim_y] = x[..., dim_x] * sin + x[..., dim_y] * cos
    return out


def rope(
    x, *, angles, axes, layout="adjacent", weight=None, norm="model", eps=1e-6, accumulate=None
) -> torch.Tensor:
    """RMSNorm (if ``weight`` is given), then the rotation. ``accumulate``: dtype to compute in before the one
    rounding back to x's."""
    wide = x if accumulate is None else x.to(accumulate)
    return rotate(rms_norm(wide, weight, norm, eps), angles, axes, layout).to(x.dtype)


def rope_append(
    q,
    k,
    v,
    k_cache,
    v_cache,
    *,
    slots,
    angles=None,
    axes=(),
    layout="adjacent",
    q_weight=None,
    k_weight=None,
    norm="model",
    eps=1e-6,
    accumulate=None,
) -> torch.Tensor:
    """q and k [B, N, H, D] through ``rope``; k and v (None: k alone) of frame f written to cache tokens
    ``slots[f] * n ...``.
    Returns the new q."""
    same = dict(angles=angles, axes=axes, layout=layout, norm=norm, eps=eps, accumulate=accumulate)
    k = rope(k, weight=k_weight, **same)
    frames = slots.shape[-1]
    n = k.shape[1] // frames if frames else 0
    for b in range(k.shape[0]):
        for f, slot in enumerate((slots[b] if slots.ndim == 2 else slots).tolist()):
            k_cache[b, slot * n : (slot + 1) * n] = k[b, f * n : (f + 1) * n].to(k_cache.dtype)
            if v is not None:
                v_cache[b, slot * n : (slot + 1) * n] = v[b, f * n : (f + 1) * n].to(v_cache.dtype)
    return rope(q, weight=q_weight, **same)
