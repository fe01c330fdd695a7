"""Frames that weigh less, or are not seen at all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class LogBias(rf.SinkPolicy):
    """Past frames weigh ``factor`` times as much in the softmax as they would: the logits of their keys get
    ``log(factor)`` (Krea Realtime). The stream's first frame and the chunk's own weigh 1.

    Args:
        factor: above 0.
        rephase: of the sink, which is static.
    """

    factor: float = 0.3
    rephase: bool = False

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(0 < self.factor < math.inf, "LogBias", "factor", "a number above 0", self.factor)
        return _BiasState(self, spec)


class _BiasState(MemoryState):
    weighs = True

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        bias = math.log(self.policy.factor)
        return [bias if 0 < frame < opening.begin else 0.0 for frame in held]


@dataclass(frozen=True)
class RandomHistory(rf.SinkPolicy):
    """Of the past frames in the window every chunk sees the newest ``nearest``, and ``keep`` of the others,
    drawn at random, beside the sink (KVPO, arXiv 2605.14278). Of the sink it sees ``sink_frames`` frames,
    drawn too, once frames have left (Infinite-Forcing).

    Args:
        keep: frames; None for all.
        seed: the draw is a function of it and of the chunk's first frame.
        rephase: of the sink, which is static.
        sink_frames: frames of the sink that are seen; None for all.
        nearest: frames.
    """

    keep: int | None = 3
    seed: int = 0
    rephase: bool = False
    sink_frames: int | None = None
    nearest: int = 0

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(self.nearest >= 0, "RandomHistory", "nearest", "at least 0", self.nearest)
        for name, frames in (("keep", self.keep), ("sink_frames", self.sink_frames)):
            expect(frames is None or frames >= 0, "RandomHistory", name, "at least 0, or None", frames)
        return _RandomState(self, spec)


class _RandomState(MemoryState):
    weighs = True

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        S, policy, hidden = self.spec.sink_frames, self.policy, set()
        past = sorted(f for f in held[S:] if f < opening.begin)
        past = past[: max(0, len(past) - policy.nearest)]
        draw = random.Random(f"{policy.seed} {opening.begin}")
        gone = S not in held and opening.end > S  # the window's first frame
        for frames, count in ((past, policy.keep), (held[:S] if gone else (), policy.sink_frames)):
            if count is not None:
                hidden |= set(frames) - set(draw.sample(frames, min(count, len(frames))))
        return [-math.inf if frame in hidden else 0.0 for frame in held]
