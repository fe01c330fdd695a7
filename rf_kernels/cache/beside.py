"""What a model and a policy say to one another: ``beside`` and ``tell``, of an open chunk and of a batch.

A policy with ``answers`` keeps something that no slot holds, such as the state of a linear attention. The
model asks for it with the chunk's queries, and adds what comes back to the attention's result.

A policy with ``hears`` is told the text by the model, as the layer's cross-attention has it, before the layer
attends.

Under grad an answer is differentiable in the queries, and what it is made from is a constant: copied once per
chunk and layer, as the past of ``attend`` is (grad.py). A recomputation reads the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._backend import ArgumentError, argument_error, integer
from ..ops.rope_append import rope
from . import compiled
from .grad import snapshot_is_wanted

if TYPE_CHECKING:
    from .chunk import Chunk, Norms


class Beside:
    """``beside`` of a chunk, and of a batch of chunks; each has its own ``_answer``."""

    _handle: Tensor

    def beside(
        self,
        layer: int | Tensor,
        q: Tensor,
        *,
        q_norm: Tensor | nn.Module | None = None,
        norm: str | None = None,
        eps: float | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What the policy answers to the chunk's queries beside the attention, in one layer: after the
        layer's ``attend`` or ``append``, in any forward.

            y = chunk.attend(layer, q, k, v, q_norm=norm_q, k_norm=norm_k)
            y = y + chunk.beside(layer, q, q_norm=norm_q, project=w_o)

        Args:
            layer, q, q_norm, norm, eps: as for ``attend``.
            project: the model's own map of the answer, such as an ``nn.Linear(D, D)``. Its result is 0 while
                the policy has nothing to answer from, also that of a map with a bias.
        Returns:
            ``[B, F * n, Hq, D]``, or what ``project`` makes of it. Differentiable in q, the norm's weight and
            the parameters of ``project``.
        Raises:
            ArgumentError: the policy answers nothing, or the layer was not written yet.
        """
        norms = {"q_norm": q_norm, "norm": norm, "eps": eps}
        found = self._norms_of_q(**norms)
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and any(
                isinstance(t, Tensor) and t.requires_grad for t in (q, found.q_weight)
            ):
                return self._beside_uncompiled(layer, q, **norms, project=project)
            if not isinstance(layer, Tensor):
                layer = integer("Chunk.beside", "layer", layer)
            answer, weight = compiled.beside(self._handle, layer, q, found.q_weight, found.norm, found.eps)
        else:
            answer, weight = self._answer(layer, q, found.q_weight, found.norm, found.eps)
        return answer if project is None else project(answer) * weight

    #: Compiled code leaves its graph for it.
    _beside_uncompiled = torch._disable_dynamo(beside)

    @property
    def hears(self) -> bool:
        """Whether the policy wants to be told the text."""
        raise NotImplementedError

    def tell(self, layer: int | Tensor, text: Tensor) -> None:
        """Tell the policy the text, in every forward before the layer's ``attend`` or ``append``. Does
        nothing under a policy that does not hear.

        Args:
            layer: as for ``attend``.
            text: keys of the text in the layer's cross-attention, ``[B, T, H, D]``, or a multiple of H heads.
        Raises:
            ArgumentError: before anything is written.
        """
        if not self.hears:
            return
        text = text.detach() if isinstance(text, Tensor) else text
        if torch.compiler.is_compiling():
            if not isinstance(layer, Tensor):
                layer = integer("Chunk.tell", "layer", layer)
            compiled.tell(self._handle, layer, text)
        else:
            self._hear(layer, text)

    def _hear(self, layer, text: Tensor) -> None:
        raise NotImplementedError

    def _norms_of_q(self, q_norm, norm, eps) -> Norms:
        raise NotImplementedError

    def _answer(self, layer, q: Tensor, q_weight, norm, eps) -> tuple[Tensor, Tensor]:
        """The answer, and its weight ``[B, 1, 1, 1]``: 1, or 0 where there was nothing to answer from."""
        raise NotImplementedError


def answer_of(chunk: Chunk, layer: int, q: Tensor, norms: Norms, recomputed: bool) -> tuple[Tensor, Tensor]:
    """Of one chunk; ``layer`` is checked."""
    cache, plan, state = chunk.cache, chunk.plan, chunk.cache._sink
    spec = cache.spec
    if not state.answers:
        name = type(cache.sink).__name__
        raise argument_error("Chunk.beside", "self", "a policy that answers beside the slots", name)
    if not chunk._appended[layer]:
        found = f"{layer}, not written yet"
        raise argument_error("Chunk.beside", "layer", "a layer that this chunk has written", found)
    tokens = chunk.frames * spec.frame_tokens
    expected = f"[{spec.batch}, {tokens}, a multiple of {spec.heads}, {spec.head_dim}], {spec.dtype}"
    if not isinstance(q, Tensor):
        raise argument_error("Chunk.beside", "q", expected, type(q).__name__)
    fits = q.dim() == 4 and q.shape[2] % spec.heads == 0 and q.dtype == spec.dtype
    if not fits or (*q.shape[:2], q.shape[3]) != (spec.batch, tokens, spec.head_dim):
        raise argument_error("Chunk.beside", "q", expected, f"{list(q.shape)}, {q.dtype}")

    kept = chunk._memories.get(layer)
    if kept is None:
        if recomputed:
            raise ArgumentError(
                "rf_kernels.Chunk.beside: argument `self`: expected a forward under grad before its"
                f" recomputation, found none in layer {layer} (checkpoint with use_reentrant=False)"
            )
        angles = plan.angles
        keeps = torch.is_grad_enabled() and snapshot_is_wanted(q, None, None, norms)
        if keeps and angles is not None:  # the next chunk rewrites them
            angles = next((past for _, past in chunk._memories.values()), None)
            angles = plan.angles.clone() if angles is None else angles
        with torch.no_grad():
            kept = state.memory(layer, plan), angles
        if keeps:
            chunk._memories[layer] = kept
    memory, angles = kept
    options = {"weight": norms.q_weight, "norm": norms.norm, "eps": norms.eps}
    plain = q if norms.q_weight is None else rope(q, angles=None, axes=[], **options)
    rotated = plain
    if angles is not None:
        rotated = rope(q, angles=angles, axes=plan.axes, layout=spec.layout, **options)
    answer, weight = state.answer(plain, rotated, memory)
    chunk._asked[layer] = True
    return answer, weight.to(q.dtype).expand(spec.batch, 1, 1, 1)
