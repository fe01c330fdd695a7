"""Memories that frames are pooled into as they leave (ConvKV of SoulX-LiveAct, arXiv 2603.11746)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class StridedMemory(rf.SinkPolicy):
    """The last ``memories`` sink frames are pooled. In every chunk that makes frames leave, the memories and
    the frames that leave, in this order, are one sequence; memory ``i`` becomes the weighted sum of its i-th
    part, keys (without temporal rotation) and values alike: a convolution over time whose stride is its
    length.

    Args:
        memories: M; the other sink frames are static.
        taps: weights of a part. None: the mean, of parts whose lengths differ by one at most.
    """

    memories: int = 1
    taps: tuple[float, ...] | None = None
    rephase: bool = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.memories <= spec.sink_frames
        expect(fits, "StridedMemory", "memories", f"1..{spec.sink_frames} sink frames", self.memories)
        return _StridedState(self, spec)


class _StridedState(MemoryState):
    def __init__(self, policy: StridedMemory, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        # R_t(j - i) between the phases of two memories.
        M = self.absorbing = policy.memories
        steps = range(1 - M, M)
        self._between = {d: None for d in steps}
        if spec.rope is not None:
            table = torch.from_numpy(spec.rope.temporal_table(steps)).to(
                device=spec.device, dtype=self.tensors["k_state"].dtype
            )
            self._between = dict(zip(steps, table, strict=True))

    def has_state(self) -> bool:
        return True

    def leaving(self, opening: rf.Opening, excess: int) -> Sequence[int]:
        M, taps = self.policy.memories, self.policy.taps
        expected = f"{(M + excess) / M:g} weights, with {M} memories and {excess} frames that leave"
        fits = not excess or taps is None or len(taps) * M == M + excess
        expect(fits, "StridedMemory", "taps", expected, taps)
        return super().leaving(opening, excess)

    def absorb(self, layer, k, v, plan) -> None:
        M, first = self.policy.memories, self.spec.sink_frames - self.policy.memories
        count = len(plan.sources[first])
        if not count:
            return
        old = [[x.clone() for x in self.state(layer, first + m)] for m in range(M)]
        parts = torch.tensor_split(torch.arange(M + count, device="cpu"), M)
        for m, part in enumerate(parts):
            taps = self.policy.taps or (1 / len(part),) * len(part)
            pairs = []
            for i in part.tolist():
                if i >= M:
                    pairs.append(self.source(k, v, plan, first + m, i - M))
                else:
                    turn, (key, value) = self._between[m - i], old[i]
                    pairs.append((key if turn is None else self.turned(key, turn), value))
            for state, frames in zip(self.state(layer, first + m), zip(*pairs, strict=True), strict=True):
                state.copy_(sum(w * x for w, x in zip(taps, frames, strict=True)))
