"""Calls of rope_append for its tests: inputs in every layout, and the comparison with the oracle."""

import math

import torch

import rf_kernels as rf
from rf_kernels.reference import rope_append as ref
from rf_kernels.testing import assert_equal_bits, assert_within_eager

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["adjacent", "half", "axis_half"]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def normal(*shape, dtype=torch.float64, seed=0):
    """Standard normal values that are representable in every dtype's own precision: made in float64, then
    rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_bits(*shape, dtype, seed=0):
    """Any bit pattern, NaNs with payloads among them."""
    integer = BITS[dtype.itemsize]
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=integer).view(dtype)


def rope_of(pairs, layout="adjacent"):
    return rf.RoPE(pairs=pairs, bases=(1e4, 500.0, 1e4)[: len(pairs)], layout=layout)


def inputs(
    dtype, *, batch=2, grid=(3, 2, 4), heads=(4, 2), dim=40, pairs=(6, 5, 5), layout="adjacent", norm="model"
):
    """(positional, keyword) arguments of rope_append; the caches have two slots more than the call has
    frames."""
    frames, n = grid[0], math.prod(grid[1:])
    q_heads, kv_heads = heads
    data = [
        normal(batch, frames * n, h, dim, dtype=dtype, seed=h + i)
        for i, h in enumerate((q_heads, kv_heads, kv_heads))
    ]
    caches = [random_bits(batch, (frames + 2) * n, heads[1], dim, dtype=dtype, seed=i) for i in (7, 8)]
    angles, axes = None, []
    if pairs is not None:
        angles, axes = rope_of(pairs, layout).table(
            [range(5, 5 + frames), *map(range, grid[1:])], dtype=dtype
        )
    widths = [h * dim if norm == "model" else dim for h in heads]
    weights = [None if norm is None else normal(w, dtype=dtype, seed=w) for w in widths]
    slots = torch.randperm(frames + 2, generator=torch.Generator().manual_seed(3))[:frames].to(torch.int32)
    keywords = dict(slots=slots, angles=angles, axes=axes, layout=layout, norm=norm, eps=1e-6)
    return [*data, *caches], keywords | dict(q_weight=weights[0], k_weight=weights[1])


def widened(args, keywords, **table):
    """The same call in float64: data and weights upcast; the angles of ``table`` (float64, not rounded to
    float32)."""
    up = [t.double() for t in args]
    wide = {
        k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in keywords.items()
    }
    return up, wide | table


def clones(args):
    return [*args[:3], *(t.clone() for t in args[3:])]


SHAPES = {
    "grouped heads and a tail": dict(),
    "one chunk of Wan, few rows": dict(batch=1, grid=(3, 5, 4), heads=(12, 12), dim=128, pairs=(22, 21, 21)),
    "odd head dim": dict(grid=(2, 3, 1), heads=(3, 1), dim=17, pairs=(2, 3, 1)),
    "one token": dict(batch=1, grid=(1, 1, 1), heads=(1, 1), dim=2, pairs=(1,), norm="head")
    | dict(pairs=(1, 0, 0)),
    "all of the head": dict(dim=32),
    "one dim": dict(dim=1, pairs=None),
}


def compare(dtype, shape):
    """Op and eager PyTorch in ``dtype`` against the oracle in float64 with angles that were never rounded."""
    args, keywords = inputs(dtype, **shape)
    exact_args, exact = widened(args, keywords, angles=inputs(torch.float64, **shape)[1]["angles"])
    before = [t.clone() for t in args[3:]]
    eager_args = clones(args)
    q = rf.rope_append(*args, **keywords)
    q_eager = ref.rope_append(*eager_args, **keywords)
    q_exact = ref.rope_append(*exact_args, **exact)
    assert q.dtype == dtype and q.is_contiguous()
    assert_within_eager(q, q_exact, q_eager)

    n = args[0].shape[1] // len(keywords["slots"])
    tokens = torch.cat([torch.arange(s * n, (s + 1) * n) for s in keywords["slots"].tolist()])
    k, k_eager, k_exact = (a[3][:, tokens] for a in (args, eager_args, exact_args))
    assert_within_eager(k, k_exact, k_eager)
    assert_equal_bits(args[4][:, tokens], args[2])  # values are copied
    rest = torch.ones(args[3].shape[1], dtype=torch.bool)
    rest[tokens] = False
    # and nothing else is written, whatever bits it holds
    for cache, old in zip(args[3:], before, strict=True):
        assert_equal_bits(cache[:, rest], old[:, rest])

    if dtype.itemsize == 2:  # rounded once: half a unit in the last place, and what float32 loses before
        exponent = torch.frexp(q_exact).exponent
        ulp = torch.ldexp(torch.ones_like(q_exact), exponent) * torch.finfo(dtype).eps / 2
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        limit = ulp.clamp(min=smallest) / 2 + 2e-6 * q_exact.abs().max()
        assert bool(((q.double() - q_exact).abs() <= limit).all())
