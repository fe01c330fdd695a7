"""The Self-Forcing family on this library, in one line:

    unpatch = rf_kernels.integrations.wan.patch(pipeline.generator)

Every self-attention module of the model is found by what it looks like (``SelfAttention.looks_like``) and
gets a forward of ours; ``unpatch()`` gives it its own back. Pipelines, their lists of dictionaries,
``current_start`` and the index tensors go on working. docs/integrations.md says which systems were tried,
and where they compute something else than this library does.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._backend import argument_error, choice
from ..cache import EMASink, NoSink, StaticSink
from ..positions import RoPE, RoPE3D
from ._wan_stream import Geometry, Norms, Streams

_OP = "integrations.wan.patch"
#: Where a dictionary of a pipeline's kv_cache keeps its streams.
KEY = "rf_kernels"
_FORWARD = "integrations.wan"
#: Arguments of the family's forwards that are understood, or that change nothing where a cache is attended.
_ARGUMENTS = {
    *("x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "current_end"),
    *("cache_start", "causal_rope_cache", "sink_recache_after_switch", "t_scale", "use_relative_rope"),
    *("method", "original_seq_len", "temporal_offset"),
}


@dataclass(frozen=True)
class Family:
    """How the systems differ, where it matters.

    Attributes:
        relative: keys are rotated when they are read, at positions that count from the window's start; else
            once, at absolute frames.
        averages: frames that leave are averaged into the sink (Reward Forcing).
        sink_in_slice: the sink is a part of what is attended when the window is smaller than the cache;
            Self-Forcing attends the newest tokens of the cache, and then its sink is not among them.
        rows_apart: samples have positions of their own, and positions may jump (StreamDiffusionV2).
        always_evicts: whatever ``local_attn_size`` says.
        scheduled: the number of attended frames may change between forwards of a stream (LongLive's schedule
            over the denoising steps); the cache then keeps what it has room for.
        returns_update: the forward returns what the model then writes to the cache (LongLive).
    """

    name: str
    relative: bool = False
    averages: bool = False
    sink_in_slice: bool = True
    rows_apart: bool = False
    always_evicts: bool = False
    scheduled: bool = False
    returns_update: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("self_forcing", sink_in_slice=False),
        Family("reward_forcing", relative=True, averages=True),
        Family("infinite_forcing", relative=True),
        Family("longlive", scheduled=True, returns_update=True),
        Family("longlive2", returns_update=True),
        Family("streamdiffusionv2", rows_apart=True),
        Family("scope_streamdiffusionv2", always_evicts=True),
    )
}


def patch(model: nn.Module, family: str = "auto", *, state: str = "compensated") -> Callable[[], None]:
    """Let the causal self-attention of a model of the Self-Forcing family run on this library.

    Args:
        model: the model, or anything that contains it (a generator wrapper, a pipeline that is a module).
        family: "self_forcing" (also Causal-Forcing and other forks that rotate keys once), "reward_forcing",
            "infinite_forcing", "longlive", "longlive2", "streamdiffusionv2"; Scope's copy of the latter,
            "scope_streamdiffusionv2"; "auto" tells all others by the attention module: its attributes and the
            arguments of its forward.
        state: precision of an averaged sink, see ``EMASink``; "published" rounds as Reward Forcing's code.

    Window, sink and alpha are read from the modules (``local_attn_size``, ``max_attention_size``,
    ``sink_size``, ``compression_alpha``) when a stream begins. A forward without ``kv_cache`` is the
    module's own.

    The dictionary's tensors hold the slots of the cache; their order is this library's. Its index tensors
    are kept current, and are read on the host only when somebody else has written them. Unpatch between
    streams: a stream that has begun goes on only while patched.

    Under grad the values are those without, to rounding. The gradient of a cached key or value goes to the
    last forward under grad that wrote it, as in the family's own code. Backward may come after later chunks.

    Returns:
        ``unpatch()``, which restores the modules.
    Raises:
        ArgumentError: no such module in the model, one that is patched already, or an unknown family.
    """
    if not isinstance(model, nn.Module):
        raise argument_error(_OP, "model", "an nn.Module", type(model).__name__)
    choice(_OP, "family", ("auto", *FAMILIES), family)
    found = [(name, m) for name, m in model.named_modules() if SelfAttention.looks_like(m)]
    if not found:
        raise argument_error(
            _OP,
            "model",
            "a model with causal self-attention modules (q, k, v, o, norm_q, norm_k, num_heads, and a forward"
            " with grid_sizes, freqs, kv_cache and current_start)",
            f"none among the {sum(1 for _ in model.modules())} modules of a {type(model).__name__}",
        )
    updates = any(hasattr(m, "_apply_cache_updates") for m in model.modules())
    patched = []
    for name, module in found:
        if isinstance(module.__dict__.get("forward"), SelfAttention):
            raise argument_error(_OP, "model", "modules that are not patched yet", f"{name}, patched")
        kind = FAMILIES[family] if family != "auto" else _family_of(name, module)
        if updates and not kind.returns_update:
            kind = replace(kind, returns_update=True)
        patched.append((module, SelfAttention(module, kind, state)))
    _keep_out_of_graphs()
    for _, forward in patched:
        forward.install()

    def unpatch() -> None:
        for module, forward in patched:
            if module.__dict__.get("forward") is forward:
                forward.uninstall()

    return unpatch


def _family_of(name: str, module: nn.Module) -> Family:
    """By duck typing, of the forward's arguments and of the names that its code uses."""
    code, arguments = _code(module), _arguments(module)
    reads_raw = not {"deepcopy", "block_relativistic_rope"}.isdisjoint(code.co_names)
    updates = "cache_update_info" in code.co_varnames
    if hasattr(module, "compression_alpha") or hasattr(module, "incremental_update"):
        kind = FAMILIES["reward_forcing"]
    elif "use_relative_rope" in arguments or "temporal_offset" in arguments:
        kind = FAMILIES["longlive2"]
    elif "sink_recache_after_switch" in arguments:
        kind = replace(FAMILIES["longlive"], relative=reads_raw)
    elif hasattr(module, "adapt_sink_thr") or hasattr(module, "evict_idx"):
        kind = FAMILIES["streamdiffusionv2"]
    elif hasattr(module, "local_attn_size"):
        kind = FAMILIES["infinite_forcing" if reads_raw else "self_forcing"]
    else:
        raise argument_error(_OP, "family", f"a name ({', '.join(FAMILIES)}) for {name}", "'auto'")
    unknown = sorted(set(arguments) - _ARGUMENTS)
    if unknown:
        raise argument_error(
            _OP,
            "family",
            f"a name ({', '.join(FAMILIES)}) for {name}, whose forward takes arguments of its own: {unknown}",
            "'auto'",
        )
    return replace(kind, returns_update=kind.returns_update or updates)


