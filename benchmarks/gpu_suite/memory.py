"""Stage: the memory-bound ops, and one layer of a stream, beside the published formulation, eager PyTorch and
torch.compile.

    python -m benchmarks.gpu_suite.memory --device cuda --rows FILE

Cases, inputs and agreement are those of benchmarks; what torch.compile makes of the same job is added here,
written with real numbers (its generator has no complex ones), on tensors of its own of the same shapes.
"""

from functools import partial

import torch
import torch.nn.functional as F

from rf_kernels.ops.dmd_gradient import dmd_gradient as dmd_op
from rf_kernels.ops.ema_evict import ema_evict as evict_op
from rf_kernels.ops.rope_append import rope_append as append_op
from rf_kernels.positions import RoPE3D
from rf_kernels.testing import relative_l2

from .. import dmd_gradient, ema_evict, floors, layer, rope_append
from ..case import Case
from .jobs import Job, Options, measured_roof, reason, run_jobs


def compiled(function, device: str):
    return torch.compile(
        function, dynamic=False, fullgraph=True, backend="inductor" if device == "cuda" else "eager"
    )


def expect_close(found, wanted, ulps: float) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        error, bound = relative_l2(ours, theirs), ulps * torch.finfo(ours.dtype).eps
        assert error <= bound, f"torch.compile's result differs by {error:.1e}, allowed {bound:.1e}"


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring pairs of x ``[B, N, H, D]`` by tables that broadcast to ``[B, N, H, D/2]``."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def compiled_append(shape: rope_append.Shape, dtype: torch.dtype, device: str):
    width, first = shape.heads * shape.head_dim, shape.length - shape.frames
    place = slice(first * shape.frame_tokens, shape.length * shape.frame_tokens)
    q, k, v = (
        torch.randn(1, shape.tokens, shape.heads, shape.head_dim, device=device).to(dtype) for _ in range(3)
    )
    caches = torch.zeros(
        2, 1, shape.length * shape.frame_tokens, shape.heads, shape.head_dim, dtype=dtype, device=device
    )
    weights = [torch.randn(width, device=device).to(dtype) for _ in range(2)]
    turn = rope_append.turns((shape.frames, *shape.grid), shape.head_dim, first, device)
    cos, sin = turn.real.contiguous(), turn.imag.contiguous()

    def step(q, k, v, k_cache, v_cache):
        out = []
        for x, weight in ((q, weights[0]), (k, weights[1])):
            wide = F.rms_norm(x.float().flatten(2), (width,), weight.float(), 1e-6).view(x.shape)
            out.append(rotated(wide, cos, sin).to(dtype))
        k_cache[:, place] = out[1]
        v_cache[:, place] = v
        return out[0]

    function = compiled(step, device)
    slots = torch.arange(first, shape.length, dtype=torch.int32, device=device)
    positions = [range(first, shape.length), *map(range, shape.grid)]
    angles, axes = RoPE3D.wan(shape.head_dim).table(positions, dtype=dtype, device=device)
    ours = [t.clone() for t in caches]
    options = {"slots": slots, "angles": angles, "axes": axes, "q_weight": weights[0], "k_weight": weights[1]}
    expected = append_op(q, k, v, *ours, **options)
    expect_close((function(q, k, v, *caches), *caches), (expected, *ours), ulps=4)
    return lambda: function(q, k, v, *caches)


