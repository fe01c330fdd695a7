"""Geometry of a cache and of its chunks, computed on the host from integers that the host already knows.

The arithmetic of slots and positions is here, in one place, in plain integers. Notation: S sink frames, W
window frames, L = S + W, n tokens a frame; a chunk is the frames [t_begin, t_end) of the stream.

- slot of frame f:      f while f < S, then S + (f - S) mod W              (nothing in the cache moves)
- attended prefix:      min(t_end, L) * n tokens         (softmax does not care about the order of keys)
- frames that leave:    e = f - W for every new frame f >= L: the slot that e leaves is the slot that f takes
- position shift of the sink:  max(0, t_end - L): seen from the window, sink frame j stays at distance L - j
  (Reward Forcing, arXiv 2512.04678, gives the sink positions 0..S-1 and the window the positions that follow)

What the sink does with the frames that leave is its policy's business (sinks.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .._backend import argument_error, integer
from ..positions import RoPE, table_dtype
from .stream import Stream


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a cache is made for. Checked when it is written down.

    Args:
        layers, batch, heads, head_dim: as in the model (``heads`` are key/value heads; queries may have a
            multiple of them).
        grid: tokens of a frame along its spatial axes, e.g. ``(30, 52)``; n = their product.
        sink_frames, window_frames: S and W in latent frames; sink and window together are what a query sees
            (L = S + W).
        rope: positions of ``(frame, *grid)``, ``RoPE3D.wan(head_dim)`` for Wan; None for keys without
            positions.
        dtype, device: of keys and values.
        undo_frames: frames of the largest chunk that ``chunk(frames, undo=True)`` may be asked for (its save
            area is allocated with the cache).
        value_dims: ``(a, b)``: values are the channels ``a .. b - 1`` of the keys, none of which ``rope``
            turns, and have no slots of their own. For models whose keys and values are one latent (VideoMLA,
            arXiv 2605.30351). None: values are tensors of their own.
    """

    layers: int
    batch: int
    heads: int
    head_dim: int
    grid: Sequence[int]
    sink_frames: int
    window_frames: int
    rope: RoPE | None
    dtype: torch.dtype
    device: torch.device | str
    undo_frames: int = 0
    value_dims: tuple[int, int] | None = None
    # What follows from them, as plain attributes: they are read in compiled code.
    #: n.
    frame_tokens: int = field(init=False, repr=False, compare=False)
    ring: "Ring" = field(init=False, repr=False, compare=False)
    layout: str = field(init=False, repr=False, compare=False)
    #: Where the temporal pairs lie in a head, see ``RoPE.temporal_dims``.
    temporal_dims: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        op, grid, rope = "CacheSpec", self.grid, self.rope
        if not isinstance(grid, Sequence) or not all(map(is_integer, grid)):
            raise argument_error(op, "grid", "a sequence of integers", repr(grid))
        grid = tuple(grid)
        least = {
            "layers": 1,
            "batch": 1,
            "heads": 1,
            "head_dim": 1,
            "sink_frames": 0,
            "window_frames": 0,
            "undo_frames": 0,
        }
        for name, value, bound in [
            *((n, getattr(self, n), b) for n, b in least.items()),
            ("grid", min(grid, default=1), 1),
        ]:
            if not is_integer(value) or value < bound:
                raise argument_error(op, name, f"an integer >= {bound}", repr(value))
            integer(op, name, value)  # of 64 bits
        length = self.sink_frames + self.window_frames
        if length < 1:
            raise argument_error(op, "sink_frames + window_frames", "an integer >= 1", 0)
        if self.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise argument_error(op, "dtype", "float64, float32, bfloat16 or float16", self.dtype)
        if rope is not None:
            if not isinstance(rope, RoPE):
                raise argument_error(op, "rope", "a RoPE or None", repr(rope))
            if len(rope.pairs) != 1 + len(grid):
                raise argument_error(
                    op, "rope", f"{1 + len(grid)} axes (frame, *grid)", f"{len(rope.pairs)} axes"
                )
            if rope.temporal_axis not in (0, None) or (rope.temporal_axis is None and rope.pairs[0]):
                raise argument_error(op, "rope", "temporal_axis 0, or None with pairs[0] = 0", rope)
            if rope.rotated_dims > self.head_dim:
                raise argument_error(op, "rope", f"at most {self.head_dim} rotated dims", rope.rotated_dims)
        if self.undo_frames > length:
            raise argument_error(op, "undo_frames", f"at most {length}", self.undo_frames)
        value_dims = self.value_dims
        if value_dims is not None:
            pair = (
                isinstance(value_dims, Sequence) and len(value_dims) == 2 and all(map(is_integer, value_dims))
            )
            first = 0 if rope is None else rope.rotated_dims
            if not pair or not first <= value_dims[0] < value_dims[1] <= self.head_dim:
                expected = (
                    f"None, or (a, b) with {first} <= a < b <= {self.head_dim}: channels that do not turn"
                )
                raise argument_error(op, "value_dims", expected, repr(value_dims))
            value_dims = tuple(value_dims)
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError):
            raise argument_error(op, "device", "a device", repr(self.device)) from None
        followed = {
            "grid": grid,
            "value_dims": value_dims,
            "device": device,
            "frame_tokens": math.prod(grid),
            "ring": Ring(self.sink_frames, self.window_frames),
            "layout": "adjacent" if rope is None else rope.layout,
            "temporal_dims": (0, 1, 2) if rope is None or not rope.temporal_pairs else rope.temporal_dims,
        }
        for name, value in followed.items():
            object.__setattr__(self, name, value)

    def zeros(self, tokens: int, dtype: torch.dtype | None = None, dim: int | None = None) -> torch.Tensor:
        """``[layers, B, tokens, H, D]`` of zeros on the device, of the cache's dtype and head dim unless
        others are named."""
        size = (self.layers, self.batch, tokens, self.heads, dim or self.head_dim)
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.device)

    @property
    def value_dim(self) -> int:
        """Channels of a value."""
        return self.head_dim if self.value_dims is None else self.value_dims[1] - self.value_dims[0]

    def values_of(self, keys: torch.Tensor) -> torch.Tensor:
        """The values in keys ``[..., D]``, with ``value_dims``: a view."""
        return keys[..., slice(*self.value_dims)]


