"""A sink at a position of its own: a reference that stays ahead of the video, or tokens without position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class PlacedSink(rf.SinkPolicy):
    """A static sink whose keys stand elsewhere from the chunk on that follows its frames.

    Args:
        ahead: sink frame ``j`` stands ``ahead + j`` positions beyond the newest frame (Live Avatar, arXiv
            2512.04677; Knot Forcing, arXiv 2512.21734).
        at: all sink frames stand at this position; 0 is the identity rotation (OmniForcing). One of the two.
    """

    ahead: float | None = None
    at: float | None = None
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        given = [x for x in (self.ahead, self.at) if x is not None]
        expect(len(given) == 1, "PlacedSink", "ahead, at", "one of the two", given)
        return _PlacedState(self, spec)


class _PlacedState(MemoryState):
    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        frames, policy = range(self.spec.sink_frames), self.policy
        if not self.turns:
            return [0 for _ in frames]
        if policy.at is not None:
            return [policy.at - opening.position(j) for j in frames]
        newest = opening.position(opening.end - 1)
        return [newest + policy.ahead + j - opening.position(j) for j in frames]
