"""What a call costs beside its arithmetic: tiny tensors on one thread of the CPU, side by side with PyTorch.

    python -m benchmarks.small_calls [--seconds N] [--calls N]

The table of docs/architecture.md, "The cost of a call". `attention` is `sink_window_attention` beside
`F.scaled_dot_product_attention` on the same tensors; `layer` is `Chunk.attend` (norm, RoPE, write, attention)
beside the same in eager PyTorch.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rf_kernels as rf

from .timing import measure

#: Queries, keys, heads, head dim.
SHAPES = ((8, 16, 1, 16), (6, 18, 2, 32), (32, 64, 2, 32), (64, 256, 4, 64))


def attention(queries: int, keys: int, heads: int, dim: int) -> dict:
    q, k, v = (torch.randn(1, n, heads, dim) for n in (queries, keys, keys))
    return {
        "ours": lambda: rf.sink_window_attention(q, k, v, kv_tokens=keys),
        "PyTorch": lambda: sdpa(q, k, v),
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def layer(queries: int, keys: int, heads: int, dim: int) -> dict:
    """One frame a chunk; the window is full and nothing leaves."""
    frames = keys // queries
    spec = rf.CacheSpec(
        layers=1,
        batch=1,
        heads=heads,
        head_dim=dim,
        grid=(1, queries),
        sink_frames=0,
        window_frames=frames,
        rope=rf.RoPE3D.wan(dim),
        dtype=torch.float32,
        device="cpu",
    )
    cache = rf.SinkWindowCache(spec, sink=rf.NoSink())
    q, k, v = torch.randn(3, 1, queries, heads, dim)
    norms = [torch.nn.RMSNorm(heads * dim, eps=1e-6) for _ in range(2)]
    for _ in range(frames - 1):
        with cache.chunk(1) as chunk:
            chunk.attend(0, q, k, v)
    chunk = cache.open(1)
    angles = torch.polar(torch.ones(queries, 1, dim // 2), torch.randn(queries, 1, dim // 2))
    k_slots, v_slots = torch.randn(2, 1, frames * queries, heads, dim)
    own = slice(-queries, None)

    def rotated(x: Tensor, norm: torch.nn.Module) -> Tensor:
        pairs = torch.view_as_complex(norm(x.flatten(2)).unflatten(-1, (heads, dim // 2, 2)))
        return torch.view_as_real(pairs * angles).flatten(-2)

    def eager() -> Tensor:
        k_slots[:, own] = rotated(k, norms[1])
        v_slots[:, own] = v
        return sdpa(rotated(q, norms[0]), k_slots, v_slots)

    return {"ours": lambda: chunk.attend(0, q, k, v, q_norm=norms[0], k_norm=norms[1]), "PyTorch": eager}


def in_a_row(call: Callable, calls: int) -> Callable:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


@torch.no_grad()
def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate (default 2)")
    parser.add_argument("--calls", type=int, default=1, help="calls in a row (default 1: they take turns)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| queries x keys, heads x dim | `attention` | `layer` |\n| --- | --- | --- |")
    for shape in SHAPES:
        cells = []
        for case in (attention, layer):
            candidates = {name: in_a_row(call, options.calls) for name, call in case(*shape).items()}
            times = measure(candidates, seconds=options.seconds, warmup=20)
            cells.append(f"{times['ours'].p20 / times['PyTorch'].p20:.2f}x")
        queries, keys, heads, dim = shape
        print(f"| {queries} x {keys}, {heads} x {dim} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
