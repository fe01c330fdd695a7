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
    """Of the past frames in the window every chunk sees ``keep``, drawn at random, beside the sink (KVPO,
    arXiv 2605.14278).

    Args:
        keep: frames.
        seed: the draw is a function of it and of the chunk's first frame.
        rephase: of the sink, which is static.
    """

    keep: int = 3
    seed: int = 0
    rephase: bool = False

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(self.keep >= 0, "RandomHistory", "keep", "at least 0", self.keep)
        return _RandomState(self, spec)


class _RandomState(MemoryState):
    weighs = True

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        past = sorted(f for f in held[self.spec.sink_frames :] if f < opening.begin)
        draw = random.Random(f"{self.policy.seed} {opening.begin}")
        hidden = set(past) - set(draw.sample(past, min(self.policy.keep, len(past))))
        return [-math.inf if frame in hidden else 0.0 for frame in held]
