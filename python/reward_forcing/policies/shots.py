"""Shots: the first frames of the newest one stay, and positions jump between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class PinnedShots(rf.SinkPolicy):
    """The last ``pinned`` sink frames are the first frames of the newest shot (``chunk(cut=True)``) once they
    have left the window; the other G sink frames are the static first frames of the stream. Until then, and
    in the first shot once frames have left, their slots are hidden (LongLive 2.0, arXiv 2605.18739; Anchor
    Forcing, arXiv 2603.13405).

    Args:
        pinned: P frames.
        offset: by how much positions jump at a cut, beside the frame's number.
        span: the sink keeps its distance to the newest frame from the frame ``span`` on. 0: sink and window
            together, so that the sink lies just behind the window.
        where: "sink": pinned frame ``i`` lies behind the G static ones, at ``G + i``. "shot": at ``min(shot,
            span - chunk) + i``, ``shot`` being the number of the shot's first frame. Both move along.
    """

    pinned: int = 1
    offset: float = 0.0
    span: int = 0
    where: str = "sink"
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.pinned <= spec.sink_frames
        expect(fits, "PinnedShots", "pinned", f"1..{spec.sink_frames} sink frames", self.pinned)
        fits = self.span == 0 or self.span >= spec.ring.length
        expect(fits, "PinnedShots", "span", f"0, or at least {spec.ring.length}", self.span)
        expect(self.where in ("sink", "shot"), "PinnedShots", "where", "sink or shot", repr(self.where))
        return _ShotState(self, spec)


class _ShotState(MemoryState):
    weighs = True

    def has_state(self) -> bool:
        return True

    def positions(self, opening: rf.Opening) -> Sequence[float] | None:
        if not opening.begin:
            return None
        begin = opening.position(opening.begin - 1) + 1 + self.policy.offset * opening.cut
        return [begin + i for i in range(opening.end - opening.begin)]

    def _pinned(self, opening: rf.Opening, held: Sequence[int]) -> list[bool]:
        """Whether each pinned slot is seen."""
        shot, P = opening.shot, self.policy.pinned
        if not shot:
            return [opening.end <= opening.ring.length] * P
        window = set(held[self.spec.sink_frames :])
        S = self.spec.sink_frames
        return [S <= shot + i < opening.begin and shot + i not in window for i in range(P)]

    @property
    def absorbing(self) -> int:
        return self.policy.pinned

    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        if not self.turns:
            return [0] * self.spec.sink_frames
        policy, S = self.policy, self.spec.sink_frames
        span = policy.span or opening.ring.length
        shift = max(0, opening.end - span)
        if shift:
            shift += opening.offsets[opening.begin] - opening.offsets[0]
        shifts = [shift] * S
        if policy.where == "shot" and opening.shot:
            first = min(opening.shot, span - (opening.end - opening.begin))
            for j in range(S - policy.pinned, S):
                shifts[j] += first - (S - policy.pinned)
        return shifts

    def weights(self, opening: rf.Opening, held: Sequence[int]) -> Sequence[float]:
        first = self.spec.sink_frames - self.policy.pinned
        weights = [0.0] * len(held)
        for i, seen in enumerate(self._pinned(opening, held)):
            if first + i < len(held) and not seen:
                weights[first + i] = float("-inf")
        return weights

    def absorb(self, layer, k, v, plan) -> None:
        first = self.spec.sink_frames - self.policy.pinned
        for j in range(first, self.spec.sink_frames):
            for i, e in enumerate(plan.sources[j]):
                if plan.after.shot and e == plan.after.shot + j - first:
                    for state, frame in zip(self.state(layer, j), self.source(k, v, plan, j, i), strict=True):
                        state.copy_(frame)


@dataclass(frozen=True)
class RopeCut(rf.SinkPolicy):
    """A window whose positions jump at a cut, and which a cut empties; a sink, if there is one, moves along
    (Infinity-RoPE, arXiv 2511.20649).

    Args:
        jump: positions between the last frame before a cut and the first behind it, beside the usual one.
        keep: frames of the window that a cut leaves; None for all.
    """

    jump: float = 0.0
    keep: int | None = None
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(self.keep is None or self.keep >= 0, "RopeCut", "keep", "at least 0, or None", self.keep)
        return _CutState(self, spec)


class _CutState(MemoryState):
    def positions(self, opening: rf.Opening) -> Sequence[float] | None:
        if not opening.begin:
            return None
        begin = opening.position(opening.begin - 1) + 1 + self.policy.jump * opening.cut
        return [begin + i for i in range(opening.end - opening.begin)]

    def leaving(self, opening: rf.Opening, excess: int) -> Sequence[int]:
        if opening.cut and self.policy.keep is not None:
            excess = max(excess, len(opening.window) - self.policy.keep)
        return opening.window[:excess]
