"""``dmd_gradient``: four launches, whatever the size: measure the tiles, normalise the samples, finish the
tiles, sum up.

    d = (fake - real) / max(mean|x - real| + eps, floor)
    gradient = w m d / N,     loss = sum(w m d^2) / (2 N)

A tile is 2048 elements of one sample: summed as a tree in float32 (the distances, which can exceed it, in
float64), the tiles of a sample in float64. So nothing depends on the number of multiprocessors, and a
sample's numbers (apart from N) not on the other samples."""

import torch
import triton
import triton.language as tl

from .common import launch, round_to, widen

_PUBLISHED, _MEAN = 0, 0  # codes of the registered op
_TILE = 2048
_WARPS = 4  # 16 elements a thread: two 16-byte accesses of each half-precision tensor in flight
_TILES = 1024  # partial sums that a program adds up at once


@triton.jit
def _broadcast(data, batch_stride, sizes, strides, b, i, mask):
    """Elements i of sample b of a tensor that is broadcast over the dimensions ``sizes``, the last of them
    the fastest."""
    at = tl.zeros_like(i) + b * batch_stride
    for dim in tl.static_range(len(sizes) - 1, -1, -1):
        at += i % sizes[dim] * strides[dim]
        i = i // sizes[dim]
    return tl.load(data + at, mask=mask, other=0)


@triton.jit
def _guided(cond, uncond, guidance, at, mask):
    v = widen(tl.load(cond + at, mask=mask, other=0.0))
    if uncond is not None:
        u = widen(tl.load(uncond + at, mask=mask, other=0.0))
        v = v + guidance * (v - u)
    return v


@triton.jit
def _estimates(
    fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, x_t, sigma, at, b, i, mask
):
    """(fake - real, the estimate of real). With flow, x_t cancels in the difference, and is left out of
    it."""
    f = _guided(fake, fake_uncond, fake_guidance, at, mask)
    r = _guided(real, real_uncond, real_guidance, at, mask)
    if x_t is not None:
        data, batch_stride, sizes, strides = sigma
        s = _broadcast(data, batch_stride, sizes, strides, b, i, mask)
        return s * (r - f), widen(tl.load(x_t + at, mask=mask, other=0.0)) - s * r
    return f - r, r


@triton.jit
def _magnitude(v):
    """|v| as an integer of the same order; infinity and NaN are above every number, so that a maximum finds
    them."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _place(tiles, elements, TILE: tl.constexpr):
    """(sample, element in the sample, element in the tensor, mask) of this program's tile."""
    tile = tl.program_id(0).to(tl.int64)
    b = tile // tiles
    i = tile % tiles * TILE + tl.arange(0, TILE)
    return b, i, b * elements + i, i < elements


