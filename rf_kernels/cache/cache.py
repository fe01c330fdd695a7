"""SinkWindowCache: the KV cache of a stream. Sink first, then a ring; nothing in it ever moves, and every key
is rotated once.

    spec = rf.CacheSpec(layers=30, batch=1, heads=12, head_dim=128, grid=(30, 52), sink_frames=3,
                        window_frames=6, rope=rf.RoPE3D.wan(128), dtype=torch.bfloat16, device="cuda")
    cache = rf.SinkWindowCache(spec, sink=rf.EMASink(alpha=0.999))
    with cache.chunk(frames=3) as chunk:                      # commits at the end
        for each denoising forward, and the one on the clean result:
            for layer, block in enumerate(blocks):
                y = chunk.attend(layer, q, k, v, q_norm=..., k_norm=...)

Geometry is in plan.py, the open chunk in chunk.py, what leaves and what absorbs it in sinks.py; docs/cache.md
tells the rules with their reasons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import ArgumentError, argument_error, number, refuse_transforms
from . import stream_file
from .adopt import allocated
from .chunk import Chunk
from .plan import CacheSpec, ChunkPlan, PlanBuffers, Ring, is_integer
from .sinks import SinkPolicy
from .stream import Opening, Stream

_OP = "SinkWindowCache"


class StreamClosedError(ArgumentError):
    """A chunk without undo failed after it had written: the stream cannot go on. ``reset`` the cache, or load
    a stream into it."""


class SinkWindowCache:
    """Keys and values of a stream: ``sink_frames`` at the front, then a ring of ``window_frames``; all memory
    is allocated here.

    Args:
        spec: sizes, positions, dtype and device.
        sink: what happens to frames that leave the window: ``NoSink()``, ``StaticSink()``, ``EMASink(...)``,
            or a policy of your own (docs/sinks.md).
        k, v: memory for the slots that the caller has allocated, both or none: ``[layers, B, L * n, H, D]``,
            or a sequence with ``[B, L * n, H, D]`` of each layer. Views will do, if the last dimension is
            contiguous. What lies there is not read; ``reset`` and ``load`` write there too. With
            ``spec.value_dims`` k alone.

    Attributes:
        k, v: ``[layers, B, L * n, H, D]``, or the tuple of the caller's layers. With ``spec.value_dims``, v
            is a view of k.
        next_frame: first frame of the next chunk = one past the last one committed.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        sink: SinkPolicy,
        k: Tensor | Sequence[Tensor] | None = None,
        v: Tensor | Sequence[Tensor] | None = None,
    ):
        if not isinstance(spec, CacheSpec):
            raise argument_error(_OP, "spec", "a CacheSpec", type(spec).__name__)
        if not isinstance(sink, SinkPolicy):
            found = repr(sink) if not isinstance(sink, type) else f"the class {sink.__name__}"
            raise argument_error(_OP, "sink", "a sink policy, such as EMASink()", found)
        self.spec, self.sink = spec, sink
        # Tensors born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._allocate(k, v)
        self._chunk: Chunk | None = None
        #: Why the stream cannot go on.
        self._broken: str | None = None
        self._stream = Stream()
        self.next_frame = 0

    def _allocate(self, k, v) -> None:
        spec = self.spec
        self._sink = self.sink.bind(spec)
        self.k, self.v = k, v = allocated(spec, k, v)
        self._slots = [(k[layer], v[layer]) for layer in range(spec.layers)]
        #: What has memory of its own: keys and values, or keys and None.
        self._stored = self._slots if spec.value_dims is None else [(k, None) for k, _ in self._slots]
        self._undo: dict[str, Tensor] = {}
        if spec.undo_frames:
            chunk, kept = spec.undo_frames * spec.frame_tokens, spec.sink_frames * spec.frame_tokens
            names = "kv" if spec.value_dims is None else "k"
            self._undo = {name: spec.zeros(chunk) for name in names}
            if self._sink.tensors:
                self._undo |= {f"sink_{name}": spec.zeros(kept) for name in names}
                self._undo |= {f"sink.{name}": torch.zeros_like(t) for name, t in self._sink.tensors.items()}
        self._buffers = PlanBuffers(spec, self._sink.max_sources, self._sink.weighs)

    # ---- looking -------------------------------------------------------------------------------------------
    @property
    def ring(self) -> Ring:
        """Where frames lie, in plain integers."""
        return self.spec.ring

    @property
    def first_frame(self) -> int:
        """The frame that the stream began with; ``next_frame`` while it has none."""
        return self._stream.origin

    @property
    def kv_tokens(self) -> int:
        """Tokens of the valid prefix after the last commit."""
        return len(self._stream.held) * self.spec.frame_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache (on device "meta" they are counted without being allocated)."""
        tensors = [
            *self._memory(),
            self._buffers.ints,
            self._buffers.floats,
            *((self._buffers.bias, self._buffers.frame_bias) if self._sink.weighs else ()),
            *self._sink.tensors.values(),
            *self._undo.values(),
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _memory(self, layer: int | None = None) -> list[Tensor]:
        """Keys and values that have memory of their own, of one layer or of all."""
        stored = self._stored if layer is None else self._stored[layer : layer + 1]
        return [t for pair in stored for t in pair if t is not None]

    @property
    def answers(self) -> bool:
        """Whether the policy has something beside the slots, for which the model must ask
        (``Chunk.beside``)."""
        return self._sink.answers

    @property
    def skipped_tokens(self) -> Tensor:
        """``int64 [layers]`` on the device; counts tokens of leaving frames that were not fused because they
        were not finite."""
        return self._sink.skipped_tokens

    def sink_state(self, layer: int) -> tuple[Tensor, Tensor]:
        """The sink's keys (at the temporal phase of their own slots) and values ``[B, S * n, H, D]`` of one
        layer, in float32 (float64 for a float64 cache); a copy, for inspection."""
        self._check_whole("sink_state")
        wide = torch.float64 if self.spec.dtype == torch.float64 else torch.float32
        tokens = min(self._stream.frames, self.spec.sink_frames) * self.spec.frame_tokens
        k, v = (x[:, :tokens] for x in self._slots[layer])
        # until the policy rewrites them, slots and state are one and the same
        if self._stream.phase is not None:
            k, v = self._sink.keys_values(layer, k, v)
        return k.to(wide, copy=True), v.to(wide, copy=True)

    # ---- a chunk -------------------------------------------------------------------------------------------
    def chunk(
        self,
        frames: int,
        *,
        start: int | None = None,
        position: float | Sequence[float] | None = None,
        cut: bool = False,
        undo: bool = False,
    ) -> Chunk:
        """The next chunk of ``frames`` latent frames, for a ``with`` block, at whose end it commits.

        With an exception in the block: a chunk that has written nothing is as if it had never been opened;
        one that has is rolled back with ``undo``; without, the stream is closed, and every use of it says so,
        until ``reset``. A commit that fails (a layer was not written, ``NonFiniteError``) ends the same way.

        Args:
            start: the chunk's first frame; None for ``next_frame``. In an empty cache any frame: slots count
                from it. 0, or the frame that the stream began with, starts over. A frame of the window: the
                chunk rewrites its frames, and those behind it are gone; the sink keeps what it has absorbed.
                The (start, frames) of the chunk that is open: that chunk.
            position: temporal position of the chunk's first frame, the others following it, or one of each
                frame; None for what the policy says, which is the frame's number unless it has a rule of its
                own. A sink that moves along keeps its distance to the newest frame.
            cut: whether the chunk begins a new shot. What that means is the policy's business; to ``NoSink``,
                ``StaticSink`` and ``EMASink``, nothing.
            undo: first save what the chunk will destroy (its slots, the sink, the sink's state). Needs
                ``undo_frames >= frames`` in the spec.
        Raises:
            ArgumentError: frames do not fit in the window, the frames before ``start`` are not in the cache,
                another chunk is still open, or there is no save area.
            StreamClosedError: a failed chunk has closed the stream.
        """
        return self.open(frames, start=start, position=position, cut=cut, undo=undo)

    def open(
        self,
        frames: int,
        *,
        start: int | None = None,
        position: float | Sequence[float] | None = None,
        cut: bool = False,
        undo: bool = False,
    ) -> Chunk:
        """As ``chunk``, for callers that cannot hold a ``with`` over an event loop: they end it with
        ``Chunk.commit`` or ``Chunk.rollback``. Keys, values and state are not touched (with ``undo`` they are
        saved)."""
        op, chunk = f"{_OP}.open", self._chunk
        refuse_transforms(op)
        if not is_integer(frames) or frames < 1:
            raise argument_error(op, "frames", "an integer >= 1", repr(frames))
        if start is not None:
            if not is_integer(start) or not 0 <= start < stream_file.MOST_FRAMES:
                raise argument_error(op, "start", "an integer in [0, 2**53), or None", repr(start))
        if position is not None:
            position = _positions(op, position, frames)
        if not isinstance(cut, bool):
            raise argument_error(op, "cut", "True or False", repr(cut))
        if start is not None:
            if chunk is not None and (chunk.first_frame, chunk.frames) == (start, frames):
                own = [chunk.plan.position_of(f) for f in range(chunk.plan.begin, chunk.plan.end)]
                if position not in (None, own):
                    raise argument_error(op, "position", f"that of the open chunk, {own[0]}", position[0])
                if cut and chunk.plan.after.shot != chunk.plan.begin:
                    raise argument_error(op, "cut", "that of the open chunk, False", cut)
                if undo and not chunk.undo:
                    raise argument_error(op, "undo", "that of the open chunk, False", undo)
                return chunk
        self._check_between("open")
        before, ring, sink = self._stream, self.ring, self._sink
        if start is not None and start != self.next_frame:
            before = before.seek(start, ring)
        begin = before.frames if start is None else start - before.origin
        end = begin + frames
        ring.check_chunk(begin, end, before.origin)
        offsets = {f: x for f, x in zip(before.held, before.offsets, strict=True) if f < begin}
        opening = Opening(
            begin=begin,
            end=end,
            shot=begin if cut else min(before.shot, begin),
            cut=cut,
            rewrites=begin < before.frames,
            window=before.window(begin, ring),
            ring=ring,
            origin=before.origin,
            offsets=offsets,
        )
        if position is None:
            own = sink.positions(opening)
            position = None if own is None else _positions(f"{type(sink).__name__}.positions", own, frames)
        numbers = range(before.origin + begin, before.origin + end)
        offsets |= {
            f - before.origin: 0 if position is None else position[i] - f for i, f in enumerate(numbers)
        }
        held, leaving, moves, places = before.arrange(
            opening, lambda n: self._check_leaving(opening.window, sink.leaving(opening, n), n)
        )
        if undo and frames + len(moves) > self.spec.undo_frames:
            found = frames if not moves else f"{frames}, and {len(moves)} more that move"
            raise argument_error(op, "undo", f"at most undo_frames = {self.spec.undo_frames} frames", found)
        # Frames of the sink that are written again are frames of the stream again: nothing was absorbed.
        left = before.left and begin >= before.oldest
        still = (0,) * ring.sink_frames  # also of a sink that has not all its frames yet
        complete = begin >= ring.sink_frames
        shifts = self._numbers("shifts", sink.shifts(opening), ring.sink_frames) if complete else still
        sources = sink.sources(leaving)
        if sources is None and shifts != (before.phase or still):
            sources = [[] for _ in still]  # nothing is absorbed, and the keys turn
        self._check_sources(sources, leaving)
        acts = sources is not None
        taken = complete and (left or bool(leaving) or any(shifts))
        after = Stream(
            origin=before.origin,
            frames=end,
            held=held,
            left=left or bool(leaving),
            absorbed=before.absorbed or any(sources or ()),
            phase=shifts if taken and (acts or before.phase is not None) else None,
            offsets=tuple(offsets[f] for f in held),
            shot=opening.shot,
        )
        slots, angles, axes, schedule, turns = self._buffers.views(frames)
        plan = ChunkPlan(
            ring=ring if places is None else dataclasses.replace(ring, places=places),
            t_begin=before.origin + begin,
            t_end=before.origin + end,
            kv_tokens=len(held) * self.spec.frame_tokens,
            shifts=shifts,
            leaving=leaving,
            sources=sources,
            first=acts and before.phase is None,
            moves=moves,
            fresh=begin == 0 and self._stream.frames > 0,
            after=after,
            offsets=offsets,
            slots=slots,
            angles=angles,
            axes=axes,
            schedule=schedule if acts else None,
            turns=turns if acts else None,
            bias=self._buffers.bias,
            weights=self._numbers("weights", sink.weights(opening, held), len(held)) if sink.weighs else None,
        )
        self._buffers.upload(plan)
        if undo:
            self._copy_undo(plan, save=True)
        self._chunk = Chunk(self, plan, undo)
        return self._chunk

    def reset(self) -> None:
        """Start a new stream: frame 0, slots zeroed (nothing of the old stream stays in memory), an open
        chunk void."""
        for tensor in (*self._memory(), *self._sink.tensors.values(), *self._undo.values()):
            tensor.zero_()
        self._restart(Stream())

    def reset_sink(self) -> None:
        """Take the sink's state from its slots again, between chunks: for a caller that has written or zeroed
        sink frames in ``k`` and ``v`` by itself. Their keys are at the positions where the sink lies now. The
        slots keep their bits. Without this call the next chunk that moves the sink would write what the state
        holds."""
        self._check_between("reset_sink")
        stream, spec = self._stream, self.spec
        if stream.phase is None:
            return  # the slots are the sink
        if not self._sink.resets:
            name = type(self.sink).__name__
            raise argument_error(
                f"{_OP}.reset_sink", "self", "a sink that its slots tell", f"{name}, which has more"
            )
        slots, angles, axes, schedule, turns = self._buffers.views(0)
        plan = ChunkPlan(
            ring=self.ring,
            t_begin=stream.next_frame,
            t_end=stream.next_frame,
            kv_tokens=self.kv_tokens,
            shifts=stream.phase,
            leaving=[],
            sources=[[] for _ in range(spec.sink_frames)],
            first=True,
            moves=(),
            fresh=False,
            after=stream,
            offsets=dict(zip(stream.held, stream.offsets, strict=True)),
            slots=slots,
            angles=angles,
            axes=axes,
            schedule=schedule,
            turns=turns,
        )
        self._buffers.upload(plan)
        back = [self._buffers.turn_by(-shift) for shift in stream.phase]
        n, sink_tokens = spec.frame_tokens, spec.sink_frames * spec.frame_tokens
        with torch.no_grad():
            for layer, pair in enumerate(self._slots):
                written = [x[:, :sink_tokens].clone() for x in pair]
                for j, turn in enumerate(back):
                    frame = slice(j * n, (j + 1) * n)
                    pair[0][:, frame] = self._sink.turned(written[0][:, frame], turn)
                self._sink.evict(layer, *pair, plan)
                for x, bits in zip(self._memory(layer), written, strict=False):  # a view of k comes with it
                    x[:, :sink_tokens] = bits

    # ---- saving and copying a stream between chunks --------------------------------------------------------
    def state_dict(self) -> dict:
        """The stream between chunks: ``{"meta": {...}, "tensors": {...}}``, tensors cloned, valid slots
        only."""
        self._check_between("state_dict")
        return stream_file.state_of(self)

    def load_state_dict(self, state: dict) -> None:
        """Continue a saved stream, bit for bit. Everything is checked before anything is written."""
        targets, stream = stream_file.check_state(self, state)
        self.reset()
        for name, layers in targets.items():
            for target, source in zip(layers, state["tensors"][name].detach(), strict=True):
                target.copy_(source)
        self._restart(stream)

    def save(self, path) -> None:
        """Write the stream to a safetensors file (between chunks).

        Raises:
            OSError: the file cannot be written.
        """
        self._check_between("save")
        stream_file.save(self, path)

    def load(self, path) -> None:
        """Continue the stream of a file written by ``save`` on a cache of the same geometry, dtype and
        policy."""
        self.load_state_dict(stream_file.read(self, path))

    # copy and pickle: tensors that share memory (k, and each layer's view of it) would come back as tensors
    # that do not. So a copy is a new cache that continues the same stream; like state_dict, between chunks
    # only. copy.copy shares nothing either. The stream travels as bytes: PyTorch hands a spawned process the
    # shared memory of tensors, and that of our clones would be gone by then.
    def __getstate__(self) -> dict:
        self._check_between("__getstate__")
        return {"spec": self.spec, "sink": self.sink, "stream": stream_file.to_bytes(self.state_dict())}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["spec"], sink=state["sink"])
        self.load_state_dict(stream_file.from_bytes(state["stream"]))

    # ---- for the open chunk --------------------------------------------------------------------------------
    def _close(self, chunk: Chunk, how: str, stream: Stream) -> None:
        chunk._ended, self._chunk = how, None
        self._stream, self.next_frame = stream, stream.next_frame

    def _rollback(self, chunk: Chunk) -> None:
        if chunk.undo and chunk.written:
            self._copy_undo(chunk.plan, save=False)
        self._close(chunk, "rolled back", self._stream)

    def _break(self, chunk: Chunk, reason: str) -> None:
        """The end of a chunk that has written and cannot be taken back."""
        self._close(chunk, f"ended by {reason}", self._stream)
        self._broken = (
            f"a stream closed by {reason} in the frames {chunk.plan.t_begin}..{chunk.plan.t_end}, written"
            " without undo"
        )

    def _prepare(self, layer: int, plan: ChunkPlan) -> None:
        """What a chunk does in a layer before it writes keys. Frames that leave may be moved over, so the
        sink comes first."""
        n = self.spec.frame_tokens
        if plan.fresh:
            for tensor in self._sink.tensors.values():
                tensor[layer].zero_()
        if plan.sources is not None:
            self._sink.evict(layer, *self._slots[layer], plan)
        for source, target in plan.moves:
            for slots in self._memory(layer):
                slots[:, target * n : (target + 1) * n] = slots[:, source * n : (source + 1) * n]

    def _check_apart_from_sink(self, **inputs) -> None:
        """The eviction writes the sink's state before the append reads its inputs."""
        if torch.compiler.is_compiling():
            return  # traced tensors have no memory
        held = {t.untyped_storage().data_ptr() for t in self._sink.tensors.values()}
        for name, tensor in inputs.items():
            if tensor is not None and tensor.untyped_storage().data_ptr() in held:
                raise argument_error(
                    "Chunk.attend", name, "memory apart from the sink's state", "the state's own"
                )

    # ---- inside --------------------------------------------------------------------------------------------
    def _check_whole(self, what: str) -> None:
        if self._broken is not None:
            text = argument_error(
                f"{_OP}.{what}", "self", "a stream that goes on (reset it, or load one)", self._broken
            )
            raise StreamClosedError(str(text))

    def _check_between(self, what: str) -> None:
        self._check_whole(what)
        if self._chunk is not None:
            plan = self._chunk.plan
            found = f"the chunk [{plan.t_begin}, {plan.t_end}) still open (commit, rollback or reset it)"
            raise argument_error(f"{_OP}.{what}", "self", "no open chunk", found)

    def _check_sources(self, sources, leaving: Sequence[int]) -> None:
        """What a policy says must fit the schedule: a wrong one must not reach the device."""
        if sources is None:
            return
        most = self._sink.max_sources
        fits = len(sources) == self.spec.sink_frames and all(len(frames) <= most for frames in sources)
        if not fits or any(e not in leaving for frames in sources for e in frames):
            expected = (
                f"{self.spec.sink_frames} lists of at most {most} of the leaving frames {list(leaving)}"
            )
            raise argument_error(f"{type(self._sink).__name__}.sources", "result", expected, sources)

    def _check_leaving(self, window: Sequence[int], chosen, excess: int) -> list[int]:
        chosen = list(chosen)
        if len(chosen) < excess or len(set(chosen)) < len(chosen) or not set(chosen) <= set(window):
            expected = f"at least {excess} of the frames {list(window)} of the window"
            raise argument_error(f"{type(self._sink).__name__}.leaving", "result", expected, chosen)
        return chosen

    def _numbers(self, rule: str, numbers, count: int) -> tuple[float, ...]:
        """What a policy's rule gave: so many numbers; a log-weight may be -inf."""
        op, least = f"{type(self._sink).__name__}.{rule}", -math.inf if rule == "weights" else -(2**53)
        numbers = tuple(numbers)
        fits = all(isinstance(x, int | float) and least <= x < 2**53 for x in numbers)
        if len(numbers) != count or not fits:
            raise argument_error(op, "result", f"{count} numbers below 2**53", numbers)
        return numbers

    def _copy_undo(self, plan: ChunkPlan, *, save: bool) -> None:
        """Copy what the chunk will destroy into the save area, or back: O(chunk + sink) bytes."""
        n, area = self.spec.frame_tokens, self._undo

        def copy(cache_part: Tensor, saved_part: Tensor) -> None:
            target, source = (saved_part, cache_part) if save else (cache_part, saved_part)
            target.copy_(source)

        written = [*map(plan.ring.slot, range(plan.begin, plan.end)), *(to for _, to in plan.moves)]
        for layer in range(self.spec.layers):
            for name, slots in zip("kv", self._memory(layer), strict=False):
                for i, slot in enumerate(written):
                    copy(slots[:, slot * n : (slot + 1) * n], area[name][layer, :, i * n : (i + 1) * n])
        if plan.sources is not None or plan.fresh or self._sink.observes:
            sink_tokens = self.spec.sink_frames * n
            for layer in range(self.spec.layers if "sink_k" in area else 0):
                for name, slots in zip("kv", self._memory(layer), strict=False):
                    copy(slots[:, :sink_tokens], area[f"sink_{name}"][layer])
            for name, tensor in self._sink.tensors.items():
                copy(tensor, area[f"sink.{name}"])

    def _restart(self, stream: Stream) -> None:
        if self._chunk is not None:
            self._close(self._chunk, "voided by a reset or load", stream)
        self._broken = None
        self._stream, self.next_frame = stream, stream.next_frame


def _positions(op: str, position, frames: int) -> list[float]:
    """Temporal positions of a chunk's frames: of the first, or of each."""
    if isinstance(position, Sequence) and not isinstance(position, str):
        given = list(position)
        if len(given) != frames:
            raise argument_error(op, "position", f"one number, or {frames}", repr(position))
    else:
        given = [position]
    for x in given:
        if not abs(number(op, "position", x)) < stream_file.MOST_FRAMES:
            raise argument_error(op, "position", "a number within +-2**53, or None", repr(position))
    given = [x if is_integer(x) else float(x) for x in given]
    return given if isinstance(position, Sequence) else [given[0] + i for i in range(frames)]
