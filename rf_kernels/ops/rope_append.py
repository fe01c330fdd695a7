"""``rope_append``: q/k RMSNorm, rotary embedding and the write into the ring of the KV cache, in one pass.
``rope``: the same arithmetic without a cache, differentiable."""

from collections.abc import Sequence

import torch

from .._backend import (
    choice,
    integers,
    invoke,
    number,
    ops,
    refuse_grad,
    refuse_negative,
    register_fake,
    wrote,
)
from ..positions import LAYOUTS
from ..profiling import nvtx_annotated

_NORMS = {None: 0, "model": 1, "head": 2}


def _code(op: str, argument: str, table: dict, value) -> int:
    return table[choice(op, argument, table, value)]


@nvtx_annotated
def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    *,
    slots: torch.Tensor,
    angles: torch.Tensor | None = None,
    axes: Sequence[int] = (),
    layout: str = "adjacent",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    norm: str | None = "model",
    eps: float = 1e-6,
) -> torch.Tensor:
    r"""Normalise and rotate q and k, write k and v into their slots of the cache, return the new q.

    With :math:`\hat x = x / \sqrt{\mathrm{mean}(x^2) + eps} \cdot weight` and the pair :math:`(a, b)` of
    :math:`\hat x` that turns by :math:`\theta`::

        q_out[b, t]                         = R(theta_t) q^[b, t]
        k_cache[b, slots[f] * n + i]        = R(theta_t) k^[b, t]          t = f * n + i
        v_cache[b, slots[f] * n + i]        = v[b, t]
        R(theta): (a, b) -> (a cos - b sin, a sin + b cos)

    Computed in float32 (float64 for float64 data) and rounded once, at the write.

    Args:
        q: ``[B, N, Hq, D]``; N = F frames of n tokens. float64, float32, bfloat16 or float16. Of all data
            tensors only the last dimension must be contiguous (q, k, v may be views of a fused projection).
        k, v: ``[B, N, Hkv, D]``, dtype and device of q. Hkv may differ from Hq (grouped-query heads).
        k_cache, v_cache: ``[B, T, Hkv, D]``, **mutated**: the F * n tokens of ``slots``, nothing else. Apart
            from all other arguments in memory. ``v`` and ``v_cache`` both None: keys alone.
        slots: int32 ``[F]`` or ``[B, F]`` on the device: frame f goes to cache tokens ``slots[f] * n ...
            slots[f] * n + n - 1``. On the CPU, values outside of the cache and equal values in one sample
            raise. On CUDA they are not read on the host: a frame without a place in the cache is not written,
            and equal slots are a race.
        angles: ``[1 or B, R, 2]`` cosines and sines from :meth:`RoPE.table`, float64 for float64 data, else
            float32; None: no rotation.
        axes: ``[length, pairs, offset]`` of each axis (1 to 8), from :meth:`RoPE.table`. Tokens count through
            the axes, the first slowest.
        layout: where pair p lies in a head: "adjacent", "half" or "axis_half" (see :class:`RoPE`). Dims
            beyond the pairs stay.
        q_weight, k_weight: weight of the RMSNorm, ``[H * D]`` for "model" or ``[D]`` for "head", in the
            data's dtype or float32. None: that tensor is not normalised.
        norm: what one mean spans: "model" (all heads of a token, as Wan), "head", or None.
        eps: added to the mean of squares.
    Returns:
        q_out ``[B, N, Hq, D]``, contiguous, new.
    Raises:
        ArgumentError: a wrong argument (also: an input that requires grad while grad mode is on; use
            :func:`rope` for training). The caches are unchanged.

    Source: Wan2.1 self-attention and the cache write of Reward Forcing (arXiv 2512.04678); the published code
    rotates the whole cache again in every forward, here a key is rotated once. docs/rope_append.md has the
    contract and the numerics.
    """
    q_out = _call(
        ops.rope_append.default,
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        angles,
        axes,
        layout,
        q_weight,
        k_weight,
        norm,
        eps,
    )
    wrote(k_cache, v_cache)
    return q_out


