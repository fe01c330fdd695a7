"""A long and a short memory of what has left (MemRoPE, arXiv 2603.12513)."""

from __future__ import annotations

from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class TwoRateMemory(rf.SinkPolicy):
    """The last two sink frames are memories, the others are static. With ``m`` the mean, token by token, of
    the frames that leave in a chunk: ``memory <- (1 - rate) memory + rate m``, keys (without temporal
    rotation) and values alike. The memories begin as the frames that their slots held.

    Args:
        long, short: rates of the two.
        adaptive: the short rate of a token is ``short (0.1 + 4.9 d / max d)``, ``d`` being the distance of
            its mean key from the memory's, averaged over heads, and the maximum taken over tokens.
    """

    long: float = 0.01
    short: float = 0.1
    adaptive: bool = False
    rephase: bool = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        for name in ("long", "short"):
            rate = getattr(self, name)
            expect(0 <= rate <= 1, "TwoRateMemory", name, "a rate in 0..1", rate)
        expect(spec.sink_frames >= 2, "TwoRateMemory", "sink_frames", "at least 2", spec.sink_frames)
        return _TwoRateState(self, spec)


class _TwoRateState(MemoryState):
    absorbing = 2

    def has_state(self) -> bool:
        return True

    def absorb(self, layer, k, v, plan) -> None:
        S, policy = self.spec.sink_frames, self.policy
        for j, rate in ((S - 2, policy.long), (S - 1, policy.short)):
            count = len(plan.sources[j])
            if not count:
                continue
            pairs = [self.source(k, v, plan, j, i) for i in range(count)]
            means = [sum(x) / count for x in zip(*pairs, strict=True)]
            states = self.state(layer, j)
            if policy.adaptive and j == S - 1:
                motion = (means[0] - states[0]).norm(dim=-1).mean(dim=-1)
                rate = (
                    rate * (0.1 + 4.9 * motion / (motion.amax(dim=-1, keepdim=True) + 1e-8))[..., None, None]
                )
            for state, mean in zip(states, means, strict=True):
                state += rate * (mean - state)
