"""Chunk plans: what a chunk of frames does to the cache, computed on the host from integers that the host already knows.

The arithmetic of slots and positions is here, in one place, in plain integers. Notation: S sink frames, W window frames,
L = S + W, n tokens a frame; a chunk is the frames [t_begin, t_end) of the stream.

- slot of frame f:      f while f < S, then S + (f - S) mod W              (nothing in the cache moves)
- attended prefix:      min(t_end, L) * n tokens                            (softmax does not care about the order of keys)
- frames that leave:    e = f - W for every new frame f >= L: the slot that e leaves is the slot that f takes
- sink frame that absorbs e:  j = (e - S) mod S
- position shift of the sink:  max(0, t_end - L): seen from the window, sink frame j stays at distance L - j
  (Reward Forcing, arXiv 2512.04678, gives the sink positions 0..S-1 and the window the positions that follow)
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ._backend import argument_error


@dataclass(frozen=True)
class Ring:
    """Geometry of one cache in frames: S sink frames, then a ring of W window frames."""

    sink_frames: int
    window_frames: int

    @property
    def length(self) -> int:
        """L, frames the cache holds."""
        return self.sink_frames + self.window_frames

    def slot(self, frame: int) -> int:
        """Slot of a frame of the stream."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % self.window_frames

    def leaving(self, t_begin: int, t_end: int) -> range:
        """Frames that leave the window when the chunk [t_begin, t_end) comes in, ascending."""
        return range(max(t_begin, self.length) - self.window_frames, max(t_end, self.length) - self.window_frames)

    def absorber(self, frame: int) -> int:
        """Sink frame that absorbs a leaving frame (undefined without sink frames)."""
        return (frame - self.sink_frames) % self.sink_frames

    def shift(self, t_end: int) -> int:
        """Frames by which the sink's positions have moved when the newest frame is t_end - 1."""
        return max(0, t_end - self.length)

    def held(self, t_end: int) -> list[int]:
        """Frames of the stream whose own keys and values are in the cache, ascending (sink frames: as they were absorbed into)."""
        first = min(t_end, self.sink_frames)
        return [*range(first), *range(max(first, t_end - self.window_frames), t_end)]

    def check_chunk(self, t_begin: int, t_end: int) -> None:
        """Raise unless the frames of the chunk that are new to the ring fit in it."""
        new = t_end - max(t_begin, self.sink_frames)
        if new > self.window_frames:
            raise argument_error(
                "SinkWindowCache.begin",
                "frames",
                f"at most {self.window_frames - max(t_begin, self.sink_frames) + t_begin} frames "
                f"(chunk starts at frame {t_begin}, window of {self.window_frames})",
                t_end - t_begin,
            )


@dataclass(eq=False)
class ChunkPlan:
    """One chunk's plan, from ``SinkWindowCache.begin`` to ``commit`` or ``rollback``.

    Host integers: ``frames`` of the chunk, its frames ``[t_begin, t_end)`` of the stream, ``kv_tokens`` (length of the valid prefix
    to attend), ``shift`` (frames by which the sink's positions have moved), ``leaving`` (frames that leave the window).
    Device tensors, read by the ops, rewritten by the next ``begin``: ``slots`` int32 [F], ``angles`` [1, R, 2] with ``axes``,
    ``schedule`` int32 [S, 2 + E] and ``turns`` [S, E + 1, nt, 2] (None when the sink has nothing to do).
    """

    owner: "object" = field(repr=False)
    generation: int
    t_begin: int
    t_end: int
    kv_tokens: int
    shift: int
    leaving: range
    slots: torch.Tensor = field(repr=False)
    angles: torch.Tensor | None = field(repr=False)
    axes: list[int] = field(repr=False)
    schedule: torch.Tensor | None = field(repr=False)
    turns: torch.Tensor | None = field(repr=False)
    undo: bool = False
    seen_skipped: int = 0
    open: bool = True
    evicted: list[bool] = field(default_factory=list, repr=False)
    appended: list[bool] = field(default_factory=list, repr=False)

    @property
    def frames(self) -> int:
        return self.t_end - self.t_begin

    @property
    def touched(self) -> bool:
        """Whether any layer has been written under this plan."""
        return any(self.evicted) or any(self.appended)