def rope_append_check(
    q,
    k,
    v,
    k_cache,
    v_cache,
    *,
    slots,
    angles=None,
    axes=(),
    layout="adjacent",
    q_weight=None,
    k_weight=None,
    norm="model",
    eps=1e-6,
) -> None:
    """Raise what :func:`rope_append` would raise for these arguments, and do nothing else: for callers that
    have to write something else before they append."""
    _call(
        ops.rope_append_check.default,
        q,
        k,
        v,
        k_cache,
        v_cache,
        slots,
        angles,
        axes,
        layout,
        q_weight,
        k_weight,
        norm,
        eps,
    )


def _call(op, q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight, norm, eps):
    refuse_grad(
        "rope_append",
        **{"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "angles": angles},
        **{"q_weight": q_weight, "k_weight": k_weight},
    )
    refuse_negative("rope_append", k_cache=k_cache, v_cache=v_cache)
    layout = _code("rope_append", "layout", LAYOUTS, layout)
    norm = _code("rope_append", "norm", _NORMS, norm)
    axes = integers("rope_append", "axes", axes)
    eps = number("rope_append", "eps", eps)
    return invoke(op, q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight, norm, eps)


@nvtx_annotated
def rope(
    x: torch.Tensor,
    *,
    angles: torch.Tensor | None,
    axes: Sequence[int],
    layout: str = "adjacent",
    weight: torch.Tensor | None = None,
    norm: str | None = "model",
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise (if ``weight`` is given) and rotate x ``[B, N, H, D]``: what ``rope_append`` does to q,
    without a cache.

    Arguments as for :func:`rope_append`. Differentiable in x and ``weight``, any number of times: the
    gradient through the rotation is the rotation by the opposite angles (this op again), the one through the
    norm is plain PyTorch in float32 (float64 for float64 data).

    Returns:
        a new contiguous tensor of x's shape and dtype.
    Raises:
        ArgumentError: a wrong argument.
    """
    refuse_grad("rope", "it is not differentiable in its angles", angles=angles)
    return invoke(
        ops.rope.default,
        x,
        angles,
        integers("rope", "axes", axes),
        _code("rope", "layout", LAYOUTS, layout),
        weight,
        _code("rope", "norm", _NORMS, norm),
        number("rope", "eps", eps),
    )


# ---- fakes and autograd ------------------------------------------------------------------------------------


@register_fake("rope_append")
def _(q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight, norm, eps):
    return q.new_empty(q.shape)


@register_fake("rope_append_check", op="rope_append")
def _(*args):
    return None


@register_fake("rope")
def _(x, angles, axes, layout, weight, norm, eps):
    return x.new_empty(x.shape)


def _setup_rope(ctx, inputs, output):
    x, angles, axes, layout, weight, norm, eps = inputs
    ctx.save_for_backward(x if weight is not None else None, angles, weight)
    ctx.rotation, ctx.norm, ctx.eps = (axes, layout), norm, eps


def _rope_backward(ctx, grad):
    x, angles, weight = ctx.saved_tensors
    if weight is not None:
        # The norm's part reads this again: it must not be rounded to half precision in between.
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if angles is not None:
        inverse = torch.stack((angles[..., 0], -angles[..., 1]), dim=-1)
        grad = ops.rope.default(grad.contiguous(), inverse, *ctx.rotation, None, 0, 0.0)
    if weight is None:
        return grad, None, None, None, None, None, None

    # y = w * u with u = x * r and r = (mean(x^2) + eps)^(-1/2): dw = sum(g u), dx = r (w g - u mean(w g u)).
    model = ctx.norm == _NORMS["model"]
    over = (-2, -1) if model else (-1,)
    wide = x.to(grad.dtype)
    w = weight.to(grad.dtype)
    w = w.view(x.shape[-2:]) if model else w
    scale = (wide.square().mean(dim=over, keepdim=True) + ctx.eps).rsqrt()
    unit = wide * scale
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        through = grad * w
        grad_x = (scale * (through - unit * (through * unit).mean(dim=over, keepdim=True))).to(x.dtype)
    if ctx.needs_input_grad[4]:
        grad_weight = (
            (grad * unit).sum(dim=(0, 1) if model else (0, 1, 2)).reshape(weight.shape).to(weight.dtype)
        )
    return grad_x, None, None, None, grad_weight, None, None


torch.library.register_autograd("rf_kernels::rope", _rope_backward, setup_context=_setup_rope)
