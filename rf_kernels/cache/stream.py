"""What a stream has in the slots between two chunks, and what the next chunk makes of it: host integers.

Frames are counted here from the first of the stream; ``Stream.origin`` says which frame of the video that is.
A stream that only goes on keeps frame f in the slot that ``Ring.slot`` names. A chunk that starts inside the
window hides the frames behind it, and their slots are free. Attention reads a prefix of the slots, so a kept
frame that lies behind the prefix then moves to a free slot in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .._backend import argument_error

if TYPE_CHECKING:
    from .plan import Ring
    from .sinks import SinkState

_OP = "SinkWindowCache.open"


class Arrangement(NamedTuple):
    """What a chunk does to the slots."""

    held: tuple[int, ...]
    """The frame in each valid slot, once the chunk is in."""
    leaving: list[int]
    """Frames that leave the window, ascending."""
    moves: tuple[tuple[int, int], ...]
    """Slots (from, to) of kept frames that move, once the sink is rewritten."""
    places: dict[int, int] | None
    """Slot of each frame that is kept, leaves or comes; None where ``Ring.slot`` says so."""


@dataclass(frozen=True)
class Opening:
    """A chunk that is about to be opened, as the rules of a ``SinkState`` see it: host integers. Frames count
    from the stream's first.

    Attributes:
        begin, end: the chunk is the frames [begin, end).
        shot: first frame of the newest shot: 0, or where the newest chunk with ``cut=True`` began.
        cut: whether this chunk begins it.
        rewrites: whether the chunk goes back: it begins with a frame that was written before.
        window: frames in the ring that came before the chunk, ascending.
        ring: sizes.
        origin: frame of the video that the stream began with.
        offsets: by how much the temporal position of a frame that is in the cache is beyond its number.
    """

    begin: int
    end: int
    shot: int
    cut: bool
    rewrites: bool
    window: Sequence[int]
    ring: Ring
    origin: int
    offsets: Mapping[int, float]

    def position(self, frame: int) -> float:
        """Temporal position at which the key of a frame in the cache was rotated. Those of the chunk's own
        frames are known once ``positions`` has been asked."""
        return self.origin + frame + self.offsets[frame]


@dataclass(frozen=True)
class Stream:
    """A stream between two chunks.

    Attributes:
        origin: frame of the video that the stream began with.
        frames: frames so far.
        held: the frame in each valid slot, a prefix of the slots.
        left: whether any frame has left the window.
        absorbed: whether the sink has absorbed any.
        phase: the shift at which the keys of each sink frame lie in their slot; None while the policy has not
            rewritten them. From then on the sink's state is the sink.
        offsets: by how much the temporal position of each frame of ``held`` is beyond its number.
        shot: first frame of the newest shot.
    """

    origin: int = 0
    frames: int = 0
    held: tuple[int, ...] = ()
    left: bool = False
    absorbed: bool = False
    phase: tuple[float, ...] | None = None
    offsets: tuple[float, ...] = ()
    shot: int = 0

    @classmethod
    def plain(cls, frames: int, ring: Ring, state: SinkState) -> Stream:
        """A stream of so many frames that began with frame 0 and never went back."""
        S, gone = ring.sink_frames, frames - ring.window_frames
        held = {ring.slot(frame): frame for frame in ring.held(frames)}
        left = frames > ring.length
        sources = state.sources(range(max(S, gone - S), gone)) if left else None
        return cls(
            frames=frames,
            held=tuple(held[slot] for slot in range(len(held))),
            left=left,
            absorbed=any(sources or ()),
            phase=None if sources is None else (ring.shift(frames) if state.turns else 0,) * S,
            offsets=(0,) * len(held),
        )

    def listed(self) -> dict:
        """In JSON types."""
        phase = None if self.phase is None else list(self.phase)
        lists = {"held": list(self.held), "offsets": list(self.offsets), "phase": phase}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def of_listed(cls, listed, next_frame: int, ring: Ring) -> Stream | None:
        """What ``listed`` gave; None where no stream of so many frames can be like that."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(listed, dict) or set(listed) | {"shot"} != fields:
            return None
        listed = {"shot": 0} | listed
        origin, frames, phase, held, offsets, shot = (
            listed[name] for name in ("origin", "frames", "phase", "held", "offsets", "shot")
        )
        if not isinstance(held, list) or not isinstance(offsets, list) or len(held) != len(offsets):
            return None
        if type(phase) in (int, float):  # one for all, as files of old have it
            phase = [phase] * ring.sink_frames
        if phase is not None and (not isinstance(phase, list) or len(phase) != ring.sink_frames):
            return None
        places = [*offsets, *(phase or ())]
        if not all(type(x) in (int, float) and abs(x) < 2**53 for x in places):
            return None
        numbers = [origin, frames, *held, shot]
        if not all(type(x) is int and 0 <= x <= next_frame for x in numbers):
            return None
        if not all(type(listed[name]) is bool for name in ("left", "absorbed")) or len(held) > ring.length:
            return None
        phase = None if phase is None else tuple(phase)
        stream = cls(**listed | {"held": tuple(held), "offsets": tuple(offsets), "phase": phase})
        first = min(frames, ring.sink_frames)
        whole = held[:first] == list(range(first)) and len(set(held)) == len(held)
        fits = all(first <= f < frames for f in held[first:]) and (not frames or frames - 1 in held)
        return stream if whole and fits and stream.next_frame == next_frame else None

    @property
    def next_frame(self) -> int:
        """Frame of the video that comes next."""
        return self.origin + self.frames

    @property
    def oldest(self) -> int:
        """The first of the frames that are in the window without a gap up to the newest."""
        held, frame = set(self.held), self.frames
        while frame - 1 in held:
            frame -= 1
        return frame

    def seek(self, start: int, ring: Ring) -> Stream:
        """This stream, as a chunk that starts at frame ``start`` of the video goes on with it, ``start`` not
        being ``next_frame``: a new one, or this one with the frames from ``start`` on taken away.

        Raises:
            ArgumentError: the frames before ``start`` are not there.
        """
        if not self.frames or start in (0, self.origin):
            return Stream(origin=start)
        begin, oldest, sink_frames = start - self.origin, self.oldest, ring.sink_frames
        first_in_window = self.origin + max(oldest, min(sink_frames, self.frames))
        reach = f"{self.origin + oldest}..{self.next_frame}, or 0 to start over"
        if begin > self.frames:
            raise argument_error(_OP, "start", reach, f"{start}, and the frames before it were never written")
        if begin < 0:
            raise argument_error(_OP, "start", reach, f"{start}, before the stream's first frame")
        if begin >= oldest:
            return self
        if begin > sink_frames:
            found = f"{start}, and the frames between the sink and {first_in_window} have left the window"
            raise argument_error(_OP, "start", reach, f"{found} (a stream saved before can be loaded)")
        if self.absorbed:
            found = f"{start}, and the sink has absorbed later frames"
            raise argument_error(
                _OP, "start", reach, f"{found}, which cannot be undone (a stream saved before can be loaded)"
            )
        return self  # nothing was absorbed: the sink's frames are what they were

    def window(self, begin: int, ring: Ring) -> list[int]:
        """Frames of the ring before ``begin``, ascending."""
        return sorted(f for slot, f in enumerate(self.held) if slot >= ring.sink_frames and f < begin)

    def arrange(self, opening: Opening, leaves: Callable[[int], Sequence[int]]) -> Arrangement:
        """What a chunk does to the slots. ``leaves``: the frames of the window that leave where so many have
        to."""
        begin, end, ring = opening.begin, opening.end, opening.ring
        sink_frames, before = ring.sink_frames, {f: slot for slot, f in enumerate(self.held)}
        new = range(max(begin, sink_frames), max(end, sink_frames))
        window = [(f, before[f]) for f in opening.window]
        excess = max(0, len(window) + len(new) - ring.window_frames)
        chosen = set(leaves(excess))
        leaving, kept = ([x for x in window if (x[0] in chosen) == out] for out in (True, False))
        size = min(end, sink_frames) + len(kept) + len(new)

        places = {f: f for f in range(min(end, sink_frames))} | {f: slot for f, slot in kept if slot < size}
        places |= {f: before[f] for f in new if before.get(f, size) < size}
        taken, left = set(places.values()), [slot for _, slot in leaving if slot < size]
        free = [s for s in range(size) if s not in taken and s not in left] + left
        moving = [f for f, slot in kept if slot >= size]
        places |= zip([*moving, *(f for f in new if f not in places)], free, strict=True)

        held = {slot: f for f, slot in places.items()}
        everywhere = places | dict(leaving)
        usual = all(slot == ring.slot(f) for f, slot in everywhere.items())
        return Arrangement(
            held=tuple(held[slot] for slot in range(size)),
            leaving=[f for f, _ in leaving],
            moves=tuple((before[f], places[f]) for f in moving),
            places=None if usual else everywhere,
        )