@functools.cache
def _keep_out_of_graphs() -> None:
    """A compiled model breaks its graph where a cache is attended: chunks are opened on the host. This does
    not belong at the import of the module, because PyTorch takes seconds to import its compiler."""
    SelfAttention._cached = torch.compiler.disable(SelfAttention._cached)


def _original(module: nn.Module) -> Callable:
    return inspect.unwrap(type(module).forward)


def _code(module: nn.Module):
    return _original(module).__code__


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Name -> default of the forward's arguments, without self."""
    try:
        parameters = list(inspect.signature(_original(module)).parameters.values())[1:]
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters}


class _HostValues:
    """Integers of small tensors on the host. One read serves all layers of a forward: they are given the same
    tensor."""

    def __init__(self):
        self._seen: tuple | None = None

    def __call__(self, value) -> list | int:
        if not isinstance(value, Tensor):
            return value if isinstance(value, list | tuple | int) else int(value)
        version = _version(value)
        seen = self._seen
        if seen is not None and seen[0]() is value and version is not None and seen[1] == version:
            return seen[2]
        values = value.tolist()
        self._seen = (weakref.ref(value), version, values)
        return values


def _version(tensor: Tensor) -> int | None:
    """Counts the writes to a tensor; None where PyTorch does not."""
    return None if tensor.is_inference() else tensor._version


