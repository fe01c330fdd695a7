"""Patches that change from frame to frame are kept (dynamic heads of Forcing-KV, arXiv 2605.09681)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class ChangingPatches(rf.SinkPolicy):
    """A chunk sees the first G sink frames, some patches of the frames that left last, the newest ``frames``
    frames before it, and itself. A patch is n / P successive tokens ``u`` of a frame. When frames leave, the
    patches ``p`` of those ``f`` whose next frame is in the cache too compete by how little they resemble it,

        score_fp = mean_{u in p} cos(k_fu, k_(f+1)u),    over all heads, keys as they are rotated

    and in each layer and sample the ``round(keep E P)`` lowest of such E frames stay, at most C P, at their
    positions. They take the place of all patches before them.

    Args:
        patches: P; it divides the tokens of a frame.
        keep: in 0..1; with 0 the static heads of Forcing-KV.
        frames: of the window, before the chunk's own.
        memory: C, the last sink frames: room for patches, and hidden until there are any.
        rephase: of the first sink frames, which are static.
        layer: None: every layer chooses. A number (1 in the published code): that layer chooses, those behind
            it keep the same patches, and those before it none. A forward has to come to it before them.
    """

    patches: int = 6
    keep: float = 0.33
    frames: int = 1
    memory: int = 1
    rephase: bool = False
    layer: int | None = None

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        who, n, S = "ChangingPatches", spec.frame_tokens, spec.sink_frames
        fits = self.patches >= 1 and n % self.patches == 0
        expect(fits, who, "patches", f"a divisor of the {n} tokens of a frame", self.patches)
        expect(0 <= self.keep <= 1, who, "keep", "a number in 0..1", self.keep)
        expect(self.frames >= 0, who, "frames", "at least 0", self.frames)
        expect(1 <= self.memory <= S, who, "memory", f"1..{S} sink frames", self.memory)
        fits = self.layer is None or 0 <= self.layer < spec.layers
        expect(fits, who, "layer", f"None, or a layer 0..{spec.layers - 1}", self.layer)
        return _PatchState(self, spec)


class _PatchState(MemoryState):
    weighs, weighs_keys, resets = True, True, False
    absorbing, stays = 1, True

    def __init__(self, policy: ChangingPatches, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.static = spec.sink_frames - policy.memory
        self.allocate_numbers("bias")
        if policy.layer is not None:
            self.allocate_numbers("choice", torch.int64, policy.memory * policy.patches)
        if self.turns and self.static:
            self.allocate_frames(self.static)

    def has_state(self) -> bool:
        return False

    def leaving(self, opening: rf.Opening, excess: int) -> Sequence[int]:
        return opening.window[: max(excess, len(opening.window) - self.policy.frames)]

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        """The memory is hidden as long as its slots hold frames: until the window's first frame has left."""
        S = self.spec.sink_frames
        hidden = range(self.static, S) if S in held or opening.end <= S else ()
        return [-math.inf if slot in hidden and f < opening.begin else 0.0 for slot, f in enumerate(held)]

    def key_bias(self, layer: int, plan: rf.ChunkPlan) -> Tensor:
        return self.tensors["bias"][layer]

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        if "k_state" in self.tensors:
            self.unite(layer, k, v, plan)
            self.write(layer, k, v, plan, self.static)
        if plan.sources[-1]:
            self._choose(layer, k, v, plan)

    def _choose(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        policy, S, n = self.policy, self.spec.sink_frames, self.spec.frame_tokens
        there = {*plan.leaving, *(f for f in plan.after.held[S:] if f < plan.begin)}
        chosen = [f for f in plan.sources[-1] if f + 1 in there]
        patches, first = len(chosen) * policy.patches, self.static * n
        count = min(round(policy.keep * patches), policy.memory * policy.patches)
        count = 0 if layer < (policy.layer or 0) else count
        end = first + count * (n // policy.patches)
        bias = self.tensors["bias"][layer]
        bias[:, first:end] = 0
        bias[:, end : S * n] = -math.inf
        if not count:
            return
        best = self._best(layer, k, chosen, plan, count)[..., None, None, None]
        for x in (k, v):
            frames = [x[:, self.tokens(plan.slot_of(f))] for f in chosen]
            pool = torch.cat(frames, 1).unflatten(1, (patches, -1))
            x[:, first:end] = pool.gather(1, best.expand(-1, -1, *pool.shape[2:])).flatten(1, 2)

    def _best(self, layer: int, k: Tensor, chosen: Sequence[int], plan: rf.ChunkPlan, count: int) -> Tensor:
        """Which patches of the frames stay, ``[B, count]``, ascending."""
        shared = self.policy.layer
        if shared is not None and layer > shared:
            return self.tensors["choice"][shared][:, :count]
        at = {f: self.tokens(plan.slot_of(f)) for f in {*chosen, *(f + 1 for f in chosen)}}
        wide = torch.promote_types(k.dtype, torch.float32)
        keys = {f: k[:, tokens].flatten(2).to(wide) for f, tokens in at.items()}
        like = [functional.cosine_similarity(keys[f], keys[f + 1], dim=-1) for f in chosen]
        score = torch.cat(like, 1).unflatten(1, (len(chosen) * self.policy.patches, -1)).mean(-1)
        best = score.topk(count, dim=1, largest=False).indices.sort(dim=1).values
        if shared is not None:
            self.tensors["choice"][layer][:, :count] = best
        return best
