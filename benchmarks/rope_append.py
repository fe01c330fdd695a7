"""Cases of ``rope_append``. All candidates end with the new k and v in their cache slots and the new q in
hand.

- rope_append: one pass.
- published: RMSNorm with its rounding before the weight, rotation in complex128 with the published table; the
  chunk's q and k alone.
- published_window: the same, but the keys of the whole window are rotated, as the published path does in
  every forward.
- eager: the best of plain PyTorch: fused rms_norm, rotation in complex64 with a table made in advance, slice
  assignments.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rf_kernels.ops.rope_append import rope_append
from rf_kernels.positions import RoPE3D

from . import floors
from .case import Case, agree
from .published import attention, rope

NAMES = ("rope_append", "published", "published_window", "eager")


@dataclass(frozen=True)
class Shape:
    """A chunk of a stream whose cache holds ``length`` frames."""

    name: str
    frames: int = 3
    grid: tuple[int, int] = (30, 52)
    heads: int = 12
    head_dim: int = 128
    length: int = 9

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def __str__(self):
        return f"{self.name} [1, {self.tokens}, {self.heads}, {self.head_dim}]"


def published_norms(weights: list[torch.Tensor]) -> list[attention.RMSNorm]:
    """The published RMSNorm with these weights, without gradients."""
    norms = []
    for weight in weights:
        norm = attention.RMSNorm(weight.numel()).to(weight).requires_grad_(False)
        norm.weight.copy_(weight)
        norms.append(norm)
    return norms


def turns(grid: tuple[int, int, int], head_dim: int, start_frame: int, device: str) -> torch.Tensor:
    """The published table as complex64 ``[1, tokens, 1, D/2]``, made in advance for ``rotate``."""
    table = rope.rope_table(head_dim, device=device)
    tokens = grid[0] * grid[1] * grid[2]
    unit = torch.ones(1, tokens, 1, head_dim, dtype=torch.float64, device=device)
    unit[..., 1::2] = 0  # pairs (1, 0): the rotation reads off its own table
    turned = rope.rope_apply(unit, grid, table, start_frame)
    return torch.view_as_complex(turned.unflatten(-1, (-1, 2))).to(torch.complex64)


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """x ``[B, N, H, D]`` by the angles of ``turns``, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def build(shape: Shape, dtype: torch.dtype, device: str) -> dict:
    width = shape.heads * shape.head_dim
    # as it comes out of a fused projection
    qkv = torch.randn(1, shape.tokens, 3 * width, device=device).to(dtype)
    q, k, v = (t.unflatten(-1, (shape.heads, shape.head_dim)) for t in qkv.chunk(3, dim=-1))
    capacity = shape.length * shape.frame_tokens
    caches = torch.zeros(2, 1, capacity, shape.heads, shape.head_dim, dtype=dtype, device=device)
    weights = [torch.randn(width, device=device).to(dtype) for _ in range(2)]
    first = shape.length - shape.frames
    positions = [range(first, shape.length), *map(range, shape.grid)]
    slots = torch.arange(first, shape.length, dtype=torch.int32, device=device)
    angles, axes = RoPE3D.wan(shape.head_dim).table(positions, dtype=dtype, device=device)
    place = slice(first * shape.frame_tokens, capacity)

    norms = published_norms(weights)
    table = rope.rope_table(shape.head_dim, device=device)
    grid = (shape.frames, *shape.grid)
    turn = turns(grid, shape.head_dim, first, device)

    def write(q_out, k_out):
        caches[0][:, place] = k_out
        caches[1][:, place] = v
        return q_out, caches[0], caches[1]

    def ours():
        options = {
            "slots": slots,
            "angles": angles,
            "axes": axes,
            "q_weight": weights[0],
            "k_weight": weights[1],
        }
        return rope_append(q, k, v, *caches, **options), caches[0], caches[1]

    def normalised():
        return (norm(x.flatten(2)).view(x.shape) for norm, x in zip(norms, (q, k), strict=True))

    def published():
        return write(*(rope.rope_apply(x, grid, table, first) for x in normalised()))

    def published_window():
        q_out, k_out = normalised()
        write(q_out, k_out)
        rope.rope_apply(caches[0], (shape.length, *shape.grid), table)
        return rope.rope_apply(q_out, grid, table, first), caches[0], caches[1]

    def eager():
        rows = ((q, weights[0]), (k, weights[1]))
        return write(
            *(rotate(F.rms_norm(x.flatten(2), (width,), w, 1e-6).view(x.shape), turn) for x, w in rows)
        )

    # Two roundings to the dtype more than ours, each half a unit in the last place.
    agree({"rope_append": ours, "published": published, "eager": eager}, ulps=2)
    return {"rope_append": ours, "published": published, "published_window": published_window, "eager": eager}


def cost(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    return floors.rope_append(
        batch=1,
        tokens=shape.tokens,
        q_heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        pairs=RoPE3D.wan(shape.head_dim).pairs,
    )


def cases() -> list[Case]:
    shapes = [
        (Shape("Wan-1.3B chunk"), True),
        (Shape("Wan-1.3B frame", frames=1), False),
        (Shape("Wan-1.3B chunk, a quarter of the heads", heads=3), False),
        (Shape("Wan-14B chunk", heads=40), False),
    ]
    return [
        Case("rope_append", str(s), dtype, NAMES, partial(build, s, dtype), cost(s, dtype), quick=quick)
        for dtype in (torch.float32, torch.bfloat16)
        for s, quick in shapes
    ]
