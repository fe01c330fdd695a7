"""Rows of one memory that stream alone: continuous batching, and pipelines whose samples are at different
frames.

Every row is a ``SinkWindowCache`` of one sample, over its part of the memory. It opens, seeks, resets, saves
and ends by itself. A forward serves the open chunks of any rows at once: ``SinkWindowRows.batch``. The plans
of all rows lie in one buffer on the device, so the ops take those of the rows of a forward as views of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import ArgumentError, argument_error, integer, refuse_transforms
from ..ops.rope_append import rope_append, rope_append_check
from ..ops.sink_window_attention import sink_window_attention
from . import compiled, stream_file
from .adopt import allocated
from .beside import Beside
from .cache import SinkWindowCache
from .chunk import _BEGUN, _DONE, Chunk, Norms, norms_of
from .grad import snapshot_is_wanted
from .plan import CacheSpec, PlanBuffers, is_integer
from .sinks import SinkPolicy

_OP = "SinkWindowRows"
_BATCH = "ChunkBatch"


class SinkWindowRows:
    """Keys and values of ``spec.batch`` streams that start, seek, reset and end alone, in one memory.

    Args:
        spec: as for ``SinkWindowCache``; ``batch`` is the number of rows.
        sink: the policy of every row, or a sequence of one a row. Each row has a state of its own.
        k, v: memory that the caller has allocated, as for ``SinkWindowCache``.

    ``rows[i]`` is row i, a ``SinkWindowCache`` of batch 1 with all that such a cache can do. ``len(rows)``
    and iteration go over the rows. A copy or a pickle is an object of its own that continues every stream.

    Attributes:
        spec: as given.
        k, v: ``[layers, B, L * n, H, D]``, or the tuple of the caller's layers.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        sink: SinkPolicy | Sequence[SinkPolicy],
        k: Tensor | Sequence[Tensor] | None = None,
        v: Tensor | Sequence[Tensor] | None = None,
    ):
        if not isinstance(spec, CacheSpec):
            raise argument_error(_OP, "spec", "a CacheSpec", type(spec).__name__)
        self.spec, self.sink = spec, tuple(sink) if isinstance(sink, Sequence) else sink
        sinks = self._for_each(_OP, "sink", self.sink, spec.batch)
        with torch.inference_mode(False):
            k, v = allocated(spec, k, v)
            apart = spec.value_dims is None
            one = dataclasses.replace(spec, batch=1)
            self._rows = tuple(
                SinkWindowCache(one, sink=sinks[i], k=_part(k, i), v=_part(v, i) if apart else None)
                for i in range(spec.batch)
            )
            needs = {(row._sink.max_sources, row._sink.weighs) for row in self._rows}
            if len(needs) > 1:  # one layout of the plans: that of the policies which need most
                sources, weighs = (max(need) for need in zip(*needs, strict=True))
                for row in self._rows:
                    row._buffers = PlanBuffers(one, sources, weighs)
            plans = [row._buffers.tensors for row in self._rows]
            #: Plans of the rows, as one tensor of each kind.
            self._plans = {name: torch.stack([plan[name] for plan in plans]) for name in plans[0]}
            for i, row in enumerate(self._rows):
                row._buffers.move_to({name: tensor[i] for name, tensor in self._plans.items()})
        self.k, self.v = k, v
        self._index = {id(row): i for i, row in enumerate(self._rows)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> SinkWindowCache:
        return self._rows[self._checked(f"{_OP}[]", "row", row)]

    def __iter__(self) -> Iterator[SinkWindowCache]:
        return iter(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of all rows."""
        return sum(row.nbytes for row in self._rows)

    # ---- a forward -----------------------------------------------------------------------------------------
    def batch(self, chunks: Iterable[Chunk]) -> ChunkBatch:
        """The open chunks of some rows, for forwards that serve all of them; sample i of the inputs belongs
        to ``chunks[i]``.

        The rows may be any, in any order, each at most once. The chunks have equal numbers of frames; they
        were opened by the rows, and may end at different times. A batch is made anew when the chunks change;
        it has no state, and two batches may share a chunk. Rows next to one another, or at equal distances,
        in ascending order, are views of the memory; otherwise queries and results are copied.

        Raises:
            ArgumentError: no chunk, one that is not open or not of these rows, a row twice, unequal frames.
        """
        return ChunkBatch(self, chunks)

    def chunk(
        self,
        frames: int,
        *,
        rows: Iterable[int] | None = None,
        start: int | Sequence[int | None] | None = None,
        position: float | Sequence | None = None,
        cut: bool = False,
        undo: bool = False,
    ) -> ChunkBatch:
        """Opens the next chunk of each row, for a ``with`` block at whose end all of them commit.

        Args:
            rows: the rows that take part; None for all.
            start, position: as for ``SinkWindowCache.chunk``: one for all rows, or a sequence of one a row.
            frames, cut, undo: as for ``SinkWindowCache.chunk``.
        Raises:
            ArgumentError, StreamClosedError: as ``SinkWindowCache.chunk``. No chunk has then been opened.
        """
        op = f"{_OP}.chunk"
        if rows is None:
            chosen = list(range(len(self)))
        elif isinstance(rows, Iterable):
            chosen = [self._checked(op, "rows", row) for row in rows]
        else:
            raise argument_error(op, "rows", "row numbers, or None for all", repr(rows))
        if not chosen or len(set(chosen)) < len(chosen):
            raise argument_error(op, "rows", "at least one row, and each once", chosen)
        starts, positions = (
            self._for_each(op, name, value, len(chosen))
            for name, value in (("start", start), ("position", position))
        )
        chunks, opened = [], []
        try:
            for i, first, place in zip(chosen, starts, positions, strict=True):
                before, row = self._rows[i]._chunk, self._rows[i]
                chunks.append(row.open(frames, start=first, position=place, cut=cut, undo=undo))
                if chunks[-1] is not before:
                    opened.append(chunks[-1])
        except BaseException as error:
            for chunk in opened:
                chunk.rollback()
            raise _of_row(error, chosen[len(chunks)]) from None
        return ChunkBatch(self, chunks)

    # ---- copying -------------------------------------------------------------------------------------------
    def __getstate__(self) -> dict:
        for i, row in enumerate(self._rows):
            try:
                row._check_between("__getstate__")
            except ArgumentError as error:
                raise _of_row(error, i) from None
        streams = [stream_file.to_bytes(row.state_dict()) for row in self._rows]
        return {"spec": self.spec, "sink": self.sink, "streams": streams}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["spec"], sink=state["sink"])
        for row, stream in zip(self._rows, state["streams"], strict=True):
            row.load_state_dict(stream_file.from_bytes(stream))

    # ---- inside --------------------------------------------------------------------------------------------
    def _checked(self, op: str, name: str, row) -> int:
        if not is_integer(row) or not 0 <= row < len(self._rows):
            raise argument_error(op, name, f"a row 0..{len(self._rows) - 1}", repr(row))
        return row

    def _for_each(self, op: str, name: str, value, rows: int) -> Sequence:
        if not isinstance(value, Sequence):
            return [value] * rows
        if len(value) != rows:
            raise argument_error(op, name, f"one, or one for each of the {rows} rows", f"{len(value)}")
        return value


def _part(slots: Tensor | tuple[Tensor, ...], row: int) -> Tensor | list[Tensor]:
    own = slice(row, row + 1)
    return slots[:, own] if isinstance(slots, Tensor) else [x[own] for x in slots]


def _each(part, *tensors: Tensor | None) -> list[Tensor | None]:
    """A part of each; of None, None."""
    return [None if x is None else part(x) for x in tensors]


def _of_row(error: BaseException, row: int) -> BaseException:
    """The error, which says whose it is."""
    if isinstance(error, ArgumentError | ArithmeticError):
        error.args = (f"{error} (row {row})",)
    return error


class _Run(NamedTuple):
    """Samples of a batch whose rows lie at equal distances, in ascending order."""

    samples: slice
    #: Their rows of the memory, and among the rows that the attention is given.
    rows: slice
    places: slice
    slots: Tensor
    angles: Tensor | None


class ChunkBatch(Beside):
    """The open chunks of some rows: one forward for all of them. From ``SinkWindowRows.batch`` or ``chunk``.

    Attributes:
        chunks: one a sample. Each can be committed or rolled back by itself; the batch then ends.
        rows: the row of each.
        frames: latent frames of each.
    """

    def __init__(self, owner: SinkWindowRows, chunks: Iterable[Chunk]):
        self._owner, self.chunks = owner, tuple(chunks)
        op = f"{_OP}.batch"
        if not self.chunks:
            raise argument_error(op, "chunks", "at least one open chunk", "none")
        for i, chunk in enumerate(self.chunks):
            if not isinstance(chunk, Chunk) or id(chunk.cache) not in owner._index:
                raise argument_error(op, f"chunks[{i}]", "an open chunk of these rows", repr(chunk))
            if not chunk.is_open:
                raise argument_error(op, f"chunks[{i}]", "an open chunk", repr(chunk))
        self.rows = tuple(owner._index[id(chunk.cache)] for chunk in self.chunks)
        if len(set(self.rows)) < len(self.rows):
            raise argument_error(op, "chunks", "at most one chunk of a row", f"rows {list(self.rows)}")
        lengths = [chunk.frames for chunk in self.chunks]
        if len(set(lengths)) > 1:
            raise argument_error(op, "chunks", "equal numbers of frames", lengths)
        self.frames = lengths[0]
        self._place()
        self._count()
        self._handle = compiled.handle_of(self)

    def __repr__(self) -> str:
        return f"ChunkBatch(rows {list(self.rows)}, {list(self.chunks)})"

    # ---- a layer's forward ---------------------------------------------------------------------------------
    def attend(
        self,
        layer: int | Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        q_norm=None,
        k_norm=None,
        norm: str | None = None,
        eps: float | None = None,
        softmax_scale: float | None = None,
        deterministic: bool | None = None,
    ) -> Tensor:
        """As ``Chunk.attend`` for every chunk, with one attention for all rows. Sample i of q, k and v
        belongs to ``chunks[i]``.

        A row has the result of the row alone: to rounding; with ``deterministic=True`` bit for bit, on the
        CPU and on Hopper. Nothing is read back from the device. Under grad the chunks attend one by one, with
        the contract of ``Chunk.attend``.

        Returns:
            ``[len(chunks), F * n, Hq, D]``, new.
        Raises:
            ArgumentError: before anything is written in any row.
        """
        norms = {"q_norm": q_norm, "k_norm": k_norm, "norm": norm, "eps": eps}
        if torch.compiler.is_compiling():
            return self._attend_compiled(layer, q, k, v, softmax_scale, deterministic, **norms)
        again = any(chunk._is_recomputation() for chunk in self.chunks)
        layer, found = self._checked("attend", layer, (q, k, v), norms, again)
        self.chunks[0]._check_attention(q, softmax_scale, deterministic)
        options = {"softmax_scale": softmax_scale, "deterministic": deterministic}
        if again or (torch.is_grad_enabled() and snapshot_is_wanted(q, k, v, found)):
            if not again:
                with torch.no_grad():
                    self._check_append(layer, *_each(Tensor.detach, q, k, v), found)
            alone = [
                chunk.attend(layer, *_each(lambda x, i=i: x[i : i + 1], q, k, v), **norms, **options)
                for i, chunk in enumerate(self.chunks)
            ]
            return torch.cat(alone)
        key_biases = [chunk._key_bias(layer) for chunk in self.chunks]
        rotated = self._append(layer, q, k, v, found)
        most = self._most  # what no row attends is not planned for
        k_slots, v_slots = (x[layer][self._span, :most] for x in (self._owner.k, self._owner.v))
        out = sink_window_attention(
            self._spread(rotated),
            k_slots,
            v_slots,
            kv_tokens=self._kv_tokens,
            kv_bias=self._weighed(key_biases),
            **options,
        )
        return out if len(self._runs) == 1 else torch.cat([out[run.places] for run in self._runs])

    #: Compiled code leaves its graph for it.
    _attend_uncompiled = torch._disable_dynamo(attend)

    def append(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        q_norm=None,
        k_norm=None,
        norm=None,
        eps=None,
    ) -> Tensor:
        """As ``Chunk.append`` for every chunk; ``chunks[i].kv(layer)`` has what sample i may attend."""
        options = {"q_norm": q_norm, "k_norm": k_norm, "norm": norm, "eps": eps}
        layer, norms = self._checked("append", layer, (q, k, v), options, False)
        rotated = self._append(layer, q, k, v, norms)
        return rotated[0] if len(rotated) == 1 else torch.cat(rotated)

    # ---- the end -------------------------------------------------------------------------------------------
    def commit(self) -> None:
        """Commit every chunk that is still open. One that fails ends as it does alone, and the others are
        committed all the same; then the first error is raised."""
        first = None
        for row, chunk in self._open("commit"):
            try:
                chunk.commit()
            except Exception as error:
                first = first or _of_row(error, row)
        if first is not None:
            raise first

    def rollback(self) -> None:
        """Roll back every chunk that is still open; none, if one of them cannot be."""
        chunks = self._open("rollback")
        for row, chunk in sorted(chunks, key=lambda c: c[1].undo or not c[1].written):
            try:
                chunk.rollback()
            except ArgumentError as error:
                raise _of_row(error, row) from None

    def __enter__(self) -> ChunkBatch:
        self._open("__enter__")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            if any(chunk.is_open for chunk in self.chunks):
                self.commit()
            return
        for chunk in self.chunks:
            chunk.__exit__(kind, error, traceback)

    # ---- inside --------------------------------------------------------------------------------------------
    def _open(self, what: str) -> list[tuple[int, Chunk]]:
        found = [(row, chunk) for row, chunk in zip(self.rows, self.chunks, strict=True) if chunk.is_open]
        if not found:
            raise argument_error(f"{_BATCH}.{what}", "self", "an open chunk", repr(self))
        return found

    def _place(self) -> None:
        """Which rows of the memory the attention is given, and the runs of samples in it."""
        ordered = sorted(self.rows)
        step = math.gcd(*(b - a for a, b in zip(ordered, ordered[1:], strict=False))) or 1
        first, last = ordered[0], ordered[-1]
        self._span = slice(first, last + 1, step)
        self._span_rows = (last - first) // step + 1
        begins = [0] + [i for i in range(1, len(self.rows)) if self.rows[i] != self.rows[i - 1] + step]
        plans, self._runs = self._owner._plans, []
        self._bias = plans["bias"][self._span] if "bias" in plans else None
        for begin, end in zip(begins, [*begins[1:], len(self.rows)], strict=True):
            rows = slice(self.rows[begin], self.rows[end - 1] + 1, step)
            at = (self.rows[begin] - first) // step
            _, angles, self._axes, *_ = self._owner._rows[0]._buffers.views(self.frames)
            if angles is not None:
                angles = plans["floats"][rows, : angles.shape[1]]
            slots = plans["ints"][rows, : self.frames]
            self._runs.append(_Run(slice(begin, end), rows, slice(at, at + end - begin), slots, angles))

    def _count(self) -> None:
        """What each row attends: one number where all rows of the span agree, else one upload."""
        tokens = [chunk.kv_tokens for chunk in self.chunks]
        self._most, self._kv_tokens = max(tokens), tokens[0]
        if len(set(tokens)) == 1 and self._span_rows == len(tokens):
            return
        spread = [0] * self._span_rows
        for run in self._runs:
            spread[run.places] = tokens[run.samples]
        # The pinned memory is not used again before the copy is done: PyTorch's allocator sees to it.
        device = self._owner.k[0].device
        host = torch.tensor(spread, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._kv_tokens = host.to(device, non_blocking=True)

    def _weighed(self, key_biases: Sequence[Tensor | None]) -> Tensor | None:
        """The bias of every row of the span: of its frames, and of its keys."""
        most = self._most
        frames = None if self._bias is None else self._bias[:, :most]
        if all(bias is None for bias in key_biases):
            return frames
        none = torch.zeros(1, most, dtype=torch.float32, device=self._owner.k[0].device)
        spread = [none] * self._span_rows
        for run in self._runs:
            spread[run.places] = [
                none if bias is None else bias.view(1, -1)[:, :most] for bias in key_biases[run.samples]
            ]
        keys = torch.cat(spread)
        return keys if frames is None else keys + frames

    def _spread(self, rotated: list[Tensor]) -> Tensor:
        """The queries as the span has its rows; zeros for those that take no part."""
        if len(rotated) == 1:
            return rotated[0]
        out = rotated[0].new_zeros(self._span_rows, *rotated[0].shape[1:])
        for run, part in zip(self._runs, rotated, strict=True):
            out[run.places] = part
        return out

    def _checked(self, what: str, layer, inputs, norms: dict, again: bool) -> tuple[int, Norms]:
        """The layer as a number, and the norms as the ops take them."""
        refuse_transforms(f"{_BATCH}.{what}")
        number = self.chunks[0]._number_of(what, layer)
        for row, chunk in zip(self.rows, self.chunks, strict=True):
            try:
                if not again:
                    chunk._check_open(what)
                if chunk._evicted[number] == _BEGUN:
                    expected = "a layer whose eviction was not interrupted"
                    raise argument_error(f"{_BATCH}.{what}", "layer", expected, number)
            except ArgumentError as error:
                raise _of_row(error, row) from None
        latent = self._owner.spec.value_dims is not None
        if latent:
            self.chunks[0]._check_values(what, inputs[2])
        for name, x in zip("qk" if latent else "qkv", inputs, strict=False):
            samples = len(self.chunks)
            if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] != samples:
                found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                expected = f"[B, F * n, H, D] of {samples} samples, one a chunk"
                raise argument_error(f"{_BATCH}.{what}", name, expected, found)
        return number, norms_of(self._owner.spec, **norms)

    def _attend_compiled(self, layer, q, k, v, softmax_scale, deterministic, **norms) -> Tensor:
        """What a compiler traces, as for a chunk: neither the layer nor which rows these are."""
        if not isinstance(layer, Tensor):
            layer = integer(f"{_BATCH}.attend", "layer", layer)
        found = norms_of(self._owner.spec, **norms)
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in (q, k, v, found.q_weight, found.k_weight)
        ):
            options = {"softmax_scale": softmax_scale, "deterministic": deterministic}
            return self._attend_uncompiled(layer, q, k, v, **norms, **options)
        dim = self._owner.spec.value_dim
        return compiled.attend(self._handle, layer, q, k, v, *found, softmax_scale, deterministic, dim)

    def _norms_of_q(self, q_norm, norm, eps) -> Norms:
        return norms_of(self._owner.spec, q_norm, None, norm, eps)

    def _answer(self, layer, q, q_weight, norm, eps) -> tuple[Tensor, Tensor]:
        """Row by row: each has a state of its own. Rows whose policy answers nothing have zeros beside those
        that do."""
        if not isinstance(q, Tensor) or q.dim() != 4 or q.shape[0] != len(self.chunks):
            found = list(q.shape) if isinstance(q, Tensor) else type(q).__name__
            expected = f"[B, F * n, H, D] of {len(self.chunks)} samples, one a chunk"
            raise argument_error(f"{_BATCH}.beside", "q", expected, found)
        silent = [not chunk.cache._sink.answers for chunk in self.chunks]
        parts = []
        for i, chunk in enumerate(self.chunks):
            one = q[i : i + 1]
            if silent[i] and not all(silent):
                parts.append((torch.zeros_like(one), q.new_zeros(1, 1, 1, 1)))
                continue
            try:
                parts.append(chunk._answer(layer, one, q_weight, norm, eps))
            except ArgumentError as error:
                raise _of_row(error, self.rows[i]) from None
        answers, weights = zip(*parts, strict=True)
        return torch.cat(answers), torch.cat(weights)

    @property
    def hears(self) -> bool:
        """Whether the policy of any row wants to be told the text."""
        return any(chunk.hears for chunk in self.chunks)

    def _hear(self, layer, text: Tensor) -> None:
        if not isinstance(text, Tensor) or text.dim() != 4 or text.shape[0] != len(self.chunks):
            found = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            expected = f"[B, T, H, D] of {len(self.chunks)} samples, one a chunk"
            raise argument_error(f"{_BATCH}.tell", "text", expected, found)
        for i, chunk in enumerate(self.chunks):
            if chunk.hears:
                chunk._hear(layer, text[i : i + 1])

    def _calls(self, layer: int, q, k, v, norms) -> list[tuple[tuple, dict]]:
        """Arguments of the append, a run each."""
        owner = self._owner
        k_slots, v_slots = owner.k[layer], owner.v[layer]
        common = {
            "axes": self._axes,
            "layout": owner.spec.layout,
            "q_weight": norms.q_weight,
            "k_weight": norms.k_weight,
            "norm": norms.norm,
            "eps": norms.eps,
        }
        return [
            (
                (
                    *_each(lambda x, run=run: x[run.samples], q, k, v),
                    k_slots[run.rows],
                    None if v is None else v_slots[run.rows],
                ),
                {"slots": run.slots, "angles": run.angles, **common},
            )
            for run in self._runs
        ]

    def _check_append(self, layer: int, q, k, v, norms) -> list[tuple[tuple, dict]]:
        """Refuse here what would be refused once some rows had been written."""
        calls = self._calls(layer, q, k, v, norms)
        waiting = [chunk for chunk in self.chunks if chunk._evicted[layer] != _DONE]
        if waiting or len(calls) > 1:
            try:
                for tensors, options in calls:
                    rope_append_check(*tensors, **options)
                for chunk in waiting:
                    chunk._check_told(layer)
                    chunk.cache._check_apart_from_sink(q=q, k=k, v=v)
            except ArgumentError as error:
                raise self._blamed(error, q, k, v) from None
        return calls

    def _append(self, layer: int, q, k, v, norms) -> list[Tensor]:
        calls = self._check_append(layer, q, k, v, norms)
        for i, chunk in enumerate(self.chunks):
            if chunk._evicted[layer] != _DONE:
                own = _each(lambda x, i=i: x[i : i + 1], q, k, v)
                chunk._evict(layer, *own, chunk._options(norms))
        try:
            rotated = [rope_append(*tensors, **options) for tensors, options in calls]
        except ArgumentError as error:
            raise self._blamed(error, q, k, v) from None
        for run, part in zip(self._runs, rotated, strict=True):
            for i, chunk in enumerate(self.chunks[run.samples]):
                if chunk.cache._sink.observes:
                    slots = chunk.cache._slots[layer]
                    chunk.cache._sink.observe(layer, part[i : i + 1], *slots, chunk.plan)
        for chunk in self.chunks:
            chunk._appended[layer] = True
        return rotated

    def _blamed(self, error: ArgumentError, q, k, v) -> ArgumentError:
        return self.chunks[0]._blamed(error, q, k, v, samples=len(self.chunks))
