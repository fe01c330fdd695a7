"""sink_window_attention beside PyTorch's SDPA, and one layer's repeat forward beside the published path.

    PYTHONPATH=. python benchmarks/bench_sink_window_attention.py          one line a job, candidates in turn (rf_kernels.bench)
    python -m pytest benchmarks/bench_sink_window_attention.py --benchmark-only    the same candidates under pytest-benchmark

Jobs:
- attention: the chunk's queries over the valid prefix of a cache (a view of one layer of a larger buffer), beside
  `sdpa`, F.scaled_dot_product_attention on contiguous [B, H, S, D] tensors made in advance.
- whole: a training sequence, a sink and a window per chunk; beside `masked_sdpa`, one SDPA with the mask of the same sets.
- repeat_forward: RMSNorm, RoPE, the write of k and v, attention, with the window full. Beside `published` (the keys of sink and
  window are concatenated and rotated in every forward) and beside `sdpa`, attention alone on ready-made contiguous tensors.
No number without agreement: the candidates that do the same job are compared before anything is timed.
"""

import argparse
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import rf_kernels as rf
from rf_kernels import bench
from rf_kernels.reference.published import attention, rope
from rf_kernels.testing import relative_l2


@dataclass(frozen=True)
class Shape:
    """A chunk of ``frames`` against ``sink + window`` frames of ``grid`` tokens."""

    name: str
    grid: tuple[int, int] = (30, 52)
    frames: int = 3
    sink_frames: int = 3
    window_frames: int = 6
    heads: int = 12
    head_dim: int = 128

    @property
    def frame_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def queries(self):
        return self.frames * self.frame_tokens

    @property
    def kv_tokens(self):
        return (self.sink_frames + self.window_frames) * self.frame_tokens

    def __str__(self):
        return f"{self.name} [1, {self.queries} x {self.kv_tokens}, {self.heads}, {self.head_dim}]"


SHAPES = {
    "cpu": [Shape("quarter chunk", grid=(15, 26)), Shape("quarter frame", grid=(15, 26), frames=1)],
    "cuda": [Shape("Wan-1.3B chunk"), Shape("Wan-1.3B frame", frames=1), Shape("Wan-1.3B chunk, 3 heads", heads=3)],
}
DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16, torch.float16]}
CHUNKS = 5  # of the training sequence


def heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous()


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # The roundings in between (norm, rotation, probabilities, output) are at most four units in the last place.
    assert relative_l2(theirs, ours) <= 4 * torch.finfo(ours.dtype).eps


