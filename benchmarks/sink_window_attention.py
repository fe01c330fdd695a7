"""Cases of ``sink_window_attention``.

Streaming: a chunk's queries over the valid prefix of one layer of a cache.
- concatenated: what the published path does once its keys are rotated: sink and window concatenated, then
  PyTorch's SDPA.
- sdpa: SDPA alone, on contiguous [B, H, S, D] tensors made in advance: no path can be faster on PyTorch's
  kernels.
Whole sequence: training, a sink and a window per chunk, forward and forward with backward.
- masked_sdpa: one SDPA with the mask of the same key sets.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rf_kernels.ops.sink_window_attention import sink_window_attention

from . import floors
from .case import Case, agree

# Probabilities and the output are rounded, and rows are merged: at most four units in the last place.
ULPS = 4


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
    chunks: int = 5  # of the training sequence

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def queries(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def kv_tokens(self) -> int:
        return (self.sink_frames + self.window_frames) * self.frame_tokens

    @property
    def whole(self) -> dict:
        return {
            "chunk_ends": [self.queries * (i + 1) for i in range(self.chunks)],
            "num_sink_tokens": self.sink_frames * self.frame_tokens,
            "num_window_tokens": self.window_frames * self.frame_tokens,
        }


def heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous()


def build_stream(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    q = torch.randn(1, shape.queries, shape.heads, shape.head_dim, device=device).to(dtype)
    slots = shape.kv_tokens + shape.frame_tokens
    # batch, layer, (k, v)
    cache = torch.randn(1, 2, 2, slots, shape.heads, shape.head_dim, device=device).to(dtype)
    k, v = cache[:, 1, 0], cache[:, 1, 1]
    valid, split = shape.kv_tokens, shape.sink_frames * shape.frame_tokens
    ready = [heads_first(t) for t in (q, k[:, :valid], v[:, :valid])]

    def concatenated():
        keys, values = (torch.cat([t[:, :split], t[:, split:valid]], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, keys, values))).transpose(1, 2)

    calls = {
        "sink_window_attention": lambda: sink_window_attention(q, k, v, kv_tokens=valid),
        "concatenated": concatenated,
        "sdpa": lambda: F.scaled_dot_product_attention(*ready).transpose(1, 2),
    }
    agree(calls, ulps=ULPS)
    return calls


def build_whole(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> dict:
    tokens = shape.chunks * shape.queries
    q, k, v, g = (
        torch.randn(1, tokens, shape.heads, shape.head_dim, device=device).to(dtype) for _ in range(4)
    )
    ready, ready_g = [heads_first(t) for t in (q, k, v)], heads_first(g)
    key = torch.arange(tokens, device=device)
    end = (key // shape.queries + 1).unsqueeze(1) * shape.queries
    num_sink_tokens, window = shape.whole["num_sink_tokens"], shape.whole["num_window_tokens"]
    mask = (key < end) & ((key < num_sink_tokens) | (key >= end - window))

    def ours(*qkv):
        return sink_window_attention(*qkv, **shape.whole)

    def masked(*qkv):
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask)

    def forward(function, inputs, first):
        out = function(*inputs)
        return out if first else out.transpose(1, 2)

    def forward_backward(function, inputs, gradient, first):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = function(*inputs)
        results = [out, *torch.autograd.grad(out, inputs, gradient)]
        return results if first else [t.transpose(1, 2) for t in results]

    if backward:
        calls = {
            "sink_window_attention": partial(forward_backward, ours, (q, k, v), g, True),
            "masked_sdpa": partial(forward_backward, masked, ready, ready_g, False),
        }
    else:
        calls = {
            "sink_window_attention": partial(forward, ours, (q, k, v), True),
            "masked_sdpa": partial(forward, masked, ready, False),
        }
    agree(calls, ulps=ULPS)
    return calls


def streaming_case(shape: Shape, dtype: torch.dtype, device: str, quick: bool) -> Case:
    label = f"{shape.name} [1, {shape.queries} x {shape.kv_tokens}, {shape.heads}, {shape.head_dim}]"
    cost = floors.sink_window_attention(
        1, shape.queries, shape.heads, shape.head_dim, kv_tokens=shape.kv_tokens, element_size=dtype.itemsize
    )
    names = ("sink_window_attention", "concatenated", "sdpa")
    return Case(
        "sink_window_attention", label, dtype, names, partial(build_stream, shape, dtype), cost, device, quick
    )


def whole_case(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> Case:
    tokens = shape.chunks * shape.queries
    what = "forward and backward" if backward else "forward"
    label = f"{shape.name}, {shape.chunks} chunks, {what} [1, {tokens}, {shape.heads}, {shape.head_dim}]"
    options = {"element_size": dtype.itemsize, **shape.whole}
    cost = floors.sink_window_attention(1, tokens, shape.heads, shape.head_dim, **options)
    if backward:
        more = floors.sink_window_attention(1, tokens, shape.heads, shape.head_dim, backward=True, **options)
        cost = {name: cost[name] + more[name] for name in cost}
    names = ("sink_window_attention", "masked_sdpa")
    return Case(
        "sink_window_attention",
        label,
        dtype,
        names,
        partial(build_whole, shape, dtype, backward),
        cost,
        device,
    )


def cases() -> list[Case]:
    quarter = Shape("480x832 at half resolution, chunk", grid=(15, 26))
    found = [
        streaming_case(shape, dtype, "cpu", quick and dtype == torch.float32)
        for dtype in (torch.float32, torch.bfloat16)
        for shape, quick in ((quarter, True), (Shape("the same, one frame", grid=(15, 26), frames=1), False))
    ]
    small = Shape("training, half resolution, 3 heads", grid=(15, 26), heads=3, chunks=4)
    found += [whole_case(small, torch.float32, backward, "cpu") for backward in (False, True)]
    large = [
        Shape("Wan-1.3B chunk"),
        Shape("Wan-1.3B frame", frames=1),
        Shape("Wan-1.3B chunk, a quarter of the heads", heads=3),
        Shape("Wan-14B chunk", heads=40),
    ]
    found += [streaming_case(shape, torch.bfloat16, "cuda", i == 0) for i, shape in enumerate(large)]
    training = Shape("training, Wan-1.3B", chunks=7)
    found += [whole_case(training, torch.bfloat16, backward, "cuda") for backward in (False, True)]
    return found
