"""Error of each op in each dtype against the float64 oracle, beside eager PyTorch in the same dtype on the
same inputs.

    python benchmarks/accuracy.py         # writes benchmarks/results/accuracy.json

Every figure is a relative L2 error: the norm of the difference over the norm of the oracle's result. Inputs
are rounded to the dtype first, so that the oracle sees exactly what the op sees. Eager is the oracle's own
code (plain PyTorch) run in the dtype.
"""

import json
from pathlib import Path

import torch

import rf_kernels as rf
from rf_kernels.reference import dmd_gradient as dmd_reference
from rf_kernels.reference import ema_evict as ema_reference
from rf_kernels.reference import rope_append as rope_reference
from rf_kernels.reference import sink_window_attention as attention_reference
from rf_kernels.testing import relative_l2

RESULT = Path(__file__).resolve().parents[1] / "benchmarks/results/accuracy.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GRID, FRAMES, LENGTH, HEADS, HEAD_DIM = (5, 8), 3, 9, 4, 128
FRAME_TOKENS = GRID[0] * GRID[1]
EVICTIONS, ALPHA = 100, 0.999


def draw(generator, dtype, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def widened(values):
    return [t.double() for t in values]


def rope_append(dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (draw(generator, dtype, 1, FRAMES * FRAME_TOKENS, HEADS, HEAD_DIM) for _ in range(3))
    weights = {name: 1 + 0.2 * draw(generator, dtype, HEADS * HEAD_DIM) for name in ("q_weight", "k_weight")}
    slots = torch.arange(FRAMES, dtype=torch.int32)
    # Far into a stream, where an angle formed in float32 would be off by whole radians.
    frames = range(10**6, 10**6 + FRAMES)

    def run(function, cast, **more):
        caches = [torch.zeros_like(cast(k)) for _ in range(2)]
        angles, axes = rf.RoPE3D.wan(HEAD_DIM).table([frames, *map(range, GRID)], dtype=caches[0].dtype)
        options = {name: cast(weight) for name, weight in weights.items()}
        out = function(
            cast(q), cast(k), cast(v), *caches, slots=slots, angles=angles, axes=axes, **options, **more
        )
        return out, caches[0]

    exact = run(rope_reference.rope_append, torch.Tensor.double)
    ours, eager = run(rf.rope_append, lambda t: t), run(rope_reference.rope_append, lambda t: t)
    for i, quantity in enumerate(("q", "k in the cache")):
        yield quantity, relative_l2(ours[i], exact[i]), relative_l2(eager[i], exact[i])


def sink_window_attention(dtype):
    generator = torch.Generator().manual_seed(2)
    q, grad = (draw(generator, dtype, 1, FRAMES * FRAME_TOKENS, HEADS, HEAD_DIM) for _ in range(2))
    k, v = (draw(generator, dtype, 1, LENGTH * FRAME_TOKENS, HEADS, HEAD_DIM) for _ in range(2))

    def run(function, cast):
        inputs = [cast(t).clone().requires_grad_() for t in (q, k, v)]
        out, lse = function(*inputs, return_lse=True)
        gradients = torch.autograd.grad(out, inputs, cast(grad))
        return out.detach(), lse.detach(), *gradients

    exact = run(attention_reference.sink_window_attention, torch.Tensor.double)
    ours = run(rf.sink_window_attention, lambda t: t)
    eager = run(attention_reference.sink_window_attention, lambda t: t)
    for i, quantity in enumerate(("out", "log-sum-exp", "dq", "dk", "dv")):
        yield quantity, relative_l2(ours[i], exact[i]), relative_l2(eager[i], exact[i])


def ema_evict(dtype):
    """What attention reads, and what is carried on, after a hundred evictions of keys that are turned each
    time."""
    rope, sink_frames = rf.RoPE3D.wan(HEAD_DIM), 3
    tokens = sink_frames * FRAME_TOKENS
    table = torch.from_numpy(rope.temporal_table([-3, 30])).expand(sink_frames, 2, rope.temporal_pairs, 2)
    schedule = torch.tensor([[0, 1, sink_frames + j] for j in range(sink_frames)], dtype=torch.int32)

    def run(function, cast, state):
        generator = torch.Generator().manual_seed(3)
        caches = [cast(draw(generator, dtype, 1, 2 * tokens, HEADS, HEAD_DIM)) for _ in range(2)]
        half = caches[0].dtype.itemsize == 2
        wide = torch.float32 if half and state == "float32" else caches[0].dtype
        k_state, k_state_lo, v_state = caches[0][:, :tokens].to(wide, copy=True), None, None
        if half and state == "compensated":
            k_state_lo, v_state = torch.zeros_like(k_state), torch.zeros_like(k_state)
        elif half and state == "float32":
            v_state = caches[1][:, :tokens].to(wide, copy=True)
        turns = table.to(torch.float64 if caches[0].dtype == torch.float64 else torch.float32).contiguous()
        for _ in range(EVICTIONS):
            for cache in caches:
                cache[:, tokens:] = cast(draw(generator, dtype, 1, tokens, HEADS, HEAD_DIM))
            function(
                *caches,
                k_state,
                k_state_lo,
                v_state,
                schedule=schedule,
                turns=turns,
                alpha=ALPHA,
                frame_tokens=FRAME_TOKENS,
                temporal=rope.temporal_dims,
                state=state,
            )
        kept = k_state.double() + (0 if k_state_lo is None else k_state_lo.double())
        return caches[0][:, :tokens], kept, caches[1][:, :tokens]

    exact = run(ema_reference.ema_evict, torch.Tensor.double, "published")
    eager = run(ema_reference.ema_evict, lambda t: t, "published")
    states = ("compensated", "float32", "published") if dtype.itemsize == 2 else ("published",)
    for state in states:
        ours = run(rf.ema_evict, lambda t: t, state)
        note = f', state "{state}"' if dtype.itemsize == 2 else ""
        for i, quantity in enumerate(("sink keys", "key state", "sink values")):
            yield quantity + note, relative_l2(ours[i], exact[i]), relative_l2(eager[i], exact[i])


def dmd_gradient(dtype):
    generator = torch.Generator().manual_seed(4)
    x, fake, real, uncond = (draw(generator, dtype, 2, 3, 16, 12, 20) for _ in range(4))
    weight = torch.tensor([0.7, 1.3], dtype=torch.float64)

    def reference_(cast):
        return dmd_reference.dmd_gradient(
            cast(x),
            fake=cast(fake),
            real=cast(real),
            real_uncond=cast(uncond),
            real_guidance=3.0,
            weight=weight,
        )

    # In float16 the gradient of a mean is below the range: "none" is what can be compared in every dtype.
    def reference_none(cast):
        return dmd_reference.dmd_gradient(
            cast(x),
            fake=cast(fake),
            real=cast(real),
            real_uncond=cast(uncond),
            real_guidance=3.0,
            reduction="none",
        )

    same = {"fake": fake, "real": real, "real_uncond": uncond, "real_guidance": 3.0}
    gradient = rf.dmd_gradient(x, **same, options=rf.DMDOptions(reduction="none"))
    _, aux = rf.dmd_gradient(x, **same, weight=weight, return_aux=True)
    exact, eager = reference_none(torch.Tensor.double), reference_none(lambda t: t)
    yield "gradient", relative_l2(gradient, exact.gradient), relative_l2(eager.gradient, exact.gradient)
    exact, eager = reference_(torch.Tensor.double), reference_(lambda t: t)
    for quantity in ("loss", "gradient_norm", "normalizer"):
        ours, theirs, truth = (getattr(r, quantity) for r in (aux, eager, exact))
        yield quantity.replace("_", " "), relative_l2(ours, truth), relative_l2(theirs, truth)


OPS = (rope_append, ema_evict, sink_window_attention, dmd_gradient)


def table(ops=OPS) -> list[dict]:
    """op, quantity, dtype, error of ours, error of eager PyTorch."""
    return [
        {"op": op.__name__, "quantity": quantity, "dtype": str(dtype)[6:], "ours": ours, "eager": eager}
        for op in ops
        for dtype in DTYPES
        for quantity, ours, eager in op(dtype)
    ]


def main() -> None:
    rows = table()
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['op']:22} {row['dtype']:9} {row['quantity']:36} {row['ours']:.1e}  eager"
            f" {row['eager']:.1e}"
        )


if __name__ == "__main__":
    main()
