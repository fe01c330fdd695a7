"""The stream in one dictionary of a pipeline's ``kv_cache``, for ``integrations.wan``.

The dictionary's own tensors ``k`` and ``v`` are the slots. Its layer is a cache of one layer: the pipelines
of the family hold one dictionary a layer, run layers apart (over ranks, under checkpoints), and never look
at two at once.

Gradients follow the family. There the cache is written in place under grad, so the gradient of a cached key
or value goes to the last forward with grad that wrote it, although a later one without grad has put other
values there. ``Turn`` and ``_Linked`` do the same without in-place history: values are copied once per
chunk, and the gradient of a frame goes to the tensors that its chunk's forward had.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .._backend import argument_error
from ..cache import CacheSpec, Chunk, ChunkBatch, SinkPolicy, SinkWindowCache, SinkWindowRows
from ..cache.grad import inside_backward, snapshot_is_wanted
from ..ops.rope_append import rope
from ..ops.sink_window_attention import sink_window_attention
from ..positions import RoPE


@dataclass(frozen=True)
class Geometry:
    """What a stream is made for. Two forwards of one stream have equal ones."""

    grid: tuple[int, int]
    sink_frames: int
    window_frames: int
    #: Frames that the dictionary's tensors have room for; what lies behind sink and window is not used.
    room_frames: int
    #: The stream ends with the frames of the room.
    ends: str | None
    policy: SinkPolicy
    rope: RoPE
    #: Chunks come with positions of their own.
    moved: bool = False

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Norms:
    """Arguments of ``Chunk.attend``."""

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm: str | None = None
    eps: float | None = None

    @property
    def options(self) -> dict:
        return {"q_norm": self.q_norm, "k_norm": self.k_norm, "norm": self.norm, "eps": self.eps}

    @property
    def weights(self) -> _Weights:
        return _Weights(self.q_norm, self.k_norm)


@dataclass
class _Pass:
    """A forward under grad. ``spent``: a backward has gone through it, and its graph may be gone."""

    turn: Turn
    spent: bool = False


class _Keep(torch.autograd.Function):
    """The identity; the graph keeps the turn for a recomputation."""

    @staticmethod
    def forward(ctx, out, made_by):
        ctx.made_by = made_by
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        ctx.made_by.spent = True
        return grad, None


class _Linked(torch.autograd.Function):
    """Values of ``past``; the gradient of frame ``places[i]`` of it goes to ``sources[i]``."""

    @staticmethod
    def forward(ctx, past, frame_tokens, places, *sources):
        ctx.frame_tokens, ctx.places = frame_tokens, places
        return past.view_as(past)

    @staticmethod
    def backward(ctx, grad):
        n = ctx.frame_tokens
        return None, None, None, *(grad[:, i * n : (i + 1) * n] for i in ctx.places)


class Turn:
    """One chunk of a stream, and what its forwards under grad saw of the past."""

    def __init__(self, chunk: Chunk, start: int, frames: int, position: float):
        self.chunk, self.start, self.frames, self.position = chunk, start, frames, position
        self.opened_in = inside_backward()
        self.past: tuple[Tensor, Tensor] | None = None
        #: Of frames of the past: place, shift since, key and value as they were written.
        self.sources: list[tuple[int, int, Tensor, Tensor]] = []
        self.angles: Tensor | None = None
        #: Attended frames of the forward under grad.
        self.seen: int | None = None

    @property
    def key(self) -> tuple[int, int, float]:
        return self.start, self.frames, self.position

    def is_recomputation(self) -> bool:
        """Whether this call comes from a backward: a checkpointed block runs again."""
        task = inside_backward()
        return task not in (-1, self.opened_in)

    def joined(self, past: Tensor, own: Tensor) -> Tensor:
        """The valid slots in order."""
        n = own.shape[1] // self.frames
        pieces = self.chunk.plan.pieces
        return torch.cat([(own if mine else past)[:, a * n : b * n] for mine, a, b in pieces], 1)


def _adopted(k: Tensor, v: Tensor, geometry: Geometry) -> tuple[CacheSpec, Tensor, Tensor]:
    """What a cache is made of, on the slots that it uses."""
    spec = CacheSpec(
        layers=1,
        batch=k.shape[0],
        heads=k.shape[2],
        head_dim=k.shape[3],
        grid=geometry.grid,
        sink_frames=geometry.sink_frames,
        window_frames=geometry.window_frames,
        rope=geometry.rope,
        dtype=k.dtype,
        device=k.device,
    )
    tokens = (geometry.sink_frames + geometry.window_frames) * geometry.frame_tokens
    return spec, k[:, :tokens].detach(), v[:, :tokens].detach()


class Stream:
    """The frames of one or more samples that stream in step, in ``k`` and ``v`` ``[B, T, H, D]``."""

    def __init__(self, k: Tensor, v: Tensor, geometry: Geometry, cache: SinkWindowCache | None = None):
        self.geometry = geometry
        spec, k, v = _adopted(k, v, geometry)
        self.cache = SinkWindowCache(spec, sink=geometry.policy, k=[k], v=[v]) if cache is None else cache
        #: The slots, and how often they had been written when we were through.
        self._slots, self._writes = (k, v), None
        self.turn: Turn | None = None
        #: Frame that the stream began with.
        self.origin = 0
        self._turns: weakref.WeakValueDictionary[tuple[int, int, float], Turn] = weakref.WeakValueDictionary()
        #: Frame -> key (at the phase of its own position) and value, and the forward that wrote them.
        self._sources: dict[int, tuple[Tensor, Tensor, _Pass]] = {}
        #: A chunk that outlives the window: its first frame, counted from the stream's, its keys and values.
        self._pinned: tuple[int, Tensor, Tensor] | None = None
        #: Whether the last forward was a backward's.
        self.recomputes = False
        self._kept: list[Turn] = []

    # ---- chunks --------------------------------------------------------------------------------------------
    def at(self, start: int, frames: int, position: float | None = None, *, afresh: bool = False) -> Turn:
        """The chunk of ``frames`` frames from ``start`` on: the open one, the one that a backward recomputes,
        or a new one. ``position``: of its first frame, where that is not ``start``. ``afresh``: a new stream
        begins with it."""
        position = start if position is None else position
        key, turn = (start, frames, position), self.turn
        if inside_backward() != -1:
            earlier = self._turns.get(key)
            if earlier is not None and earlier.is_recomputation():
                return earlier
        if turn is not None and turn.key == key and turn.chunk.is_open and not afresh:
            return turn
        geometry, cache = self.geometry, self.cache
        end = start + frames
        if geometry.ends is not None and end - (0 if afresh else self.origin) > geometry.room_frames:
            raise argument_error(
                "integrations.wan",
                "current_start",
                f"a chunk that ends by frame {geometry.room_frames}, the last that the cache holds"
                f" ({geometry.ends})",
                f"frames {start}..{end}",
            )
        if turn is not None and turn.chunk.is_open:
            turn.chunk.commit()
        if self._writes is not None and self._writes != self._counted():
            cache.reset_sink()  # somebody else has written: a scene cut zeroes the sink
        if afresh or start == 0:
            self.forget()
            self._pinned = None
            cache.reset()
            self.origin = start
        written = min(frames, geometry.window_frames) if start > self.origin else frames
        ahead = frames - written
        moved = None if position == start else position + ahead
        self.turn = Turn(cache.open(written, start=start + ahead, position=moved), start, frames, position)
        self._turns[key] = self.turn
        return self.turn

    @property
    def frames(self) -> int:
        """Frames of the stream so far, the open chunk's included."""
        return 0 if self.turn is None else self.turn.start + self.turn.frames - self.origin

    def continues(self, other: Stream) -> None:
        """Go on where another one is, whose slots were copied into these."""
        other.close()
        self.cache._restart(other.cache._stream)
        self.origin = other.origin
        self.turn = other.turn

    def _counted(self) -> tuple | None:
        """How often the slots were written; None where PyTorch does not count."""
        return None if any(x.is_inference() for x in self._slots) else tuple(x._version for x in self._slots)

    @property
    def has_pinned(self) -> bool:
        return self._pinned is not None

    def pin(self, first: int, frames: int) -> None:
        """Keep frames ``[first, first + frames)``, counted from the stream's first, when they leave the
        window, which is so much shorter then. The last such call counts; 0 frames: none."""
        self.close()
        self._pinned = None
        if frames:
            n, held = self.geometry.frame_tokens, self.turn.chunk.plan.after.held
            slots = [held.index(frame) for frame in range(first, first + frames)]
            k, v = (torch.cat([x[:, s * n : (s + 1) * n] for s in slots], 1) for x in self._slots)
            self._pinned = (first, k, v)

    def forget(self) -> None:
        """What was written so far is constant from here on."""
        self._sources.clear()
        self._kept.clear()

    def close(self) -> None:
        """The stream is between two chunks."""
        if self.turn is not None and self.turn.chunk.is_open:
            self.turn.chunk.commit()

    # ---- attention -----------------------------------------------------------------------------------------
    def attend(
        self, turn: Turn, q: Tensor, k: Tensor, v: Tensor, norms: Norms, seen: int | None = None
    ) -> Tensor:
        """``seen``: attended frames, sink and newest ones; None for all."""
        held = self.geometry.sink_frames + self.geometry.window_frames
        seen = None if seen is None or seen >= min(held, turn.chunk.plan.end) else seen
        self.recomputes = recomputed = turn.is_recomputation()
        beyond = self._pinned and self._pinned[0] < turn.chunk.plan.end - self.geometry.window_frames
        if recomputed or (torch.is_grad_enabled() and self._is_differentiated(q, k, v, norms)):
            if beyond:
                raise argument_error("integrations.wan", "kv_cache", "no pinned chunk under grad", "one")
            out = self._attend_with_grad(turn, q, k, v, norms, recomputed, seen)
        elif turn.chunk.frames != turn.frames:
            out = self._attend_beyond_window(turn, q, k, v, norms)
        elif beyond or seen is not None:
            out = self._attend_some(turn, q, k, v, norms, seen)
        else:
            out = turn.chunk.attend(0, q, k, v, **norms.options)
        self.note_writes()
        return out

    def note_writes(self) -> None:
        self._writes = self._counted()

    def _is_differentiated(self, q, k, v, norms: Norms) -> bool:
        return snapshot_is_wanted(q, k, v, norms.weights)

    def _attend_beyond_window(self, turn: Turn, q, k, v, norms: Norms) -> Tensor:
        """More frames than the window holds, behind a sink that stays: all of them are queries, the last ones
        are keys."""
        geometry, spec = self.geometry, self.cache.spec
        n = geometry.frame_tokens
        tail = slice((turn.frames - turn.chunk.frames) * n, None)
        turn.chunk.append(0, q[:, tail], k[:, tail], v[:, tail], **norms.options)
        rows, columns = geometry.grid
        frames = [turn.position + i for i in range(turn.frames)]
        positions = (frames, range(rows), range(columns))
        angles, axes = geometry.rope.table(positions, dtype=q.dtype, device=q.device)
        q = rope(
            q,
            angles=angles,
            axes=axes,
            layout=spec.layout,
            weight=norms.q_norm,
            norm=norms.norm or "model",
            eps=norms.eps or 0.0,
        )
        past = turn.chunk.kv(0)
        return sink_window_attention(q, past.k, past.v, kv_tokens=past.kv_tokens)

    def _attend_some(self, turn: Turn, q, k, v, norms: Norms, seen: int | None) -> Tensor:
        """Sink and newest frames, copied: the ``seen`` ones, or those for which there is room beside the
        pinned chunk."""
        q = turn.chunk.append(0, q, k, v, **norms.options)
        past, pinned = turn.chunk.kv(0), (None, None)
        if seen is None:
            _, *pinned = self._pinned
            seen = self.geometry.sink_frames + self.geometry.window_frames
            seen -= pinned[0].shape[1] // self.geometry.frame_tokens
        k, v = (self._shown(turn, x, seen, kept) for x, kept in zip((past.k, past.v), pinned, strict=True))
        return sink_window_attention(q, k, v, kv_tokens=k.shape[1])

    def _shown(self, turn: Turn, slots: Tensor, seen: int, kept: Tensor | None = None) -> Tensor:
        plan, n, first = turn.chunk.plan, self.geometry.frame_tokens, self.geometry.sink_frames
        shown = [s for s, f in enumerate(plan.after.held) if f < first or f >= plan.end - (seen - first)]
        return torch.cat(
            [*([] if kept is None else [kept]), *(slots[:, s * n : (s + 1) * n] for s in shown)], 1
        )

    def _attend_with_grad(self, turn: Turn, q, k, v, norms: Norms, recomputed: bool, seen) -> Tensor:
        chunk, plan, geometry = turn.chunk, turn.chunk.plan, self.geometry
        if chunk.frames != turn.frames:
            found = f"{turn.frames} frames, with grad"
            raise argument_error(
                "integrations.wan", "x", f"at most {geometry.window_frames} frames under grad", found
            )
        if not recomputed:
            with torch.no_grad():
                chunk.append(0, q.detach(), k.detach(), v.detach(), **norms.options)
                if turn.past is None:
                    self._take_past(turn)
        elif turn.past is None:
            raise argument_error(
                "integrations.wan",
                "x",
                "a forward under grad before its recomputation (checkpoint with use_reentrant=False)",
                "a recomputation of a forward without grad",
            )
        common = {
            "angles": turn.angles,
            "axes": plan.axes,
            "layout": self.cache.spec.layout,
            "norm": norms.norm or "model",
            "eps": norms.eps or 0.0,
        }
        q = rope(q, weight=norms.q_norm, **common)
        k = rope(k, weight=norms.k_norm, **common)
        past_k, past_v = turn.past
        if turn.sources:
            # in a recomputation too: a checkpoint wants the same steps
            places, shifts, keys, values = zip(*turn.sources, strict=True)
            keys = [self._moved(key, shift) for key, shift in zip(keys, shifts, strict=True)]
            past_k = _Linked.apply(past_k, geometry.frame_tokens, places, *keys)
            past_v = _Linked.apply(past_v, geometry.frame_tokens, places, *values)
        if not recomputed:
            turn.seen = seen
        keys, values = turn.joined(past_k, k), turn.joined(past_v, v)
        if turn.seen is not None:
            keys, values = (self._shown(turn, x, turn.seen) for x in (keys, values))
        out = sink_window_attention(q, keys, values, kv_tokens=keys.shape[1])
        if not out.requires_grad:
            self._kept.append(turn)  # no graph keeps it for the recomputation
            return out
        made_by = _Pass(turn)
        if not recomputed and (k.requires_grad or v.requires_grad):
            per_frame = [x.unflatten(1, (turn.frames, -1)).unbind(1) for x in (k, v)]
            for i, (a, b) in enumerate(zip(*per_frame, strict=True)):
                self._sources[turn.start + i] = (a, b, made_by)
        return _Keep.apply(out, made_by)

    def _take_past(self, turn: Turn) -> None:
        """Copies of the valid slots that are not the chunk's, and who wrote them under grad."""
        plan, n = turn.chunk.plan, self.geometry.frame_tokens
        after = plan.after
        held, own = [after.origin + f for f in after.held], range(turn.start, turn.start + turn.frames)
        others = [slot for slot, frame in enumerate(held) if frame not in own]
        slots = turn.chunk.kv(0)
        k, v = (
            torch.cat([x[:, s * n : (s + 1) * n] for s in others], 1) if others else x[:, :0].clone()
            for x in (slots.k, slots.v)
        )
        turn.past = (k, v)
        turn.angles = None if plan.angles is None else plan.angles.clone()
        if plan.sources is not None and any(plan.sources):
            # an average has no one writer
            for frame in range(self.origin, self.origin + self.geometry.sink_frames):
                self._sources.pop(frame, None)
        for frame in set(self._sources) - set(held):
            del self._sources[frame]
        for i, slot in enumerate(others):
            found = self._sources.get(held[slot])
            if found is None or found[2].spent:
                continue
            shift = plan.shift if slot < self.geometry.sink_frames else 0
            turn.sources.append((i, shift, found[0], found[1]))

    def _moved(self, key: Tensor, shift: int) -> Tensor:
        """A key of the sink as it lies in its slot, ``shift`` frames on."""
        geometry, (rows, columns) = self.geometry, self.geometry.grid
        if not shift:
            return key
        angles, axes = geometry.rope.table(
            ([shift], [0] * rows, [0] * columns), dtype=key.dtype, device=key.device
        )
        return rope(key, angles=angles, axes=axes, layout=self.cache.spec.layout)


