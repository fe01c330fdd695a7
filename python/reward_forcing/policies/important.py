"""Tokens that recent queries asked for (participative compression of Deep Forcing, arXiv 2512.05081)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class ImportantTokens(rf.SinkPolicy):
    """The last ``frames`` sink frames hold C n tokens that matter, the first G are static and move along (the
    deep sink). When frames leave, tokens ``j`` of these slots and of the frames that leave compete by
    ``phi_j = sum_q q . k_j``, over all heads and all queries of the chunk before in its last forward; the C n
    best stay, in each layer and sample, at their positions.

    Args:
        frames: C.
        rephase: of the static frames.
    """

    frames: int = 1
    rephase: bool = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.frames <= spec.sink_frames
        expect(fits, "ImportantTokens", "frames", f"1..{spec.sink_frames} sink frames", self.frames)
        return _ImportantState(self, spec)


class _ImportantState(MemoryState):
    observes, resets = True, False
    absorbing, stays = 1, True

    def __init__(self, policy: ImportantTokens, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.static = spec.sink_frames - policy.frames
        self.allocate("q_sum", torch.promote_types(spec.dtype, torch.float32), tokens=1)
        self.allocate_frames(self.static)

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        groups = q.unflatten(2, (self.spec.heads, -1)).to(self.tensors["q_sum"].dtype)
        self.tensors["q_sum"][layer].copy_(groups.sum(dim=(1, 3)).unsqueeze(1))

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        n, S = self.spec.frame_tokens, self.spec.sink_frames
        self.unite(layer, k, v, plan)
        self.write(layer, k, v, plan, self.static)
        slots = [*range(self.static, S), *map(plan.ring.slot, plan.sources[-1])]
        keys, values = (torch.cat([x[:, self.tokens(slot)] for slot in slots], 1) for x in (k, v))
        query = self.tensors["q_sum"][layer]
        phi = (keys.to(query.dtype) * query).sum(dim=(2, 3))
        best = phi.topk(self.policy.frames * n, dim=1).indices.sort(dim=1).values[..., None, None]
        for x, tokens in ((k, keys), (v, values)):
            x[:, self.static * n : S * n] = tokens.gather(1, best.expand(-1, -1, *tokens.shape[2:]))
