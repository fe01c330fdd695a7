"""``Chunk.attend`` under grad: the values of the ordinary path, and a backward that never reads the live
cache.

The slots of a cache, and the angles of its plan, are rewritten by every chunk that follows; backward, and the
recomputation of a checkpointed block, may come after that. So what a forward sees of the past is copied once
per chunk and layer (``Past``). Every forward of the chunk shares the copy; graph and chunk hold it, and the
cache does not.

Saved for backward, per forward and layer: q, k, v, the norm weights, the result and its log-sum-exp. Rotated
queries and keys are formed again. Per chunk and layer, once: keys and values of the other valid slots. Per
chunk, once: its slots, angles and bias (per layer, where the policy weighs keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._backend import ops
from ..ops.rope_append import rope, rope_append
from ..ops.sink_window_attention import sink_window_attention

if TYPE_CHECKING:
    from .chunk import Norms
    from .plan import CacheSpec, ChunkPlan


def inside_backward() -> int:
    """The running backward's number, -1 outside of one."""
    return torch._C._current_graph_task_id()


def snapshot_is_wanted(q, k, v, norms: Norms) -> bool:
    """Whether a forward with grad mode on will be differentiated, or recomputed: a checkpointed block
    recomputes all of itself, also parts of it that need no gradient. Its forward is known by the hooks that
    it puts on saved tensors."""
    tensors = (q, k, v, norms.q_weight, norms.k_weight)
    if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@dataclass(frozen=True, eq=False)
class Past:
    """What the forwards of a chunk see beside the chunk itself, in one layer: copies.

    ``k``, ``v``: ``[B, others, H, D]``, the valid slots that are not the chunk's, in the order of the slots.
    No ``v`` with ``value_dims``, where values are channels of the keys.
    ``pieces``: how own and other slots follow one another (``ChunkPlan.pieces``).
    """

    k: Tensor
    v: Tensor | None
    slots: Tensor
    angles: Tensor | None
    axes: list[int]
    layout: str
    pieces: list[tuple[bool, int, int]]
    frame_tokens: int
    kv_tokens: int
    bias: Tensor | None
    value_dims: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        k: Tensor,
        v: Tensor,
        plan: ChunkPlan,
        spec: CacheSpec,
        chunk: Past | None,
        key_bias: Tensor | None,
    ) -> Past:
        """Taken after the layer's eviction. ``chunk``: the past of another layer, which has the chunk's slots
        and angles. ``key_bias``: of this layer, beside the weights of frames."""
        n, pieces, at, runs = spec.frame_tokens, plan.pieces, 0, []
        for own, begin, end in pieces:
            if not own:
                runs.append(slice(at * n, (at + end - begin) * n))
            at += end - begin
        k, v = (
            None if x is None else torch.cat([x[:, run] for run in runs], 1) if runs else x[:, :0].clone()
            for x in (k, v if spec.value_dims is None else None)
        )
        if chunk is not None:
            slots, angles, bias = chunk.slots, chunk.angles, chunk.bias
        else:
            kept = (plan.slots, plan.angles, plan.bias)
            slots, angles, bias = (None if t is None else t.clone() for t in kept)
        if key_bias is not None:
            bias = key_bias.clone() if plan.bias is None else key_bias + plan.bias
        numbers = (plan.axes, spec.layout, pieces, n, plan.kv_tokens)
        return cls(k, v, slots, angles, *numbers, bias, spec.value_dims)

    def values_of(self, keys: Tensor) -> Tensor:
        """The values in keys, with ``value_dims``."""
        return keys[..., slice(*self.value_dims)]

    def joined(self, others: Tensor, own: Tensor) -> Tensor:
        """The valid slots in order, of the chunk's own tokens and the others."""
        n = self.frame_tokens
        return torch.cat([(own if mine else others)[:, a * n : b * n] for mine, a, b in self.pieces], 1)

    def own(self, joined: Tensor) -> Tensor:
        """The chunk's own tokens, in the chunk's order, out of the valid slots."""
        n, at, runs = self.frame_tokens, 0, []
        for mine, begin, end in self.pieces:
            if mine:
                runs.append((begin, joined[:, at * n : (at + end - begin) * n]))
            at += end - begin
        return torch.cat([run for _, run in sorted(runs, key=lambda r: r[0])], 1)


