"""What the forwards of a rolling window of noise see, as Rolling Forcing has it (arXiv 2509.25161)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class RollingAnchor(rf.SinkPolicy):
    """A denoising forward sees ``frames`` frames: its own, the sink, which stands just before the others, and
    as many finished ones as remain. The context pass of a finished chunk sees the newest ``frames`` frames at
    their own positions, and the sink only as far as it is among them. For ``StreamConfig(rolling=True)``,
    with a window of ``frames`` and of all noisy chunks but one, so that the frames are there.

    Args:
        frames: seen, the chunk's own included.
        chunk: frames of a context pass: a chunk of so many that goes back to frames that were written before.
    """

    frames: int = 21
    chunk: int = 3
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        least = spec.sink_frames + 1
        expect(self.frames >= least, "RollingAnchor", "frames", f"at least {least}", self.frames)
        expect(self.chunk >= 1, "RollingAnchor", "chunk", "at least 1", self.chunk)
        return _RollingState(self, spec)


class _RollingState(MemoryState):
    weighs = True

    def _first_seen(self, opening: rf.Opening) -> int:
        return max(0, opening.end - self.policy.frames)

    def _is_context(self, opening: rf.Opening) -> bool:
        return opening.rewrites and opening.end - opening.begin == self.policy.chunk

    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        still = not self.turns or self._is_context(opening)
        return [0 if still else self._first_seen(opening)] * self.spec.sink_frames

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        first, S = self._first_seen(opening), self.spec.sink_frames
        if self._is_context(opening):
            seen = [f >= first for f in held]
        else:
            seen = [f < S or f >= min(first + S, opening.begin) for f in held]
        return [0.0 if s else -math.inf for s in seen]
