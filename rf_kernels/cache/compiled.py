"""``Chunk.attend``, ``beside`` and ``tell`` under torch.compile: opaque ops that find the chunk by a handle.

What a forward does depends on numbers of the host: the layer, the tokens that are valid by now, whether the
sink has still to absorb. Traced, each of them would be a guard, and a compilation for every layer and for
every stage of a stream. So a compiler sees none of them. The op runs the ordinary method, with its checks and
its errors.

A handle is a tensor, because numbers are guarded and values of tensors are not. The schema says that the op
writes to it: so calls keep their order, and none is dropped or merged with another. What the op does depends
on the chunk, so no CUDA graph of a compiler may contain it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .chunk import Chunk
    from .rows import ChunkBatch

_library = torch.library.Library("rf_kernels", "FRAGMENT")
_library.define(
    "attend(Tensor(a!) handle, SymInt? layer, Tensor? layer_index, Tensor q, Tensor k, Tensor? v,"
    " Tensor? q_weight, Tensor? k_weight, str? norm, float eps, float? softmax_scale, bool? deterministic,"
    " int value_dim) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_library.define(
    "beside(Tensor(a!) handle, SymInt? layer, Tensor? layer_index, Tensor q, Tensor? q_weight, str? norm,"
    " float eps) -> (Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_library.define(
    "tell(Tensor(a!) handle, SymInt? layer, Tensor? layer_index, Tensor text) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_chunks: weakref.WeakValueDictionary[int, Chunk | ChunkBatch] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle_of(chunk: Chunk | ChunkBatch) -> Tensor:
    """By what the op finds the chunk, as long as that lives."""
    number = next(_numbers)
    _chunks[number] = chunk
    with torch.inference_mode(False):  # else it could not be an argument outside of it
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def _number_or_index(layer: int | Tensor) -> tuple[int | None, Tensor | None]:
    """A layer as the schemas take it."""
    return (None, layer) if isinstance(layer, Tensor) else (layer, None)


def attend(handle: Tensor, layer: int | Tensor, *arguments) -> Tensor:
    """The op's call. ``arguments``: from ``q`` on, in the order of the schema."""
    return torch.ops.rf_kernels.attend.default(handle, *_number_or_index(layer), *arguments)


@torch.library.impl(_library, "attend", "CompositeExplicitAutograd")
def _run(handle, number, index, q, k, v, q_weight, k_weight, norm, eps, softmax_scale, deterministic, _):
    with torch.no_grad():
        return _chunks[int(handle)].attend(
            number if index is None else index,
            *(q, k, v),
            q_norm=q_weight,
            k_norm=k_weight,
            norm=norm,
            eps=eps,
            softmax_scale=softmax_scale,
            deterministic=deterministic,
        )


@torch.library.register_fake("rf_kernels::attend", lib=_library)
def _fake(handle, number, index, q, *others):
    return q.new_empty((*q.shape[:3], others[-1]))


def beside(handle: Tensor, layer: int | Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """As ``attend``, for ``Chunk.beside``: the answer and its weight."""
    return torch.ops.rf_kernels.beside.default(handle, *_number_or_index(layer), *arguments)


@torch.library.impl(_library, "beside", "CompositeExplicitAutograd")
def _run_beside(handle, number, index, q, q_weight, norm, eps):
    with torch.no_grad():
        layer = number if index is None else index
        answer, weight = _chunks[int(handle)]._answer(layer, q, q_weight, norm, eps)
        return answer.contiguous(), weight.contiguous()


@torch.library.register_fake("rf_kernels::beside", lib=_library)
def _fake_beside(handle, number, index, q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], 1, 1, 1)


def tell(handle: Tensor, layer: int | Tensor, text: Tensor) -> None:
    """As ``attend``, for ``Chunk.tell``."""
    torch.ops.rf_kernels.tell.default(handle, *_number_or_index(layer), text)


@torch.library.impl(_library, "tell", "CompositeExplicitAutograd")
def _run_tell(handle, number, index, text):
    _chunks[int(handle)]._hear(number if index is None else index, text)


@torch.library.register_fake("rf_kernels::tell", lib=_library)
def _fake_tell(handle, number, index, text):
    return None