_grids, _starts = _HostValues(), _HostValues()


class _Binding:
    """The streams in one dictionary: one, or one a sample."""

    def __init__(self, k: Tensor, v: Tensor, settings: tuple, geometry: Geometry, rows_apart: bool):
        self.k, self.v, self.settings, self.geometry = k, v, settings, geometry
        self.together = Streams(k, v, geometry, rows_apart)
        self.streams = self.together.each
        #: Frames by which a sample's position is ahead of its frame in the stream (it may jump).
        self.ahead = [0] * len(self.streams)
        #: How often the position of the pinned chunk had been written when it was read.
        self.pin_version: int | None = -1
        #: The index tensors as they were left: (tensor, version, values).
        self.indices: list[tuple[Tensor, int | None, list]] = []

    def has_memory(self, k: Tensor, v: Tensor) -> bool:
        def place(t):
            return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device

        return all(a is b or place(a) == place(b) for a, b in ((self.k, k), (self.v, v)))

    def continues(self, other: _Binding) -> None:
        """Go on with the streams of tensors that were copied, or repeated for more samples."""
        for i, stream in enumerate(self.streams):
            source = i if len(other.streams) == len(self.streams) else 0
            stream.continues(other.streams[source])
            self.ahead[i] = other.ahead[source]

    def indices_changed(self, kv_cache: dict) -> bool:
        """Whether somebody else has written the index tensors. The host waits for the device only then."""
        for name, (tensor, version, values) in zip(
            ("global_end_index", "local_end_index"), self.indices, strict=False
        ):
            now = kv_cache[name]
            if now is tensor and version is not None and now._version - version in (0, 1):
                continue  # the model itself may have written what it was told (LongLive)
            if now.flatten().tolist() != values:
                return True
        return False

    def note_pin(self, kv_cache: dict, frames: int) -> None:
        """LongLive 2.0 pins a chunk at a scene cut: where it lies in the system's own order of slots."""
        position = kv_cache.get("pinned_start")
        if position is None or (version := _version(position)) == self.pin_version is not None:
            return
        n, geometry = self.geometry.frame_tokens, self.geometry
        start, tokens = int(position), int(kv_cache["pinned_len"])
        pins = start >= 0 and tokens > 0
        if pins:
            whole = geometry.window_frames % frames == 0 and not (start % n or tokens % n)
            held = geometry.sink_frames + geometry.window_frames == geometry.room_frames
            wanted = {
                "one in memory whose writes PyTorch counts (not torch.inference_mode)": version is not None,
                "keys that are rotated once (no use_relative_rope)": not geometry.policy.rephase,
                f"a window of whole chunks (now {geometry.window_frames} frames, chunks of {frames})": whole,
                "a window as large as the cache": held,
            }
            for expected, fits in wanted.items():
                if not fits:
                    raise argument_error(_FORWARD, "kv_cache", f"with a pinned chunk {expected}", "another")
        for stream in self.streams:
            ahead = min(stream.frames, geometry.room_frames) - start // n
            stream.pin(stream.frames - ahead, tokens // n) if pins else stream.pin(0, 0)
        self.pin_version = version

    def note_indices(self, kv_cache: dict, ends: list[int], local: list[int]) -> None:
        self.indices = []
        for name, values in (("global_end_index", ends), ("local_end_index", local)):
            tensor = kv_cache[name]
            if len(values) == 1 or len(set(values)) == 1:
                tensor.fill_(values[0])
            else:
                for i, value in enumerate(values):
                    tensor[i].fill_(value)
            self.indices.append(
                (tensor, _version(tensor), [values[0]] * tensor.numel() if len(values) == 1 else values)
            )


class SelfAttention:
    """The forward that stands in for that of one self-attention module."""

    def __init__(self, module: nn.Module, family: Family, state: str):
        self.module, self.family, self.state = module, family, state
        self.defaults = _arguments(module)
        self.names = tuple(self.defaults)
        self.unknown = [name for name in self.names if name not in _ARGUMENTS]
        self._before = module.__dict__.get("forward")
        self.original = module.forward

    @staticmethod
    def looks_like(module: nn.Module) -> bool:
        parts = ("q", "k", "v", "o", "norm_q", "norm_k")
        if not all(isinstance(getattr(module, name, None), nn.Module) for name in parts):
            return False
        wanted = {"grid_sizes", "freqs", "kv_cache", "current_start"}
        return hasattr(module, "num_heads") and wanted <= set(_arguments(module))

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def uninstall(self) -> None:
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before

    # ---- the forward ---------------------------------------------------------------------------------------
    def __call__(self, *args, **kwargs):
        given = self.defaults | dict(zip(self.names, args, strict=False)) | kwargs
        return self.original(*args, **kwargs) if given["kv_cache"] is None else self._cached(given)

    def _cached(self, given: dict):
        kv_cache = given["kv_cache"]
        module, x = self.module, given["x"]
        _, rows, columns = _grids(given["grid_sizes"])[0]
        grid, n = (rows, columns), rows * columns
        frames, rest = divmod(x.shape[1], n)
        if rest:
            raise argument_error(_FORWARD, "x", f"whole frames of {n} tokens", f"{x.shape[1]} tokens")
        binding, afresh = self._bound(kv_cache, grid, given)
        binding.note_pin(kv_cache, frames)
        seen = self._attended(n, binding.geometry.room_frames) if self._is_scheduled() else None
        positions = self._positions(given["current_start"], n, len(binding.streams))
        if given.get("sink_recache_after_switch") and positions[0]:
            afresh = True  # LongLive writes window and sink anew

        q, k, v = module.q(x), module.k(x), module.v(x)
        norms = self._norms(q.shape[-1], binding.k.dtype)
        if norms is None:
            q, k, norms = module.norm_q(q), module.norm_k(k), Norms()
        made = v.dtype
        q, k, v = (t.to(binding.k.dtype).unflatten(-1, (module.num_heads, -1)) for t in (q, k, v))

        offset = self._offset(given) if binding.geometry.moved else None
        turns = []
        for i, (stream, position) in enumerate(zip(binding.streams, positions, strict=True)):
            start = self._frame(binding, i, position, frames, afresh)
            place = None if offset is None else position + offset
            turns.append(stream.at(start, frames, place, afresh=afresh))
        out = binding.together.attend(turns, q, k, v, norms, seen)

        ends = [(position + frames) * n for position in positions]
        local = [min(stream.frames, binding.geometry.room_frames) * n for stream in binding.streams]
        if not any(stream.recomputes for stream in binding.streams):
            binding.note_indices(kv_cache, ends, local)
        out = module.o(out.to(made).flatten(2))
        return (out, (ends[0], local[0], None)) if self.family.returns_update else out

    # ---- inside --------------------------------------------------------------------------------------------
    def _positions(self, current_start, n: int, rows: int) -> list[int]:
        """First frame of the chunk, of each row."""
        tokens = _starts(current_start)
        tokens = [tokens] if isinstance(tokens, int) else list(tokens)
        if len(set(tokens)) == 1:
            tokens = tokens[:1] * rows
        if len(tokens) != rows:
            found = f"{len(tokens)} different ones"
            raise argument_error(_FORWARD, "current_start", "one for all samples of the batch", found)
        if any(t % n for t in tokens):
            raise argument_error(_FORWARD, "current_start", f"a multiple of {n} tokens, a frame", tokens)
        return [t // n for t in tokens]

    def _frame(self, binding: _Binding, row: int, position: int, frames: int, afresh: bool) -> int:
        """Frame of the stream at which a chunk begins. A stream whose positions jump goes on all the same."""
        if not self.family.rows_apart:
            return position
        turn, ahead = binding.streams[row].turn, binding.ahead
        if afresh or turn is None or position == 0:
            ahead[row] = 0 if turn is None or position == 0 or afresh else ahead[row]
        elif position - ahead[row] not in (turn.start, turn.start + turn.frames):
            ahead[row] = position - (turn.start + turn.frames)
        return position - ahead[row]

    def _norms(self, width: int, dtype: torch.dtype) -> Norms | None:
        """The RMSNorms as the ops take them; None where the modules have to be called."""
        found = []
        for norm in (self.module.norm_q, self.module.norm_k):
            weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
            if isinstance(norm, nn.Identity):
                found.append((None, None))
                continue
            plain = not norm._forward_hooks and not norm._forward_pre_hooks and "forward" not in norm.__dict__
            known = type(norm).__name__.endswith("RMSNorm") and isinstance(weight, Tensor)
            fits = known and weight.shape == (width,) and weight.dtype in (dtype, torch.float32)
            if not (plain and fits and isinstance(eps, float) and getattr(norm, "bias", None) is None):
                return None
            found.append((weight, eps))
        (q_weight, eps), (k_weight, k_eps) = found
        if eps != k_eps:
            return None
        return Norms() if eps is None else Norms(q_weight, k_weight, "model", eps)

    def _offset(self, given: dict) -> float:
        """Frames by which the positions of a chunk are beyond those of its start."""
        offset = given.get("temporal_offset", 0.0)
        if isinstance(offset, Tensor) and offset.dim() == 0:
            offset = float(offset)
        if not isinstance(offset, int | float):
            found = f"{type(offset).__name__} of several"
            raise argument_error(_FORWARD, "temporal_offset", "one number for the chunk", found)
        return offset

    def _bound(self, kv_cache: dict, grid: tuple, given: dict) -> tuple[_Binding, bool]:
        """The streams of a dictionary, and whether they begin anew."""
        k, v = kv_cache["k"], kv_cache["v"]
        self._refuse(kv_cache, given)
        module = self.module
        settings = (
            grid,
            *(getattr(module, name, None) for name in ("local_attn_size", "sink_size")),
            None if self._is_scheduled() else getattr(module, "max_attention_size", None),
            getattr(module, "global_sink_size", 0),
            getattr(module, "compression_alpha", None),
            given.get("use_relative_rope", False),
            given.get("t_scale", 1.0),
        )
        held: _Binding | None = kv_cache.get(KEY)
        if held is not None and held.has_memory(k, v):
            if held.k is not k or held.v is not v:  # the same memory, detached from what was written
                held.k, held.v = k, v
                for stream in held.streams:
                    stream.forget()
            changed = held.indices_changed(kv_cache)
            if not changed and held.settings == settings:
                return held, False
            if not changed and _starts(given["current_start"]) not in (0, [0]):
                found = f"{settings}, not {held.settings}"
                raise argument_error(_FORWARD, "self", "settings that stay over a stream", found)
        else:
            changed = False
        ends = [kv_cache[name].flatten().tolist() for name in ("global_end_index", "local_end_index")]
        begun = any(map(any, ends))
        moved = held is not None and not changed and not held.has_memory(k, v)
        if begun and not moved and (held is None or changed):
            raise argument_error(
                _FORWARD,
                "kv_cache",
                "an empty one (index tensors 0), or the stream as the patched model left it",
                f"global_end_index {ends[0]}, local_end_index {ends[1]}",
            )
        geometry = self._geometry(k, grid, given)
        binding = _Binding(k, v, settings, geometry, self.family.rows_apart)
        if begun and moved:
            binding.continues(held)
        kv_cache[KEY] = binding
        return binding, not begun

    def _refuse(self, kv_cache: dict, given: dict) -> None:
        for name in self.unknown:
            value, usual = given[name], self.defaults[name]
            if value is not usual and (isinstance(value, Tensor) or value != usual):
                raise argument_error(_FORWARD, name, f"{usual!r}: it is not understood here", repr(value))
        if given.get("method", "linear") != "linear":
            raise argument_error(_FORWARD, "method", "'linear'", repr(given["method"]))
        if kv_cache.get("quantized"):
            raise argument_error(_FORWARD, "kv_cache", "one in a floating-point type", "a quantized one")
        if getattr(self.module, "adapt_sink_thr", -1) > -1:
            found = self.module.adapt_sink_thr
            raise argument_error(_FORWARD, "adapt_sink_thr", "-1 (a sink that is not refreshed)", found)

    def _is_scheduled(self) -> bool:
        return self.family.scheduled and not self.family.relative

    def _attended(self, n: int, room: int) -> int:
        """Frames of the cache that are attended."""
        seen = getattr(self.module, "max_attention_size", room * n)
        return min(room, seen // n) if seen % n == 0 else room

    def _geometry(self, k: Tensor, grid: tuple, given: dict) -> Geometry:
        module, family, n = self.module, self.family, grid[0] * grid[1]
        room = k.shape[1] // n
        local = getattr(module, "local_attn_size", 0)
        rolls = family.always_evicts or not isinstance(local, int) or local != -1
        # Constructors write 1560 tokens a frame, whatever the frames are: what is no number of frames was not
        # meant for these.
        length = room if self._is_scheduled() else self._attended(n, room)
        kept = max(int(getattr(module, "sink_size", 0)), int(getattr(module, "global_sink_size", 0)))
        relative = family.relative or bool(given.get("use_relative_rope", False))
        ends = None
        if not rolls:
            ends = "local_attn_size is -1: nothing is evicted"
        if length < room and not family.sink_in_slice:
            kept = 0
        if kept == 0:
            policy = NoSink()
        elif family.averages and length == room:
            policy = EMASink(alpha=float(getattr(module, "compression_alpha", 0.999)), state=self.state)
        else:
            policy = StaticSink(rephase=relative)
            if family.averages:
                ends = "its sink absorbs what leaves the cache, and the window is smaller than that"
        rope, scale = _rope(given["freqs"], k.shape[-1]), float(given.get("t_scale", 1.0))
        if scale != 1:
            rope = rope.with_frequencies(0, scale * rope.frequencies(0))
        return Geometry(
            grid=grid,
            sink_frames=kept,
            window_frames=length - kept,
            room_frames=room,
            ends=ends,
            policy=policy,
            rope=rope,
            moved=family.rows_apart or ("temporal_offset" in self.defaults and not relative),
        )


def _frequencies(freqs: Tensor) -> np.ndarray | None:
    """Radians per position of each column of a table ``[positions, pairs]`` of unit complex numbers; None of
    another table. Rows far on tell what the second one has lost to rounding."""
    table = freqs.detach().cpu()
    tolerance = 1e-6 if table.dtype == torch.complex128 else 1e-4
    if not table.is_complex() or table.dim() != 2 or len(table) < 2:
        return None
    numbers = table.to(torch.complex128).numpy()
    angles = np.angle(numbers)

    def wrapped(x):
        return (x + np.pi) % (2 * np.pi) - np.pi

    found, row = angles[1].copy(), 2
    while row < len(angles):
        found += wrapped(angles[row] - row * found) / row
        row *= 2
    off = wrapped(angles - np.outer(np.arange(len(angles)), found))
    whole = np.abs(off).max() < tolerance and np.abs(np.abs(numbers) - 1).max() < tolerance
    return found if whole else None


_ropes: list[tuple[weakref.ref, RoPE]] = []


def _rope(freqs: Tensor, head_dim: int) -> RoPE:
    """The rotation that a model's table ``freqs`` ``[positions, head_dim / 2]`` of complex numbers holds."""
    for ref, rope in _ropes:
        if ref() is freqs:
            return rope
    rope, found = RoPE3D.wan(head_dim), _frequencies(freqs)
    if found is None or found.size != rope.total_pairs:
        expected = f"unit rotations by position times a frequency, {rope.total_pairs} a row (Wan's split)"
        raise argument_error(_FORWARD, "freqs", expected, f"another table, {tuple(freqs.shape)}")
    wanted = [rope.frequencies(axis) for axis in range(3)]
    for axis, own in enumerate(np.split(found, np.cumsum(rope.pairs)[:2])):
        if not np.allclose(own, wanted[axis], rtol=1e-5, atol=0):
            rope = rope.with_frequencies(axis, own)
    _ropes[:] = [(ref, known) for ref, known in _ropes if ref() is not None][-8:]
    _ropes.append((weakref.ref(freqs), rope))
    return rope