def compiled_evict(grid, heads: int, head_dim: int, dtype: torch.dtype, device: str):
    """With a float32 state."""
    arguments, options = ema_evict.problem(grid, heads, head_dim, dtype, "float32", device)
    tokens, alpha = ema_evict.SINK_FRAMES * grid[0] * grid[1], ema_evict.ALPHA
    k, v, k_state, _, v_state = (None if t is None else t.clone() for t in arguments)
    table = torch.ones(2, head_dim // 2, 2, device=device)
    table[..., 1] = 0
    table[:, : options["turns"].shape[2]] = options["turns"][0]
    cos, sin = table[..., 0], table[..., 1]

    def step(k, v, k_state, v_state):
        source = slice(tokens, 2 * tokens)
        k_state.copy_(torch.lerp(k_state, rotated(k[:, source].float(), cos[0], sin[0]), 1 - alpha))
        k[:, :tokens] = rotated(k_state, cos[1], sin[1]).to(dtype)
        v_state.copy_(torch.lerp(v_state, v[:, source].float(), 1 - alpha))
        v[:, :tokens] = v_state.to(dtype)

    function = compiled(step, device)
    function(k, v, k_state, v_state)
    evict_op(*arguments, **options)
    expect_close((k, v), arguments[:2], ulps=2)
    return lambda: function(k, v, k_state, v_state)


def compiled_dmd(shape: tuple[int, ...], dtype: torch.dtype, device: str):
    x, fake, real, uncond = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight = torch.full((), 1.8, device=device)
    axes, elements = tuple(range(1, len(shape))), torch.Size(shape).numel()

    def step(x, fake, real, uncond):
        x, fake, real, uncond = (t.float() for t in (x, fake, real, uncond))
        guided = real + dmd_gradient.GUIDANCE * (real - uncond)
        d = (fake - guided) / (x - guided).abs().mean(dim=axes, keepdim=True)
        return (
            (weight * d / elements).to(dtype),
            (weight * d * d).sum() / (2 * elements),
            d.abs().mean(dim=axes),
        )

    function = compiled(step, device)
    options = {
        "real_uncond": uncond,
        "real_guidance": dmd_gradient.GUIDANCE,
        "weight": weight.expand(shape[0]),
    }
    gradient, aux = dmd_op(x, fake=fake, real=real, return_aux=True, **options)
    found = function(x, fake, real, uncond)
    expect_close(found[:1], (gradient,), ulps=2)
    expect_close(
        [t.to(dtype) for t in found[1:]], [t.to(dtype) for t in (aux.loss, aux.gradient_norm)], ulps=2
    )
    return lambda: function(x, fake, real, uncond)


def with_compiled(case: Case, make) -> Job:
    """A case of benchmarks with one candidate more. The published formulations are launched as they are, from
    Python."""

    def build(device):
        calls, left_out = case.candidates(device), {}
        try:
            with torch.no_grad():
                calls["compiled"] = make(device)
        except Exception as error:
            left_out["compiled"] = reason(error)
        return calls, left_out

    published = tuple(name for name in case.names if name.startswith("published") or name == "float64")
    return Job(case.op, case.shape, case.dtype, build, case.cost, eager=published)


def append_job(shape: rope_append.Shape, dtype: torch.dtype) -> Job:
    build = partial(rope_append.build, shape, dtype)
    case = Case("rope_append", str(shape), dtype, rope_append.NAMES, build, rope_append.cost(shape, dtype))
    return with_compiled(case, partial(compiled_append, shape, dtype))


def evict_job(grid, heads: int, head_dim: int, dtype: torch.dtype, state: str) -> Job:
    build = partial(ema_evict.build, grid, heads, head_dim, dtype, state)
    n, frames = grid[0] * grid[1], ema_evict.SINK_FRAMES
    cost = floors.ema_evict(
        batch=1,
        sink_frames=frames,
        frame_tokens=n,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        temporal_pairs=RoPE3D.wan(head_dim).temporal_pairs,
        state=state,
    )
    shape = f"{frames} frames of {grid[0]}x{grid[1]}, state {state} [1, {frames * n}, {heads}, {head_dim}]"
    case = Case("ema_evict", shape, dtype, ema_evict.NAMES, build, cost)
    return with_compiled(case, partial(compiled_evict, grid, heads, head_dim, dtype))


def dmd_job(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Job:
    cost = floors.dmd_gradient(shape, dtype, real_uncond=True, weight_elements=shape[0])
    build = partial(dmd_gradient.build, shape, dtype)
    case = Case("dmd_gradient", f"{name} {list(shape)}", dtype, dmd_gradient.NAMES, build, cost)
    return with_compiled(case, partial(compiled_dmd, shape, dtype))


def layer_job(what: str, shape: layer.Layer) -> Job:
    """Launched from Python throughout: planning is part of it."""
    case = layer.case(what, shape)
    return Job.of(case, eager=case.names)


def jobs(tiny: bool = False, quick: bool = False) -> list[Job]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if tiny:
        small = rope_append.Shape("tiny", grid=(2, 3), heads=2, head_dim=32)
        return [
            append_job(small, bf16),
            evict_job((2, 3), 2, 32, bf16, "compensated"),
            dmd_job("tiny", (2, 3, 4, 5, 6), bf16),
            layer_job("repeat forward", layer.Layer((2, 3), bf16, heads=2, head_dim=32)),
        ]
    wan = rope_append.Shape
    found = [
        append_job(wan("Wan-1.3B chunk"), bf16),
        evict_job((30, 52), 12, 128, bf16, "compensated"),
        dmd_job("Wan 480x832, 21 frames", (1, 21, 16, 60, 104), bf16),
        *(
            layer_job(what, layer.Layer((30, 52), bf16))
            for what in ("repeat forward", "update with norm and RoPE")
        ),
    ]
    if quick:
        return found
    return found + [
        append_job(wan("Wan-1.3B frame", frames=1), bf16),
        append_job(wan("Wan-14B chunk", heads=40), bf16),
        append_job(wan("Wan-1.3B chunk, 720p", grid=(45, 80)), bf16),
        append_job(wan("Wan-1.3B chunk"), fp32),
        evict_job((30, 52), 40, 128, bf16, "compensated"),
        evict_job((45, 80), 12, 128, bf16, "compensated"),
        evict_job((30, 52), 12, 128, bf16, "float32"),
        evict_job((30, 52), 12, 128, bf16, "published"),
        dmd_job("Wan 480x832, 21 frames", (1, 21, 16, 60, 104), fp32),
        dmd_job("Wan 480x832, batch of 4", (4, 21, 16, 60, 104), bf16),
        dmd_job("Wan 720x1280, batch of 4", (4, 21, 16, 90, 160), bf16),
        layer_job("repeat forward", layer.Layer((30, 52), bf16, heads=40)),
    ]


def main(arguments=None) -> None:
    options = Options.parse(arguments)
    run_jobs(jobs(options.tiny, options.quick), options, measured_roof(options))


if __name__ == "__main__":
    main()
