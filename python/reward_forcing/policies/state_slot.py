"""A frame of state that is denoised with the content and rewritten by every chunk (AdaState)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class StateSlot(rf.SinkPolicy):
    """The first frame of every chunk is the state (AdaState, arXiv 2605.30349). The state of the chunk before
    leaves when a chunk opens, whatever room there is; then the oldest frames do. Content is numbered by
    itself: frame ``i`` of chunk ``c`` stands at ``c (F - 1) + i - 1``, and the state ``distance`` positions
    before the chunk's first content. There is no sink.

    Args:
        chunk: F, frames of every chunk, the state included.
        distance: 0 for just behind the window's content: ``W - F + 1``.
    """

    chunk: int = 4
    distance: float = 0

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 2 <= self.chunk <= spec.window_frames
        expect(fits, "StateSlot", "chunk", f"2..{spec.window_frames} frames", self.chunk)
        expect(spec.sink_frames == 0, "StateSlot", "sink_frames", "0", spec.sink_frames)
        return _StateSlotState(self, spec)


class _StateSlotState(MemoryState):
    def positions(self, opening: rf.Opening) -> Sequence[float] | None:
        F = self.policy.chunk
        fits = opening.end - opening.begin == F and opening.begin % F == 0
        expect(fits, "StateSlot", "frames", f"chunks of {F}", f"[{opening.begin}, {opening.end})")
        content = opening.origin + opening.begin // F * (F - 1)
        state = content - (self.policy.distance or self.spec.window_frames - F + 1)
        return [state, *(content + i for i in range(F - 1))]

    def leaving(self, opening: rf.Opening, excess: int) -> Sequence[int]:
        states = [f for f in opening.window if f % self.policy.chunk == 0]
        content = [f for f in opening.window if f % self.policy.chunk]
        return [*states, *content[: max(0, excess - len(states))]]