class PlanBuffers:
    """The device tensors of a cache's plans: allocated once, rewritten by every ``begin`` with two small copies.

    Layout of the float buffer (rows of (cos, sin)): spatial axes of the grid, never rewritten; then the temporal axis of a chunk;
    then the turns of the sink. One buffer serves all chunks, so a captured CUDA graph reads each chunk's plan at the same address.
    """

    def __init__(self, ring, grid, rope, dtype, device):
        self.ring, self.rope = ring, rope
        self.max_sources = -(-ring.window_frames // ring.sink_frames) if ring.sink_frames else 0
        self._pairs_t = rope.temporal_pairs if rope is not None else 0
        S, E = ring.sink_frames, self.max_sources
        spatial = 0
        if rope is not None:
            spatial = sum(length * pairs for length, pairs in zip(grid, rope.pairs[1:], strict=True))
            self._spatial_axes = rope.axes((0, *grid))[3:]
        self._temporal_row = spatial
        self._turn_row = spatial + ring.length * self._pairs_t
        rows = self._turn_row + S * (E + 1) * self._pairs_t

        on_host = device.type in ("cpu", "meta")
        self.ints = torch.zeros(ring.length + S * (2 + E), dtype=torch.int32, device=device)
        self.floats = torch.zeros(max(rows, 1), 2, dtype=dtype, device=device)
        # Host images. On the CPU the kernels read them directly. For a GPU they are pinned and used in turn, each guarded by an
        # event, so that an upload still under way is never overwritten.
        self._stages = [self._stage(device) for _ in range(1 if on_host else 2)]
        self._turn = 0
        if rope is not None and device.type != "meta":
            table = np.concatenate(
                [rope.axis_table(a + 1, np.arange(length)).reshape(-1, 2) for a, length in enumerate(grid)]
                or [np.zeros((0, 2))]
            )
            self.floats[:spatial].copy_(torch.from_numpy(table))
        self._views = {}

    def _stage(self, device):
        if device.type in ("cpu", "meta"):
            on_host = {"ints": self.ints, "floats": self.floats}
            if device.type == "meta":
                on_host = {name: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for name, t in on_host.items()}
            return on_host | {"event": None}
        pinned = {"device": "cpu", "pin_memory": True}
        return {
            "ints": torch.zeros(self.ints.shape, dtype=torch.int32, **pinned),
            "floats": torch.zeros(self.floats.shape, dtype=self.floats.dtype, **pinned),
            "event": torch.cuda.Event(),
        }

    def views(self, frames):
        """(slots, angles, axes, schedule, turns) for a chunk of so many frames: views of the buffers, made once per length."""
        if frames not in self._views:
            S, E, nt = self.ring.sink_frames, self.max_sources, self._pairs_t
            schedule = self.ints[self.ring.length :].view(S, 2 + E) if S else None
            turns = self.floats[self._turn_row : self._turn_row + S * (E + 1) * nt].view(S, E + 1, nt, 2) if S else None
            angles, axes = None, []
            if self.rope is not None:
                end = self._temporal_row + frames * self._pairs_t
                angles = self.floats[:end].unsqueeze(0)
                axes = [frames, self.rope.pairs[0], self._temporal_row, *self._spatial_axes]
            self._views[frames] = (self.ints[:frames], angles, axes, schedule, turns)
        return self._views[frames]

    def upload(self, t_begin, t_end, shift, sources, first):
        """Write a chunk's integers and angles. ``sources[j]``: leaving frames that sink frame j absorbs, ascending;
        ``first``: the sink's state is taken from its slots before anything else; ``sources`` None: the sink is left alone."""
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % len(self._stages)
        if stage["event"] is not None:
            stage["event"].synchronize()  # returns at once unless the GPU lags two chunks behind
        ring, rope, nt = self.ring, self.rope, self._pairs_t
        ints, floats = stage["ints"].numpy(), stage["floats"].numpy()
        ints[: t_end - t_begin] = [ring.slot(f) for f in range(t_begin, t_end)]
        if nt:
            table = rope.temporal_table(range(t_begin, t_end)).reshape(-1, 2)
            floats[self._temporal_row : self._temporal_row + len(table)] = table
        if sources is not None:
            S, E = ring.sink_frames, self.max_sources
            schedule = ints[ring.length :].reshape(S, 2 + E)
            schedule[:, 0] = first
            schedule[:, 1] = [len(frames) for frames in sources]
            for j, frames in enumerate(sources):
                schedule[j, 2 : 2 + len(frames)] = [ring.slot(e) for e in frames]
            if nt:
                turns = floats[self._turn_row : self._turn_row + S * (E + 1) * nt].reshape(S, E + 1, nt, 2)
                turns[:, E] = rope.temporal_table([shift])[0]
                for j, frames in enumerate(sources):
                    if frames:
                        turns[j, : len(frames)] = rope.temporal_table([j - e for e in frames])
        if stage["event"] is not None:
            self.ints.copy_(stage["ints"], non_blocking=True)
            self.floats[self._temporal_row :].copy_(stage["floats"][self._temporal_row :], non_blocking=True)
            stage["event"].record()
