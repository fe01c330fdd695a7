"""A stream between chunks, as tensors with a description, and as a safetensors file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._backend import ArgumentError, argument_error
from .plan import is_integer
from .stream import Stream

if TYPE_CHECKING:
    from .cache import SinkWindowCache

_FORMAT = "rf_kernels.stream"
#: Of a stream that began with frame 0 and never went back, and of any other, whose slots are listed.
_FORMAT_VERSION, _LISTED_VERSION = 2, 3
_OP = "SinkWindowCache"
#: Positions are exact in float64 up to here.
MOST_FRAMES = 2**53


def identity_of(cache: SinkWindowCache) -> dict:
    """What a saved stream must share with the cache that continues it, in JSON types."""
    spec, rope = cache.spec, cache.spec.rope
    # Frequencies that are given are part of the rope; without them the entry is what it has always been.
    given = (
        [] if rope is None or rope.given is None else [[None if g is None else list(g) for g in rope.given]]
    )
    own = {} if spec.value_dims is None else {"value_dims": list(spec.value_dims)}
    return own | {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "geometry": [spec.layers, spec.batch, spec.heads, spec.head_dim, *spec.grid],
        "sink_frames": spec.sink_frames,
        "window_frames": spec.window_frames,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "sink": cache.sink.identity(),
        "rope": None
        if rope is None
        else [list(rope.pairs), list(rope.bases), rope.layout, rope.temporal_axis, *given],
    }


def _parts(cache: SinkWindowCache, stream: Stream) -> dict[str, list[Tensor]]:
    """The tensors of a stream, as they lie in a cache, layer by layer."""
    valid = len(stream.held) * cache.spec.frame_tokens
    slots = {
        name: [pair[i][:, :valid] for pair in cache._stored]
        for i, name in enumerate("kv" if cache.spec.value_dims is None else "k")
    }
    return slots | {f"sink.{name}": list(tensor) for name, tensor in cache._sink.tensors.items()}


def state_of(cache: SinkWindowCache) -> dict:
    stream = cache._stream
    tensors = {name: torch.stack(layers) for name, layers in _parts(cache, stream).items()}
    meta = identity_of(cache) | {"next_frame": stream.next_frame}
    if stream != Stream.plain(stream.next_frame, cache.ring, cache._sink):
        meta |= {"version": _LISTED_VERSION, "stream": stream.listed()}
    return {"meta": meta, "tensors": tensors}


def _stream_of(cache: SinkWindowCache, meta: dict) -> Stream:
    op, next_frame = f"{_OP}.load_state_dict", meta.get("next_frame")
    if not is_integer(next_frame) or not 0 <= next_frame < MOST_FRAMES:
        raise argument_error(op, "meta.next_frame", "an integer in [0, 2**53)", repr(next_frame))
    if meta["version"] == _FORMAT_VERSION:
        return Stream.plain(next_frame, cache.ring, cache._sink)
    stream = Stream.of_listed(meta.get("stream"), next_frame, cache.ring)
    if stream is None:
        raise argument_error(op, "meta.stream", "the slots of such a stream", repr(meta.get("stream"))[:200])
    return stream


def check_state(cache: SinkWindowCache, state) -> tuple[dict[str, list[Tensor]], Stream]:
    """The tensors to be written and the stream to go on with, after everything has been checked."""
    op = f"{_OP}.load_state_dict"
    parts = ("meta", "tensors")
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
        raise argument_error(op, "state", "a dict with `meta` and `tensors`", type(state).__name__)
    meta, tensors = (state[part] for part in parts)
    listed = {"version": _LISTED_VERSION} if meta.get("version") == _LISTED_VERSION else {}
    for name, expected in ({"value_dims": None} | identity_of(cache) | listed).items():
        if meta.get(name) != expected:
            raise argument_error(op, f"meta.{name}", repr(expected), repr(meta.get(name)))
    stream = _stream_of(cache, meta)
    targets = _parts(cache, stream)
    if set(tensors) != set(targets):
        raise argument_error(op, "tensors", f"{sorted(targets)}", f"{sorted(tensors)}")
    for name, layers in targets.items():
        found, shape, dtype = tensors[name], (len(layers), *layers[0].shape), layers[0].dtype
        if not isinstance(found, Tensor) or found.shape != shape or found.dtype != dtype:
            text = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise argument_error(op, f"tensors.{name}", f"{dtype} {list(shape)}", text)
        if found.layout != torch.strided or found.device.type == "meta":
            found = f"{found.layout} on {found.device}"
            raise argument_error(op, f"tensors.{name}", "a dense tensor with memory", found)
        own = {target.untyped_storage().data_ptr() for target in layers}
        if found.untyped_storage().data_ptr() in own and found.numel():
            raise argument_error(op, f"tensors.{name}", "memory apart from the cache", "the cache's own")
    return targets, stream


def to_bytes(state: dict) -> dict:
    """A state without tensors."""

    def packed(t: Tensor) -> tuple:
        return t.dtype, t.shape, t.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()

    return {"meta": state["meta"], "tensors": {name: packed(t) for name, t in state["tensors"].items()}}


def from_bytes(state: dict) -> dict:
    def unpacked(dtype: torch.dtype, shape: torch.Size, data: bytes) -> Tensor:
        return (
            torch.frombuffer(bytearray(data), dtype=dtype)
            if data
            else torch.empty(0, dtype=dtype, device="cpu")
        ).reshape(shape)

    return {
        "meta": state["meta"],
        "tensors": {name: unpacked(*packed) for name, packed in state["tensors"].items()},
    }


def _path(op: str, path) -> str:
    if isinstance(path, str | os.PathLike):
        return os.fspath(path)
    raise argument_error(op, "path", "a path", repr(path))


def save(cache: SinkWindowCache, path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _path(f"{_OP}.save", path)
    state = state_of(cache)
    tensors = {name: tensor.cpu() for name, tensor in state["tensors"].items()}
    try:
        save_file(tensors, path, metadata={"rf_kernels": json.dumps(state["meta"])})
    except SafetensorError as error:  # a disk that is full, a folder that is not there
        raise OSError(f"rf_kernels.{_OP}.save: {path}: {error}") from error


def read(cache: SinkWindowCache, path) -> dict:
    """The state in a file; what it says is checked by ``check_state``."""
    from safetensors import SafetensorError, safe_open

    op = f"{_OP}.load"
    path = _path(op, path)
    try:
        # What the parser builds from a header is many times its size: only one as long as ours is given to
        # it.
        with open(path, "rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        limit = 4096 + 4 * len(json.dumps(identity_of(cache))) + 32 * cache.ring.length
        if claimed > limit:
            raise ValueError(f"a header of {claimed} bytes, expected at most {limit}")
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("rf_kernels")
            if text is None:
                raise argument_error(
                    op, "path", "a stream saved by SinkWindowCache.save", f"no such metadata in {path}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = json.loads(text)
    except (ArgumentError, FileNotFoundError, PermissionError):
        raise
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise argument_error(op, "path", "a readable stream file", f"{path}: {error}") from error
    return {"meta": meta, "tensors": tensors}