class Streams:
    """The streams of one dictionary: one of all samples, or one a sample, which one attention serves."""

    def __init__(self, k: Tensor, v: Tensor, geometry: Geometry, apart: bool):
        self._apart: SinkWindowRows | None = None
        self._batch: ChunkBatch | None = None
        if not apart:
            self.each, self.samples = [Stream(k, v, geometry)], [slice(None)]
            return
        spec, k_slots, v_slots = _adopted(k, v, geometry)
        self._apart = SinkWindowRows(spec, sink=geometry.policy, k=[k_slots], v=[v_slots])
        self.samples = [slice(i, i + 1) for i in range(len(self._apart))]
        self.each = [
            Stream(k[i], v[i], geometry, cache) for i, cache in zip(self.samples, self._apart, strict=True)
        ]

    def attend(self, turns: list[Turn], q, k, v, norms: Norms, seen: int | None = None) -> Tensor:
        grad = any(turn.is_recomputation() for turn in turns)
        grad = grad or (torch.is_grad_enabled() and snapshot_is_wanted(q, k, v, norms.weights))
        plain = not grad and seen is None and all(turn.chunk.frames == turn.frames for turn in turns)
        if self._apart is None or not plain or any(stream.has_pinned for stream in self.each):
            outs = [
                stream.attend(turn, q[i], k[i], v[i], norms, seen)
                for stream, turn, i in zip(self.each, turns, self.samples, strict=True)
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs)
        chunks = tuple(turn.chunk for turn in turns)
        if self._batch is None or self._batch.chunks != chunks:
            self._batch = self._apart.batch(chunks)
        out = self._batch.attend(0, q, k, v, **norms.options)
        for stream in self.each:
            stream.recomputes = False
            stream.note_writes()
        return out


@dataclass(frozen=True)
class _Weights:
    q_weight: Tensor | None
    k_weight: Tensor | None
