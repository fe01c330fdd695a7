"""Frames that the prompt asks for (MemFlow's memory bank)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class RoutedFrames(rf.SinkPolicy):
    """The last M sink frames are a bank, the first G are static; all stay at their positions. Of the frames
    that leave, each whose number is a multiple of ``every`` comes into the bank, in each layer and sample.
    It takes the place of the frame there that the prompt asks for least:

        score_f = mean(t . k_f) / sqrt(D),    over heads, tokens of the frame and tokens of the text

    ``t``: the text's keys in the layer's cross-attention, which the model tells (``Chunk.tell``) before it
    attends; ``k``: rotated keys.

    Args:
        frames: M.
        every: F for the first frame of every chunk of F frames, a multiple of F for that of fewer chunks.
    """

    frames: int = 2
    every: int = 3

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.frames <= spec.sink_frames
        expect(fits, "RoutedFrames", "frames", f"1..{spec.sink_frames} sink frames", self.frames)
        expect(self.every >= 1, "RoutedFrames", "every", "at least 1", self.every)
        return _RoutedState(self, spec)


class _RoutedState(MemoryState):
    hears, resets = True, False
    absorbing = 1
    latent = False  # the text is told as keys of the model's heads

    def __init__(self, policy: RoutedFrames, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.static = spec.sink_frames - policy.frames
        #: Numbers of the frames in the bank, of each layer and sample.
        self.tensors["number"] = torch.arange(self.static, spec.sink_frames, device=spec.device).repeat(
            spec.layers, spec.batch, 1
        )

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        return super().sources([f for f in leaving if f % self.policy.every == 0])

    def hear(self, text: Tensor) -> Tensor:
        wide = torch.promote_types(text.dtype, torch.float32)
        return text.unflatten(2, (self.spec.heads, -1)).mean(dim=(1, 3), dtype=wide)  # [B, H, D]

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        M, n, number = self.policy.frames, self.spec.frame_tokens, self.tensors["number"][layer]
        bank, text = slice(self.static * n, self.spec.sink_frames * n), plan.told[layer].unsqueeze(1)
        if plan.first:
            number.copy_(torch.arange(self.static, self.spec.sink_frames, device=number.device))
        for e in plan.sources[-1]:
            keys = k[:, bank].unflatten(1, (M, n)).mean(2, dtype=text.dtype)
            score = (keys * text).sum(-1).mean(-1)  # the factor of D changes no order
            stay = score.topk(M - 1, dim=1).indices.sort(dim=1).values
            for x in (k, v):
                old = x[:, bank].unflatten(1, (M, n))
                old = old.gather(1, stay[:, :, None, None, None].expand(-1, -1, *old.shape[2:]))
                x[:, bank] = torch.cat([old.flatten(1, 2), x[:, self.tokens(plan.slot_of(e))]], 1)
            number.copy_(torch.cat([number.gather(1, stay), torch.full_like(number[:, :1], e)], 1))