class _Attend(torch.autograd.Function):
    """Forward: append and attention on the live slots, or, in a recomputation, on a copy put together from
    the past."""

    @staticmethod
    def forward(
        ctx, q, k, v, q_weight, k_weight, norm, eps, past, slots, written, softmax_scale, deterministic
    ):
        k_slots, v_slots = slots or (
            past.joined(past.k, k),
            None if v is None else past.joined(past.v, v),
        )  # the append overwrites what k and v left
        rotated = rope_append(
            q,
            k,
            v,
            k_slots,
            v_slots,
            slots=past.slots,
            angles=past.angles,
            axes=past.axes,
            layout=past.layout,
            q_weight=q_weight,
            k_weight=k_weight,
            norm=norm,
            eps=eps,
        )
        if written is not None:
            written(rotated)
        out, lse = sink_window_attention(
            rotated,
            k_slots,
            past.values_of(k_slots) if v is None else v_slots,
            kv_tokens=past.kv_tokens,
            softmax_scale=softmax_scale,
            deterministic=deterministic,
            return_lse=True,
            kv_bias=past.bias if past.bias is None else past.bias[..., : k_slots.shape[1]],
        )
        ctx.save_for_backward(q, k, v, q_weight, k_weight, out, lse, past.k, past.v, past.angles, past.bias)
        ctx.place = _without_tensors(past)
        ctx.settings = norm, eps, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        *inputs, out, lse, past_k, past_v, angles, bias = ctx.saved_tensors
        place, (norm, eps, softmax_scale) = ctx.place, ctx.settings
        q, k, v, q_weight, k_weight = (t if t is None else t.detach() for t in inputs)
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [
                None if t is None else t.requires_grad_(need)
                for t, need in zip((q, k, q_weight, k_weight), (*needed[:2], *needed[3:5]), strict=True)
            ]
            common = {"angles": angles, "axes": place.axes, "layout": place.layout, "norm": norm, "eps": eps}
            rotated = [rope(x, weight=w, **common) for x, w in ((q, q_weight), (k, k_weight))]
        keys = place.joined(past_k, rotated[1].detach())
        grads = ops.sink_window_attention_backward(
            grad_out,
            rotated[0].detach(),
            keys,
            place.values_of(keys) if v is None else place.joined(past_v, v),
            out,
            lse,
            place.kv_tokens,
            softmax_scale,
            None,
            0,
            None,
            None,
            bias if bias is None else bias[..., : place.kv_tokens],
        )
        dv = None
        if v is None:
            place.values_of(grads[1]).add_(grads[2])
        elif needed[2]:
            dv = place.own(grads[2])
        pairs = [
            (y, g) for y, g in zip(rotated, (grads[0], place.own(grads[1])), strict=True) if y.requires_grad
        ]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs]) if wanted else ()
        )
        dq, dk, dq_weight, dk_weight = (
            next(found) if t is not None and t.requires_grad else None for t in leaves
        )
        return dq, dk, dv, dq_weight, dk_weight, *[None] * 7


def _without_tensors(past: Past) -> Past:
    """The numbers of a past: its tensors are the graph's to keep and to free, not the node's."""
    numbers = (past.axes, past.layout, past.pieces, past.frame_tokens, past.kv_tokens)
    return Past(*(None,) * 4, *numbers, None, past.value_dims)


def attend_with_grad(q, k, v, norms, past, slots, written, softmax_scale, deterministic) -> Tensor:
    """``slots``: the layer's keys and values, and ``written`` is called when they are; both None in a
    recomputation."""
    return _Attend.apply(
        q,
        k,
        v,
        norms.q_weight,
        norms.k_weight,
        norms.norm,
        norms.eps,
        past,
        slots,
        written,
        softmax_scale,
        deterministic,
    )
