"""rope_append beside the published formulation and the best plain PyTorch, on the same tensors.

    PYTHONPATH=. python benchmarks/bench_rope_append.py           one line a shape, candidates in turn (rf_kernels.bench)
    python -m pytest benchmarks/bench_rope_append.py --benchmark-only    the same candidates under pytest-benchmark

Candidates, all of them ending with the new k and v in their cache slots and the new q in hand:
- rope_append: one pass.
- published: RMSNorm with its rounding before the weight, rotation in complex128 with the table of the published path, for the
  chunk's q and k alone.
- published_window: the same, but the keys of the whole window are rotated, as the published path does in every forward.
- eager: torch's fused rms_norm, rotation in complex64 with a table made in advance, slice assignments.
No number without agreement: the results of ours, published and eager are compared before anything is timed.
"""

import argparse
from dataclasses import dataclass

import pytest
import torch

import rf_kernels as rf
from rf_kernels import bench
from rf_kernels.reference.published import attention, rope
from rf_kernels.testing import relative_l2


@dataclass(frozen=True)
class Shape:
    """A chunk of a stream with a window of ``window`` frames."""

    name: str
    frames: int = 3
    grid: tuple[int, int] = (30, 52)
    heads: int = 12
    head_dim: int = 128
    window: int = 9

    def __str__(self):
        return f"{self.name} [1, {self.frames * self.grid[0] * self.grid[1]}, {self.heads}, {self.head_dim}]"


SHAPES = [
    Shape("Wan-1.3B chunk"),
    Shape("Wan-1.3B frame", frames=1),
    Shape("Wan-1.3B chunk, a quarter of the heads", heads=3),
    Shape("Wan-14B chunk", heads=40),
]
DTYPES = [torch.bfloat16, torch.float32]


def cost(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """FLOPs and floor of bytes: q, k, v read once, q, k, v written once."""
    tokens = shape.frames * shape.grid[0] * shape.grid[1]
    pairs = rf.RoPE3D.wan(shape.head_dim).pairs
    return rf.rope_append.cost(
        batch=1, tokens=tokens, q_heads=shape.heads, head_dim=shape.head_dim, dtype=dtype, pairs=pairs
    )


def candidates(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    """name -> a call that returns (q_out, k_cache, v_cache)."""
    torch.manual_seed(0)
    frame_tokens = shape.grid[0] * shape.grid[1]
    tokens, width = shape.frames * frame_tokens, shape.heads * shape.head_dim
    qkv = torch.randn(1, tokens, 3 * width, device=device).to(dtype)  # as it comes out of a fused projection
    q, k, v = (t.unflatten(-1, (shape.heads, shape.head_dim)) for t in qkv.chunk(3, dim=-1))
    caches = torch.zeros(2, 1, shape.window * frame_tokens, shape.heads, shape.head_dim, dtype=dtype, device=device)
    weights = [torch.randn(width, device=device).to(dtype) for _ in range(2)]
    first = shape.window - shape.frames
    positions = [range(first, shape.window), *map(range, shape.grid)]
    slots = torch.arange(first, shape.window, dtype=torch.int32, device=device)
    angles, axes = rf.RoPE3D.wan(shape.head_dim).table(positions, dtype=dtype, device=device)
    place = slice(first * frame_tokens, shape.window * frame_tokens)

    norms = [attention.RMSNorm(width).to(device=device, dtype=dtype).requires_grad_(False) for _ in weights]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.copy_(weight)
    table = rope.rope_table(shape.head_dim, device=device)
    grid = (shape.frames, *shape.grid)
    unit = torch.ones(1, tokens, 1, shape.head_dim, dtype=torch.float64, device=device)
    unit[..., 1::2] = 0  # pairs (1, 0): the rotation reads off its own table
    turns = torch.view_as_complex(rope.rope_apply(unit, grid, table, first).unflatten(-1, (-1, 2))).to(torch.complex64)

    def write(q_out, k_out):
        caches[0][:, place] = k_out
        caches[1][:, place] = v
        return q_out, caches[0], caches[1]

    def ours():
        q_out = rf.rope_append(
            q, k, v, *caches, slots=slots, angles=angles, axes=axes, q_weight=weights[0], k_weight=weights[1]
        )
        return q_out, caches[0], caches[1]

    def published():
        out = (norm(x.flatten(2)).view(x.shape) for norm, x in zip(norms, (q, k), strict=True))
        return write(*(rope.rope_apply(x, grid, table, first) for x in out))

    def published_window():
        q_out, k_out = (norm(x.flatten(2)).view(x.shape) for norm, x in zip(norms, (q, k), strict=True))
        write(q_out, k_out)
        rope.rope_apply(caches[0], (shape.window, *shape.grid), table)
        return rope.rope_apply(q_out, grid, table, first), caches[0], caches[1]

    def eager():
        out = []
        for x, weight in ((q, weights[0]), (k, weights[1])):
            x = torch.nn.functional.rms_norm(x.flatten(2), (width,), weight, 1e-6).view(x.shape)
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            out.append(torch.view_as_real(pairs * turns).flatten(-2).to(dtype))
        return write(*out)

    calls = {"rope_append": ours, "published": published, "published_window": published_window, "eager": eager}
    agree({name: calls[name] for name in ("rope_append", "published", "eager")})
    return calls


def agree(calls: dict) -> None:
    results = {name: [t.clone() for t in call()] for name, call in calls.items()}
    for name, tensors in results.items():
        for mine, theirs in zip(results["rope_append"], tensors, strict=True):
            # Two roundings to the dtype more than ours, each half a unit in the last place.
            assert relative_l2(theirs, mine) <= 2 * torch.finfo(mine.dtype).eps, name


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["rope_append", "published", "published_window", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bench(benchmark, shape, dtype, name):
    call = candidates(shape, dtype, DEVICE)[name]

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape} {dtype}"
    benchmark.extra_info |= cost(shape, dtype) | {"device": DEVICE}
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per candidate")
    args = parser.parse_args()
    print(bench.environment())
    for dtype in DTYPES:
        for shape in SHAPES:
            timings = bench.measure(candidates(shape, dtype, args.device), device=args.device, seconds=args.seconds)
            facts = cost(shape, dtype)
            result = bench.row("rope_append", str(shape), dtype, timings, flops=facts["flops"], nbytes=facts["bytes"])
            print(bench.line(result))


if __name__ == "__main__":
    main()
