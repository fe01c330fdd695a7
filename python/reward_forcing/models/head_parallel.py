"""Head-parallel attention (DeepSpeed-Ulysses, arXiv 2309.14509): tokens of a sample are spread over ranks,
and exchanged for heads around self-attention. A rank's cache holds its own heads alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._check import expect


class HeadParallel:
    """The exchange over one dimension of a mesh.

    RMSNorm spans all heads of a token, so q and k are normalised before they are exchanged. Every rank of the
    group computes the same loss on the gathered output; ``gather`` therefore sums gradients in backward, and
    the mean of the ranks' gradients is the gradient of one process.

    Args:
        mesh: one-dimensional; its ranks share the samples.
        heads: of the model; a multiple of the mesh's size.
    """

    def __init__(self, mesh: DeviceMesh, heads: int):
        self._share(mesh.get_group(), mesh.size(), mesh.get_local_rank(), heads)

    @classmethod
    def alone(cls, size: int, heads: int) -> HeadParallel:
        """One rank's share without the others, for its bytes: nothing is sent, and what would be received is
        not written."""
        parallel = cls.__new__(cls)
        parallel._share(None, size, 0, heads)
        return parallel

    def _share(self, group: dist.ProcessGroup | None, size: int, rank: int, heads: int) -> None:
        self.group, self.size, self.rank = group, size, rank
        fits = heads % size == 0
        expect(fits, "HeadParallel", "heads", f"a multiple of {size} ranks", heads)
        self.heads = heads // size

    def split(self, x: Tensor, frames: int) -> Tensor:
        """This rank's share of every frame: ``[B, F * n, dim]`` -> ``[B, F * n / ranks, dim]``."""
        x = x.unflatten(1, (frames, -1))
        fits = x.shape[2] % self.size == 0
        expect(fits, "HeadParallel", "x", f"a multiple of {self.size} tokens a frame", x.shape[2])
        return x.chunk(self.size, dim=2)[self.rank].flatten(1, 2)

    def gather(self, x: Tensor, frames: int) -> Tensor:
        """The whole of what ``split`` spread: ``[B, F * n / ranks, dim]`` -> ``[B, F * n, dim]``."""
        parts = _Gather.apply(x, self.group, self.size, self.rank).unflatten(
            2, (frames, -1)
        )  # [P, B, F, m, dim]
        return parts.permute(1, 2, 0, 3, 4).flatten(1, 3)

    def own_heads(self, x: Tensor) -> Tensor:
        """This rank's heads of what every rank has: ``[B, N, H, D]`` -> ``[B, N, H / ranks, D]``."""
        return x.unflatten(2, (self.size, self.heads))[:, :, self.rank]

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """``[B, F * n / ranks, H, D]`` -> ``[B, F * n, H / ranks, D]``."""
        x = x.unflatten(2, (self.size, self.heads)).unflatten(1, (frames, -1))  # [B, F, m, P, h, D]
        x = _Exchange.apply(x.permute(3, 0, 1, 2, 4, 5), self.group)  # [P, B, F, m, h, D]
        return x.permute(1, 2, 0, 3, 4, 5).flatten(1, 3)

    def to_tokens(self, y: Tensor, frames: int) -> Tensor:
        """``[B, F * n, H / ranks, D]`` -> ``[B, F * n / ranks, H, D]``."""
        y = y.unflatten(1, (frames, self.size, -1))  # [B, F, P, m, h, D]
        y = _Exchange.apply(y.permute(2, 0, 1, 3, 4, 5), self.group)  # [P, B, F, m, h, D]
        return y.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def parallelize_heads(model, mesh: DeviceMesh) -> None:
    """Spread a transformer's tokens and heads over a mesh; its parameters stay whole on every rank."""
    share_heads(model, HeadParallel(mesh, model.config.num_heads))


def share_heads(model, parallel: HeadParallel) -> None:
    """Let a transformer and its blocks compute one rank's share."""
    model.parallel = parallel
    for block in model.blocks:
        block.self_attn.parallel = parallel


class _Exchange(torch.autograd.Function):
    """All-to-all over the first dimension; its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        if group is not None:
            dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Exchange.apply(grad, ctx.group), None


class _Gather(torch.autograd.Function):
    """``[...]`` -> ``[ranks, ...]``; the backward sums over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, group, size: int, rank: int) -> Tensor:
        ctx.group, ctx.rank = group, rank
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
        x = x.contiguous()
        if group is not None:
            dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        if ctx.group is not None:
            dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rank], None, None, None