def attention_job(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    q = torch.randn(1, shape.queries, shape.heads, shape.head_dim, device=device).to(dtype)
    slots = shape.kv_tokens + shape.frame_tokens
    cache = torch.randn(1, 2, 2, slots, shape.heads, shape.head_dim, device=device).to(dtype)  # batch, layer, (k, v)
    k, v = cache[:, 1, 0], cache[:, 1, 1]
    ready = [heads_first(t) for t in (q, k[:, : shape.kv_tokens], v[:, : shape.kv_tokens])]
    calls = {
        "sink_window_attention": lambda: rf.sink_window_attention(q, k, v, kv_tokens=shape.kv_tokens),
        "sdpa": lambda: F.scaled_dot_product_attention(*ready),
    }
    agree(calls["sink_window_attention"](), calls["sdpa"]().transpose(1, 2))
    return calls


def whole_options(shape: Shape) -> dict:
    return {
        "chunk_ends": [shape.queries * (i + 1) for i in range(CHUNKS)],
        "num_sink_tokens": shape.sink_frames * shape.frame_tokens,
        "num_window_tokens": shape.window_frames * shape.frame_tokens,
    }


def whole_job(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    tokens = CHUNKS * shape.queries
    q, k, v = (torch.randn(1, tokens, shape.heads, shape.head_dim, device=device).to(dtype) for _ in range(3))
    options = whole_options(shape)
    ready = [heads_first(t) for t in (q, k, v)]
    key = torch.arange(tokens, device=device)
    end = (key // shape.queries + 1).unsqueeze(1) * shape.queries
    mask = (key < end) & ((key < options["num_sink_tokens"]) | (key >= end - options["num_window_tokens"]))
    calls = {
        "sink_window_attention": lambda: rf.sink_window_attention(q, k, v, **options),
        "masked_sdpa": lambda: F.scaled_dot_product_attention(*ready, attn_mask=mask),
    }
    agree(calls["sink_window_attention"](), calls["masked_sdpa"]().transpose(1, 2))
    return calls


def repeat_forward_job(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    """The window is full and the positions of the sink are its own: the chunk is the last of the first L frames."""
    length, width = shape.sink_frames + shape.window_frames, shape.heads * shape.head_dim
    first, split = length - shape.frames, shape.sink_frames * shape.frame_tokens
    place = slice(first * shape.frame_tokens, length * shape.frame_tokens)
    q, k, v = (torch.randn(1, shape.queries, shape.heads, shape.head_dim, device=device).to(dtype) for _ in range(3))
    raw = torch.randn(2, 1, shape.kv_tokens, shape.heads, shape.head_dim, device=device).to(dtype)
    weights = [torch.randn(width, device=device).to(dtype) for _ in range(2)]
    slots = torch.arange(first, length, dtype=torch.int32, device=device)
    wan = rf.RoPE3D.wan(shape.head_dim)
    spatial = [*map(range, shape.grid)]
    angles, axes = wan.table([range(first, length), *spatial], dtype=dtype, device=device)
    every_frame = wan.table([range(length), *spatial], dtype=dtype, device=device)
    rotated = torch.stack([rf.rope(raw[0], angles=every_frame[0], axes=every_frame[1]), raw[1]])
    norms = [attention.RMSNorm(width).to(device=device, dtype=dtype).requires_grad_(False) for _ in weights]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.copy_(weight)
    table = rope.rope_table(shape.head_dim, device=device)

    def ours():
        q_out = rf.rope_append(
            q, k, v, *rotated, slots=slots, angles=angles, axes=axes, q_weight=weights[0], k_weight=weights[1]
        )
        return rf.sink_window_attention(q_out, *rotated)

    def published():
        q_out, k_out = (norm(x.flatten(2)).view(x.shape) for norm, x in zip(norms, (q, k), strict=True))
        raw[0][:, place], raw[1][:, place] = k_out, v
        keys, values = (torch.cat([t[:, :split], t[:, split:]], dim=1) for t in raw)
        q_out = rope.rope_apply(q_out, (shape.frames, *shape.grid), table, first)
        keys = rope.rope_apply(keys, (length, *shape.grid), table)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q_out, keys, values))).transpose(1, 2)

    agree(ours(), published())
    ready = [heads_first(t) for t in (q, *rotated)]
    return {"repeat_forward": ours, "published": published, "sdpa": lambda: F.scaled_dot_product_attention(*ready)}


JOBS = {"attention": attention_job, "whole": whole_job, "repeat_forward": repeat_forward_job}


def cost(job: str, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """FLOPs of the attention and the bytes of its q, k, v and output."""
    options = whole_options(shape) if job == "whole" else {"kv_tokens": shape.kv_tokens}
    queries = CHUNKS * shape.queries if job == "whole" else shape.queries
    return rf.sink_window_attention.cost(
        1, queries, shape.heads, shape.head_dim, element_size=dtype.itemsize, **options
    )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANDIDATES = [("attention", "sink_window_attention"), ("attention", "sdpa")]
CANDIDATES += [("whole", "sink_window_attention"), ("whole", "masked_sdpa")]
CANDIDATES += [("repeat_forward", name) for name in ("repeat_forward", "published", "sdpa")]


@pytest.mark.parametrize(("job", "name"), CANDIDATES)
@pytest.mark.parametrize("dtype", DTYPES[DEVICE], ids=str)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_bench(benchmark, shape, dtype, job, name):
    torch.manual_seed(0)
    call = JOBS[job](shape, dtype, DEVICE)[name]

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{job} {shape} {dtype}"
    benchmark.extra_info |= cost(job, shape, dtype) | {"device": DEVICE}
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per candidate")
    parser.add_argument("--job", choices=JOBS, nargs="*", default=list(JOBS))
    args = parser.parse_args()
    print(bench.environment())
    kind = torch.device(args.device).type
    for job in args.job:
        for dtype in DTYPES[kind]:
            for shape in SHAPES[kind]:
                torch.manual_seed(0)
                timings = bench.measure(JOBS[job](shape, dtype, args.device), device=args.device, seconds=args.seconds)
                facts = cost(job, shape, dtype)
                result = bench.row(job, str(shape), dtype, timings, flops=facts["flops"], nbytes=facts["bytes"])
                print(bench.line(result), flush=True)


if __name__ == "__main__":
    main()