@dataclass(frozen=True)
class Ring:
    """Geometry of one cache in frames: S sink frames, then a ring of W window frames. Frames are counted from
    the first of the stream."""

    sink_frames: int
    window_frames: int
    #: Slots of frames that a chunk with an earlier start has put elsewhere.
    places: Mapping[int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def length(self) -> int:
        """L, frames the cache holds."""
        return self.sink_frames + self.window_frames

    def slot(self, frame: int) -> int:
        """Slot of a frame of the stream."""
        if self.places is not None:
            return self.places[frame]
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % self.window_frames

    def leaving(self, t_begin: int, t_end: int) -> range:
        """Frames that leave the window when the chunk [t_begin, t_end) comes in, ascending."""
        return range(
            max(t_begin, self.length) - self.window_frames, max(t_end, self.length) - self.window_frames
        )

    def shift(self, t_end: int) -> int:
        """Frames by which the sink's positions have moved when the newest frame is t_end - 1."""
        return max(0, t_end - self.length)

    def held(self, t_end: int) -> list[int]:
        """Frames of the stream whose own keys and values are in the cache, ascending (sink frames: as they
        were absorbed into)."""
        first = min(t_end, self.sink_frames)
        return [*range(first), *range(max(first, t_end - self.window_frames), t_end)]

    def check_chunk(self, t_begin: int, t_end: int, origin: int = 0) -> None:
        """Raise unless the frames of the chunk that are new to the ring fit in it."""
        new = t_end - max(t_begin, self.sink_frames)
        if new > self.window_frames:
            raise argument_error(
                "SinkWindowCache.open",
                "frames",
                f"at most {self.window_frames + max(t_begin, self.sink_frames) - t_begin} frames "
                f"(chunk starts at frame {origin + t_begin}, window of {self.window_frames})",
                t_end - t_begin,
            )


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """What one chunk does, as its ops take it. ``chunk.plan``; the same for every forward of the chunk.

    Host integers: ``frames`` of the chunk, its frames ``[t_begin, t_end)`` of the stream, ``kv_tokens``
    (length of the valid prefix to attend), ``shifts`` (by how much the position of each sink frame has moved
    from its own), ``leaving`` (frames that leave the window), ``sources`` (for each sink frame those that it
    absorbs; None when the sink has nothing to do), ``first`` (this is the first chunk that rewrites the sink:
    the sink's state is then taken from its slots). ``leaving`` and ``sources`` count from the stream's first
    frame, as ``ring.slot`` does. Device tensors, read by the ops, rewritten when the next chunk opens:
    ``slots`` int32 [F], ``angles`` [1, R, 2] with ``axes``, ``schedule`` int32 [S, 2 + E] and ``turns`` [S, E
    + 1, nt, 2] (None when the sink has nothing to do), ``bias`` float32 [L * n], the log-weight of each key
    (None without a policy that weighs frames).
    """

    ring: Ring
    t_begin: int
    t_end: int
    kv_tokens: int
    shifts: tuple[float, ...]
    leaving: Sequence[int]
    sources: list[list[int]] | None
    first: bool
    #: Slots (from, to) of kept frames that move, once the sink is rewritten.
    moves: tuple[tuple[int, int], ...]
    #: Whether the chunk starts over a stream that had frames: the sink's state is zeroed first.
    fresh: bool
    #: What the stream is once the chunk is committed.
    after: Stream = field(repr=False)
    #: By how much the temporal position of each frame, counted in the stream, is beyond its number.
    offsets: Mapping[int, float] = field(repr=False)
    slots: torch.Tensor = field(repr=False)
    angles: torch.Tensor | None = field(repr=False)
    axes: list[int] = field(repr=False)
    schedule: torch.Tensor | None = field(repr=False)
    turns: torch.Tensor | None = field(repr=False)
    bias: torch.Tensor | None = field(default=None, repr=False)
    #: Log-weight of each held frame.
    weights: Sequence[float] | None = field(default=None, repr=False)
    #: Of each layer, what the policy has made of the text that the model told (``SinkState.hear``).
    told: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def shift(self) -> float:
        """That of the first sink frame; the same for all of a sink that moves as one."""
        return self.shifts[0] if self.shifts else 0

    @property
    def frames(self) -> int:
        return self.t_end - self.t_begin

    @property
    def begin(self) -> int:
        """The chunk's first frame, counted from the stream's first."""
        return self.t_begin - self.after.origin

    @property
    def end(self) -> int:
        return self.after.frames

    @property
    def position(self) -> float:
        """Temporal position of the chunk's first frame."""
        return self.position_of(self.begin)

    def position_of(self, frame: int) -> float:
        """Temporal position of one of the chunk's frames, counted from the stream's first."""
        return self.after.origin + frame + self.offsets.get(frame, 0)

    def slot_of(self, frame: int) -> int:
        """Slot of a frame that leaves or is kept, counted from the stream's first, before any frame moves."""
        slot = self.ring.slot(frame)
        return slot if frame in self.leaving else {to: at for at, to in self.moves}.get(slot, slot)

    @property
    def prepares(self) -> bool:
        """Whether a layer's first forward has something to do before it writes the chunk's keys."""
        return self.sources is not None or self.fresh or bool(self.moves)

    @property
    def pieces(self) -> list[tuple[bool, int, int]]:
        """The valid slots in order, as runs of (the chunk's own?, first frame, one past the last), frames
        counted among the chunk's own and among the others."""
        runs, others = [], 0
        for frame in self.after.held:
            own = frame >= self.begin
            at = frame - self.begin if own else others
            others += not own
            if runs and runs[-1][0] == own and runs[-1][2] == at:
                runs[-1] = (own, runs[-1][1], at + 1)
            else:
                runs.append((own, at, at + 1))
        return runs


class PlanBuffers:
    """The device tensors of a cache's plans: allocated once, rewritten by every ``begin`` with two small
    copies.

    Layout of the float buffer (rows of (cos, sin)): spatial axes of the grid, never rewritten; then the
    temporal axis of a chunk; then the turns of the sink. One buffer serves all chunks, so a captured CUDA
    graph reads each chunk's plan at the same address.
    """

    def __init__(self, spec: CacheSpec, max_sources: int, weighs: bool = False):
        ring, grid, rope, device = spec.ring, spec.grid, spec.rope, spec.device
        dtype = table_dtype(spec.dtype)
        self.ring, self.rope, self.max_sources = ring, rope, max_sources
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
        self.frame_bias = self.bias = None
        if weighs:
            self.frame_bias = torch.zeros(ring.length, dtype=torch.float32, device=device)
            self.bias = torch.zeros(ring.length * spec.frame_tokens, dtype=torch.float32, device=device)
        # Host images. On the CPU the kernels read them directly. For a GPU they are pinned and used in turn,
        # each guarded by an event, so that an upload still under way is never overwritten.
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
            on_host |= {} if self.bias is None else {"bias": self.frame_bias}
            if device.type == "meta":
                on_host = {
                    name: torch.zeros(t.shape, dtype=t.dtype, device="cpu") for name, t in on_host.items()
                }
            return on_host | {"event": None}
        pinned = {"device": "cpu", "pin_memory": True}
        weighs = {} if self.bias is None else {"bias": torch.zeros(self.frame_bias.shape, **pinned)}
        return weighs | {
            "ints": torch.zeros(self.ints.shape, dtype=torch.int32, **pinned),
            "floats": torch.zeros(self.floats.shape, dtype=self.floats.dtype, **pinned),
            "event": torch.cuda.Event(),
        }

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, by name."""
        names = ("ints", "floats", "bias", "frame_bias")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def move_to(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on in other memory, which holds the same."""
        self.__dict__.update(tensors)
        self._views.clear()
        if self.ints.device.type == "cpu":
            self._stages = [self._stage(self.ints.device)]

    def views(self, frames):
        """(slots, angles, axes, schedule, turns) for a chunk of so many frames: views of the buffers, made
        once per length."""
        if frames not in self._views:
            S, E, nt = self.ring.sink_frames, self.max_sources, self._pairs_t
            schedule = self.ints[self.ring.length :].view(S, 2 + E) if S else None
            turns = (
                self.floats[self._turn_row : self._turn_row + S * (E + 1) * nt].view(S, E + 1, nt, 2)
                if S
                else None
            )
            angles, axes = None, []
            if self.rope is not None:
                end = self._temporal_row + frames * self._pairs_t
                angles = self.floats[:end].unsqueeze(0)
                axes = [frames, self.rope.pairs[0], self._temporal_row, *self._spatial_axes]
            self._views[frames] = (self.ints[:frames], angles, axes, schedule, turns)
        return self._views[frames]

    def turn_by(self, frames: int) -> torch.Tensor:
        """R_t(frames) as ``SinkState.turned`` takes it, ``[nt, 2]`` on the device."""
        table = self.rope.temporal_table([frames])[0] if self._pairs_t else np.zeros((0, 2))
        return torch.from_numpy(table).to(device=self.floats.device, dtype=self.floats.dtype)

    def upload(self, plan: ChunkPlan) -> None:
        """Write a chunk's integers and angles."""
        sources = plan.sources
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % len(self._stages)
        if stage["event"] is not None:
            stage["event"].synchronize()  # returns at once unless the GPU lags two chunks behind
        ring, rope, nt = self.ring, self.rope, self._pairs_t
        ints, floats = stage["ints"].numpy(), stage["floats"].numpy()
        ints[: plan.frames] = [plan.ring.slot(f) for f in range(plan.begin, plan.end)]
        if nt:
            positions = [plan.position_of(f) for f in range(plan.begin, plan.end)]
            table = rope.temporal_table(positions).reshape(-1, 2)
            floats[self._temporal_row : self._temporal_row + len(table)] = table
        if sources is not None:
            S, E = ring.sink_frames, self.max_sources
            schedule = ints[ring.length :].reshape(S, 2 + E)
            schedule[:, 0] = plan.first
            schedule[:, 1] = [len(frames) for frames in sources]
            for j, frames in enumerate(sources):
                schedule[j, 2 : 2 + len(frames)] = [plan.ring.slot(e) for e in frames]
            if nt:
                turns = floats[self._turn_row : self._turn_row + S * (E + 1) * nt].reshape(S, E + 1, nt, 2)
                turns[:, E] = rope.temporal_table(plan.shifts)
                for j, frames in enumerate(sources):
                    if frames:
                        own = j + plan.offsets[j]
                        turns[j, : len(frames)] = rope.temporal_table(
                            [own - e - plan.offsets[e] for e in frames]
                        )
        if plan.weights is not None:
            stage["bias"].numpy()[: len(plan.weights)] = plan.weights
            if stage["event"] is not None:
                self.frame_bias.copy_(stage["bias"], non_blocking=True)
            self.bias.view(ring.length, -1).copy_(self.frame_bias[:, None])
        if stage["event"] is None:
            # Written through numpy, which autograd does not see: a graph that has saved such a view must find
            # out.
            for tensor in (self.ints, self.floats):
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        else:
            self.ints.copy_(stage["ints"], non_blocking=True)
            self.floats[self._temporal_row :].copy_(stage["floats"][self._temporal_row :], non_blocking=True)
            stage["event"].record()
