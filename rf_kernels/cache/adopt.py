"""Memory for the slots that a caller has allocated: what is checked before a cache is built on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import argument_error
from .plan import CacheSpec

_OP = "SinkWindowCache"


def adopted(spec: CacheSpec, k, v) -> tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]:
    """``k`` and ``v`` as they are, lists as tuples; every check is made before anything is built."""
    seen: list[tuple[str, Tensor]] = []
    for name, given in (("k", k), ("v", v)):
        if name == "v" and spec.value_dims is not None:
            if v is not None:
                raise argument_error(_OP, "v", "None (values are channels of the keys)", type(v).__name__)
            continue
        if not isinstance(given, Tensor | list | tuple):
            raise argument_error(_OP, name, "a tensor, or a sequence of one per layer", type(given).__name__)
        if isinstance(given, Tensor) and given.dim() == 0 or len(given) != spec.layers:
            found = list(given.shape) if isinstance(given, Tensor) else f"{len(given)}"
            raise argument_error(_OP, name, f"{spec.layers} layers", found)
        for layer, tensor in enumerate(given):
            place = name if isinstance(given, Tensor) else f"{name}[{layer}]"
            _check(spec, place, tensor)
            for i, (other, before) in enumerate(seen):
                # k and v of one layer may not even be woven into one another: so say the ops
                if _overlap(tensor, before, woven=name == "v" and i == layer):
                    raise argument_error(_OP, place, f"memory apart from {other}", "memory in common")
            seen.append((place if place != name else f"{name}[{layer}]", tensor))
    return tuple(x if x is None or isinstance(x, Tensor) else tuple(x) for x in (k, v))


def allocated(spec: CacheSpec, k, v) -> tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]:
    """Keys and values of a cache: the caller's memory, or new. With ``value_dims`` values are views."""
    if k is None and v is None:
        tokens = spec.ring.length * spec.frame_tokens
        k, v = spec.zeros(tokens), spec.zeros(tokens) if spec.value_dims is None else None
    else:
        k, v = adopted(spec, k, v)
    if spec.value_dims is not None:
        v = spec.values_of(k) if isinstance(k, Tensor) else tuple(map(spec.values_of, k))
    return k, v


def _check(spec: CacheSpec, place: str, tensor) -> None:
    shape = [spec.batch, spec.ring.length * spec.frame_tokens, spec.heads, spec.head_dim]
    if not isinstance(tensor, Tensor):
        raise argument_error(_OP, place, "a tensor", type(tensor).__name__)
    if tensor.layout != torch.strided:
        raise argument_error(_OP, place, "a dense tensor", tensor.layout)
    if list(tensor.shape) != shape:
        raise argument_error(_OP, place, f"[B, L * n, H, D] = {shape} in a layer", list(tensor.shape))
    if tensor.dtype != spec.dtype:
        raise argument_error(_OP, place, spec.dtype, tensor.dtype)
    here, there = tensor.device, spec.device
    if here.type != there.type or (None not in (there.index, here.index) and here.index != there.index):
        raise argument_error(_OP, place, f"a tensor on {there}", here)
    if tensor.requires_grad:
        raise argument_error(_OP, place, "a tensor that does not require grad", "requires_grad=True")
    if tensor.is_neg() or tensor.stride(-1) != 1 and spec.head_dim > 1:
        raise argument_error(_OP, place, "a contiguous last dimension", f"strides {tensor.stride()}")
    dims = _dims(tensor)
    if any(stride <= _extent(dims[i + 1 :]) for i, (stride, _) in enumerate(dims)):
        raise argument_error(_OP, place, "elements apart in memory", f"strides {tensor.stride()}")


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions, the widest first."""
    return sorted(((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1), reverse=True)


def _extent(dims: Sequence[tuple[int, int]]) -> int:
    """Distance of the last element from the first."""
    return sum(stride * (size - 1) for stride, size in dims)


def _apart(distance: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether no element of a tensor with these dims lies ``distance`` from another of them, or of its like.
    Every stride is wider than the dims below it reach."""
    if not dims:
        return distance != 0
    (stride, size), rest = dims[0], dims[1:]
    nearest = {distance // stride, -(-distance // stride)}
    return all(abs(n) >= size or _apart(distance - n * stride, rest) for n in nearest)


def _overlap(a: Tensor, b: Tensor, *, woven: bool) -> bool:
    if a.is_meta or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    distance = a.storage_offset() - b.storage_offset()
    if _dims(a) == _dims(b) and not woven:
        return not _apart(distance, _dims(a))
    return -_extent(_dims(a)) <= distance <= _extent(_dims(b))
