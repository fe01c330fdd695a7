"""Small numerical tests of each op against its float64 reference, for `python -m rf_kernels.doctor`: a second
on any machine.

Each returns the largest absolute error, the bound it is held against, and the backend that served. The data
is bf16 (what users run), the reference computes on the same values in float64; bounds are a few units in the
last place of bf16 at the size of the values.
"""

import torch

import rf_kernels as rf
from rf_kernels.reference import dmd_gradient as dmd_reference
from rf_kernels.reference import ema_evict as ema_reference
from rf_kernels.reference import rope_append as rope_reference
from rf_kernels.reference import sink_window_attention as attention_reference

_ULP = torch.finfo(torch.bfloat16).eps
_HEADS, _DIM, _GRID = 2, 64, (3, 5)
_TOKENS = _GRID[0] * _GRID[1]


def _randn(device, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=torch.bfloat16)


def _result(actual, expected, ulps):
    pairs = [(a.double().cpu(), e.double().cpu()) for a, e in zip(actual, expected, strict=True)]
    scale = max(float(e.abs().max()) for _, e in pairs)
    error = max(float((a - e).abs().max()) for a, e in pairs)
    return {"error": error, "bound": ulps * _ULP * scale, "backend": rf.last_dispatch().backend}


def rope_append(device: torch.device) -> dict:
    q, k, v = (_randn(device, 1, 2 * _TOKENS, _HEADS, _DIM, seed=s) for s in range(3))
    weight = _randn(device, _HEADS * _DIM, seed=3).abs()
    rope = rf.RoPE3D.wan(_DIM)
    angles, axes = rope.table([range(7, 9), range(_GRID[0]), range(_GRID[1])], dtype=q.dtype, device=device)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    caches = [torch.zeros(1, 3 * _TOKENS, _HEADS, _DIM, dtype=q.dtype, device=device) for _ in range(2)]
    wide = [c.double() for c in caches]
    options = {"slots": slots, "axes": axes, "q_weight": weight, "k_weight": weight}
    out = rf.rope_append(q, k, v, *caches, angles=angles, **options)
    options |= {"q_weight": weight.double(), "k_weight": weight.double()}
    expected = rope_reference.rope_append(
        q.double(), k.double(), v.double(), *wide, angles=angles.double(), **options
    )
    return _result((out, *caches), (expected, *wide), 2)


def ema_evict(device: torch.device) -> dict:
    caches = [_randn(device, 1, 4 * _TOKENS, _HEADS, _DIM, seed=s) for s in range(2)]
    rope = rf.RoPE3D.wan(_DIM)
    nt = rope.temporal_pairs
    turns = torch.tensor(rope.temporal_table([-4, 3]), dtype=torch.float32, device=device).reshape(
        1, 2, nt, 2
    )
    schedule = torch.tensor([[1, 1, 2]], dtype=torch.int32, device=device)
    options = {"schedule": schedule, "alpha": 0.9, "frame_tokens": _TOKENS, "temporal": rope.temporal_dims}
    wide = [c.double() for c in caches]
    wide_state = torch.zeros(1, _TOKENS, _HEADS, _DIM, dtype=torch.float64, device=device)
    states = [wide_state.bfloat16() for _ in range(3)]
    rf.ema_evict(*caches, *states, turns=turns, **options)
    ema_reference.ema_evict(*wide, wide_state, turns=turns.double(), state="published", **options)
    return _result(caches, wide, 2)


def sink_window_attention(device: torch.device) -> dict:
    q = _randn(device, 1, 2 * _TOKENS, _HEADS, _DIM)
    k, v = (_randn(device, 1, 5 * _TOKENS, _HEADS, _DIM, seed=s) for s in (1, 2))
    out = rf.sink_window_attention(q, k, v, kv_tokens=4 * _TOKENS)
    expected = attention_reference.sink_window_attention(
        q.double(), k.double(), v.double(), kv_tokens=4 * _TOKENS
    )
    return _result([out], [expected], 4)


def dmd_gradient(device: torch.device) -> dict:
    x, fake, real, uncond = (_randn(device, 2, 3, 4, 5, 7, seed=s) for s in range(4))
    options = {"real_guidance": 3.0, "weight": torch.tensor([0.5, 2.0], device=device)}
    unscaled = rf.DMDOptions(reduction="none")
    out = rf.dmd_gradient(x, fake=fake, real=real, real_uncond=uncond, options=unscaled, **options)
    options["weight"] = options["weight"].double()
    expected = dmd_reference.dmd_gradient(
        x.double(),
        fake=fake.double(),
        real=real.double(),
        real_uncond=uncond.double(),
        reduction="none",
        **options,
    )
    return _result([out], [expected.gradient], 2)
