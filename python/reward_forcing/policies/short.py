"""A window that is shorter than its slots: for some rows, or some heads, of a memory that others fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class ShortWindow(rf.SinkPolicy):
    """A chunk sees the sink, the newest ``frames`` frames before it, and itself. The static heads of
    Forcing-KV (arXiv 2605.09681) see one frame before the chunk; the dummy heads of Dummy Forcing (arXiv
    2601.20499), which has no sink, see none, and its local heads one.

    Args:
        frames: of the window, before the chunk's own.
        rephase: of the sink, which is static.
    """

    frames: int = 1
    rephase: bool = False

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(self.frames >= 0, "ShortWindow", "frames", "at least 0", self.frames)
        return _ShortState(self, spec)


class _ShortState(MemoryState):
    def leaving(self, opening: rf.Opening, excess: int) -> Sequence[int]:
        return opening.window[: max(excess, len(opening.window) - self.policy.frames)]
