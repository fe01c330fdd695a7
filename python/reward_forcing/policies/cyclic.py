"""The first frames, told again and again (Rolling Sink, arXiv 2602.07775)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import rf_kernels as rf

from .._check import expect


@dataclass(frozen=True)
class CyclicSink(rf.SinkPolicy):
    """The S sink frames stand for the frames that left last, just behind the window, at their positions. In
    the place of frame ``f`` lies a copy of frame ``g(f)`` of the first B: forward and backward in turn,
    ``g(f) = f mod B`` where ``f // B`` is even, else ``B - 1 - f mod B``.

    Args:
        bank: B >= S; 0 for S and half of the window. Its keys and values are kept beside the cache: ``2 B n H
            D`` numbers of the cache's dtype a layer and sample.
    """

    bank: int = 0

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        S, expected = spec.sink_frames, f"0, or at least {spec.sink_frames}"
        expect(S >= 1 and spec.window_frames >= 1, "CyclicSink", "sink_frames", "at least 1, and a window", S)
        expect(self.bank == 0 or self.bank >= S, "CyclicSink", "bank", expected, self.bank)
        return _CyclicState(self, spec)


class _CyclicState(rf.SinkState):
    latent, resets = True, False  # what is in the slots are copies

    def __init__(self, policy: CyclicSink, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.bank = policy.bank or spec.sink_frames + spec.window_frames // 2
        for name in ("k_bank", "v_bank"):
            self.allocate(name, tokens=self.bank * spec.frame_tokens, values=name == "v_bank")

    def copied(self, frame: int) -> int:
        """g."""
        turn, at = divmod(frame, self.bank)
        return self.bank - 1 - at if turn % 2 else at

    def shown(self, oldest: int) -> list[int]:
        """The frame that each sink frame stands for, where the window begins with ``oldest``."""
        S = self.spec.sink_frames
        return [max(f for f in range(oldest - S, oldest) if f % S == j) for j in range(S)]

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        kept = [e for e in leaving if e < self.bank]
        return [kept, *([] for _ in range(self.spec.sink_frames - 1))] if leaving else None

    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        window = opening.window or [opening.begin]
        oldest = max(window[0], opening.end - self.spec.window_frames)
        return [f - self.copied(f) for f in self.shown(oldest)]

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        n, S = self.spec.frame_tokens, self.spec.sink_frames
        shown = self.shown(min(plan.after.held[S:]))
        parts = [
            (slots.unflatten(1, (-1, n)), self.tensors[name][layer].unflatten(1, (-1, n)))
            for slots, name in ((k, "k_bank"), (v, "v_bank"))
        ]
        for frames, bank in parts:  # before a slot is written: values may be channels of the keys
            if plan.first:
                bank[:, :S] = frames[:, :S]
            for e in plan.sources[0]:
                bank[:, e] = frames[:, plan.ring.slot(e)]
        (keys, k_bank), (values, v_bank) = parts
        for j, f in enumerate(shown):
            at = self.copied(f)
            keys[:, j] = self.turned(k_bank[:, at], plan.turns[j, -1]).to(k.dtype)
            values[:, j] = v_bank[:, at]