@triton.jit
def _measure(
    x,
    fake,
    real,
    fake_uncond,
    real_uncond,
    fake_guidance,
    real_guidance,
    x_t,
    sigma,
    weight,
    chosen,
    distances,
    peaks,
    counts,
    tiles,
    elements,
    NORMALIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of one tile: sum |x - real|, the largest |fake - real|, the number of selected elements."""
    b, i, at, mask = _place(tiles, elements, TILE)
    difference, estimate = _estimates(
        fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, x_t, sigma, at, b, i, mask
    )
    peak = tl.max(_magnitude(difference))
    if weight is not None:  # a weight that is not finite loses its sample as a prediction does
        w = _broadcast(weight[0], weight[1], weight[2], weight[3], b, i, mask)
        peak = tl.maximum(peak, tl.max(tl.where(tl.abs(w) < float("inf"), 0, _magnitude(w))))
    tl.store(peaks + tl.program_id(0), peak)
    if NORMALIZE:
        distance = tl.abs(widen(tl.load(x + at, mask=mask, other=0.0)) - estimate)
        tl.store(distances + tl.program_id(0), tl.sum(tl.where(mask, distance, 0.0).to(tl.float64)))
    if chosen is not None:
        c = _broadcast(chosen[0], chosen[1], chosen[2], chosen[3], b, i, mask)
        tl.store(counts + tl.program_id(0), tl.sum(tl.where(c != 0, 1, 0)))


@triton.jit
def _total(data, first, count, TILES: tl.constexpr, dtype: tl.constexpr):
    """The sum of ``count`` numbers from ``first`` on."""
    sums = tl.zeros((TILES,), dtype)
    for begin in range(0, count, TILES):
        at = begin + tl.arange(0, TILES)
        sums += tl.load(data + first + at, mask=at < count, other=0).to(dtype)
    return tl.sum(sums)


@triton.jit
def _normalise(
    distances,
    peaks,
    counts,
    normalizer,
    silent,
    drop,
    scale,
    batch,
    tiles,
    elements,
    all_elements,
    eps,
    floor,
    limit,
    NORMALIZE: tl.constexpr,
    MEAN: tl.constexpr,
    PUBLISHED: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program a sample: what its differences are divided by, and whether they count. The first one also
    writes 1 / N."""
    b = tl.program_id(0)
    if b < batch:
        divisor = 1.0
        if NORMALIZE:
            mean = _total(distances, b.to(tl.int64) * tiles, tiles, TILES, tl.float64) / tl.maximum(
                elements, 1
            ).to(tl.float64)
            mean += eps
            divisor = tl.where(mean < floor, floor, mean).to(tl.float32)  # a NaN stays one
        largest = tl.zeros((TILES,), tl.int32)
        for begin in range(0, tiles, TILES):
            at = begin + tl.arange(0, TILES)
            largest = tl.maximum(
                largest, tl.load(peaks + b.to(tl.int64) * tiles + at, mask=at < tiles, other=0)
            )
        top = tl.max(largest).to(tl.float32, bitcast=True)
        lost, zero = 0, 0
        if not PUBLISHED:
            # Division by a positive number keeps order, so the largest difference decides whether all
            # quotients are finite. A divisor of zero (x = real in every element) gives d = 0, and loses
            # nothing.
            zero = tl.where(divisor == 0.0, 1, 0)
            finite = (tl.abs(divisor) < float("inf")) & (top < float("inf"))
            fits = tl.div_rn(top, tl.where(zero != 0, 1.0, divisor)) <= limit
            lost = tl.where(finite & (fits | (zero != 0)), 0, 1)
        tl.store(normalizer + b, divisor)
        tl.store(drop + b, lost)
        tl.store(silent + b, lost | zero)
    if b == 0:
        value = 1.0
        if MEAN:
            selected = all_elements.to(tl.int64)
            if counts is not None:
                selected = _total(counts, 0, batch * tiles, TILES, tl.int64)
            divisor = tl.maximum(selected, 1).to(tl.float64)
            value = tl.where(selected > 0, (1.0 / divisor).to(tl.float32), 0.0)
        tl.store(scale, value)


@triton.jit
def _finish(
    fake,
    real,
    fake_uncond,
    real_uncond,
    fake_guidance,
    real_guidance,
    x_t,
    sigma,
    weight,
    chosen,
    normalizer,
    silent,
    scale,
    gradient,
    losses,
    norms,
    tiles,
    elements,
    limit,
    SCALED: tl.constexpr,
    PUBLISHED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of one tile, and its sums of w m d^2 and |d|."""
    b, i, at, mask = _place(tiles, elements, TILE)
    difference, _ = _estimates(
        fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, x_t, sigma, at, b, i, mask
    )
    d = tl.div_rn(difference, tl.load(normalizer + b) + tl.zeros_like(difference))
    if PUBLISHED:
        d = tl.where(d > limit, limit, d)
        d = tl.where(d < -limit, -limit, d)
        d = tl.where(d == d, d, 0.0)
    w = tl.full((TILE,), 1.0, tl.float32)
    if weight is not None:
        w = _broadcast(weight[0], weight[1], weight[2], weight[3], b, i, mask)
    counts = mask
    if chosen is not None:
        counts = mask & (_broadcast(chosen[0], chosen[1], chosen[2], chosen[3], b, i, mask) != 0)
    factor = tl.load(scale) if SCALED else 1.0
    # w / N comes first: under the published rule d may be the largest float.
    grad = tl.where(counts, (w * factor) * d, 0.0)
    loss = tl.sum(tl.where(counts, (w * d) * d, 0.0))
    norm = tl.sum(tl.where(mask, tl.abs(d), 0.0))
    still = tl.load(silent + b) != 0
    grad = tl.where(still, 0.0, grad)
    tl.store(gradient + at, round_to(grad, gradient.dtype.element_ty), mask=mask)
    tl.store(losses + tl.program_id(0), tl.where(still, 0.0, loss))
    tl.store(norms + tl.program_id(0), tl.where(still, 0.0, norm))


@triton.jit
def _sum_up(
    losses,
    norms,
    drop,
    counts,
    loss,
    sample_loss,
    gradient_norm,
    dropped,
    batch,
    tiles,
    elements,
    all_elements,
    MEAN: tl.constexpr,
    TILES: tl.constexpr,
):
    divisor = tl.full((), 1.0, tl.float64)
    if MEAN:
        divisor = all_elements.to(tl.float64)
        if counts is not None:
            divisor = _total(counts, 0, batch * tiles, TILES, tl.int64).to(tl.float64)
    all_losses, lost = tl.zeros((), tl.float64), tl.zeros((), tl.int64)
    for b in range(batch):
        first = tl.cast(b, tl.int64) * tiles
        part = _total(losses, first, tiles, TILES, tl.float64)
        part = tl.where(divisor > 0.0, part / (2.0 * tl.where(divisor > 0.0, divisor, 1.0)), 0.0)
        norm = _total(norms, first, tiles, TILES, tl.float64) / tl.maximum(elements, 1).to(tl.float64)
        tl.store(sample_loss + b, part.to(tl.float32))
        tl.store(gradient_norm + b, norm.to(tl.float32))
        all_losses += part
        lost += tl.load(drop + b)
    tl.store(loss, all_losses.to(tl.float32))
    tl.store(dropped, lost)


def _broadcast_of(t, x):
    """(data, batch stride, sizes, strides) of ``t`` broadcast to x, with as few dimensions as its strides
    allow; None for None."""
    if t is None:
        return None
    sizes, strides = [], []
    for dim in range(1, x.ndim):
        size = x.shape[dim]
        if size == 1:
            continue
        stride = t.stride(dim) if dim < t.ndim and t.shape[dim] != 1 else 0
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    data = t.view(torch.uint8) if t.dtype == torch.bool else t
    if strides == [0]:
        sizes, strides = [], []  # one value a sample
    return data, t.stride(0) if t.shape[0] != 1 else 0, tuple(sizes), tuple(strides)


def dmd_gradient(
    x,
    fake,
    real,
    fake_uncond,
    real_uncond,
    fake_guidance,
    real_guidance,
    x_t,
    sigma,
    weight,
    mask,
    normalize,
    eps,
    floor,
    nan,
    reduction,
    scale_gradient,
    gradient,
    loss,
    sample_loss,
    gradient_norm,
    normalizer,
    dropped,
    scale,
):
    """x and the predictions come contiguous; what is done about dropped samples is for the caller to say."""
    fake_uncond = None if fake_guidance == 0 else fake_uncond
    real_uncond = None if real_guidance == 0 else real_uncond
    batch = x.shape[0]
    elements = x[0].numel() if batch else 0
    tiles = triton.cdiv(elements, _TILE)

    def new(count, dtype):
        return torch.empty(count, dtype=dtype, device=x.device)

    distances, peaks = new(batch * tiles, torch.float64), new(batch * tiles, torch.int32)
    losses, norms = (new(batch * tiles, torch.float32) for _ in range(2))
    counts = None if mask is None else new(batch * tiles, torch.int32)
    silent, drop = (new(batch, torch.int32) for _ in range(2))

    broadcasts = [_broadcast_of(t, x) for t in (sigma, weight, mask)]
    inputs = (fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, x_t, *broadcasts)
    shape = (tiles, elements)
    tile = {"TILE": _TILE, "num_warps": _WARPS}
    sums = {"MEAN": reduction == _MEAN, "TILES": _TILES, "num_warps": _WARPS}
    published, limit = nan == _PUBLISHED, torch.finfo(fake.dtype).max
    if tiles:
        launch(
            _measure,
            (batch * tiles,),
            x,
            x,
            *inputs,
            distances,
            peaks,
            counts,
            *shape,
            NORMALIZE=normalize,
            **tile,
        )
    launch(
        _normalise,
        (max(batch, 1),),
        x,
        distances,
        peaks,
        counts,
        normalizer,
        silent,
        drop,
        scale,
        batch,
        *shape,
        x.numel(),
        eps,
        floor,
        limit,
        NORMALIZE=normalize,
        PUBLISHED=published,
        **sums,
    )
    if tiles:
        launch(
            _finish,
            (batch * tiles,),
            x,
            *inputs,
            normalizer,
            silent,
            scale,
            gradient,
            losses,
            norms,
            *shape,
            limit,
            SCALED=scale_gradient,
            PUBLISHED=published,
            **tile,
        )
    launch(
        _sum_up,
        (1,),
        x,
        losses,
        norms,
        drop,
        counts,
        loss,
        sample_loss,
        gradient_norm,
        dropped,
        batch,
        *shape,
        x.numel(),
        **sums,
    )
