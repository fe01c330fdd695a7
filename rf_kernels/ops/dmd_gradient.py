"""dmd_gradient, dmd_loss, reward_weight: the distribution-matching gradient with guidance, reward weight,
mask and NaN rule."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import argument_error, check_tensors, choice, flag, invoke, number, ops, register_fake
from ..profiling import nvtx_annotated

_OP = "dmd_gradient"
# The codes of csrc/dmd_gradient/params.h: a string would leak a few bytes a call in PyTorch's stable ABI.
_NAN_RULES = {"published": 0, "sample": 1, "raise": 2}
_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}


class DMDAux(NamedTuple):
    """What the launch knows besides the gradient; all on the device, float32 (float64 for float64 ``x``), no
    host read."""

    loss: Tensor
    """[] sum(w m d^2) / (2 N)."""
    per_sample_loss: Tensor
    """[B] the samples' parts of ``loss``, with the same divisor: they sum to it."""
    gradient_norm: Tensor
    """[B] mean over the sample of |d|, before weight and mask (0 for a dropped sample)."""
    normalizer: Tensor
    """[B] what d was divided by: max(mean|x - real| + eps, floor), or 1 without normalisation."""
    dropped: Tensor
    """[] int64, samples dropped by the NaN rule."""


def reward_weight(r: Tensor, beta: float) -> Tensor:
    """exp(beta r): the weight of Re-DMD (Reward Forcing, arXiv 2512.04678, eq. 11), for ``weight=``.

    ``r``: rewards, any shape that ``weight`` takes ([B] for one reward per sample). The result is float32
    (float64 for float64 ``r``) and carries no gradient. In the paper's notation ``beta`` here is 1 / beta
    there.
    """
    if not isinstance(r, Tensor) or not r.is_floating_point():
        raise argument_error(
            "reward_weight", "r", "a floating-point tensor", getattr(r, "dtype", type(r).__name__)
        )
    beta = number("reward_weight", "beta", beta)
    if not math.isfinite(beta):
        raise argument_error("reward_weight", "beta", "a finite number", beta)
    r = r.detach()
    return torch.exp(beta * r.to(_acc_dtype(r.dtype)))


@dataclass(frozen=True)
class DMDOptions:
    """How ``dmd_gradient`` and ``dmd_loss`` compute what their tensors do not say.

    Args:
        guidance: "self_forcing": v = c + s (c - u), none at s = 0 (CausVid, Self-Forcing, Reward Forcing;
            their 3.0 is 4.0 of the other). "dmd2": v = u + s (c - u), none at s = 1.
        normalize, eps, floor: the divisor is ``max(mean|x - real| + eps, floor)``; with ``normalize=False``
            it is 1 (``x`` is then not read). A sample whose divisor is 0 has d = 0.
        nan: "sample" (default): a sample whose d (or weight) is not finite in every element, in the
            predictions' dtype, gets gradient 0 and is counted in ``dropped``; N does not change. "published":
            NaN -> 0, +-inf -> the largest finite number of the predictions' dtype, element by element, a zero
            divisor included (the loss may then overflow). "raise": an ArgumentError instead of a dropped
            sample; the only mode that waits for the device.
        reduction: "mean": divided by N, the selected elements of the whole batch. "sum", "none": the divisor
            N is 1, the gradient is w m d ("none" for ``dmd_gradient`` alone).
    """

    guidance: str = "self_forcing"
    normalize: bool = True
    eps: float = 0.0
    floor: float = 0.0
    nan: str = "sample"
    reduction: str = "mean"

    def __post_init__(self):
        choice("DMDOptions", "guidance", ("self_forcing", "dmd2"), self.guidance)
        choice("DMDOptions", "nan", _NAN_RULES, self.nan)
        choice("DMDOptions", "reduction", _REDUCTIONS, self.reduction)
        flag("DMDOptions", "normalize", self.normalize)
        for name in ("eps", "floor"):
            value = getattr(self, name)
            if not 0 <= number("DMDOptions", name, value) < math.inf:
                raise argument_error("DMDOptions", name, "a finite number >= 0", value)


_DEFAULT = DMDOptions()


@nvtx_annotated
def dmd_gradient(
    x: Tensor,
    *,
    fake: Tensor,
    real: Tensor,
    fake_uncond: Tensor | None = None,
    real_uncond: Tensor | None = None,
    fake_guidance: float | None = None,
    real_guidance: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    x_t: Tensor | None = None,
    sigma: Tensor | None = None,
    options: DMDOptions = _DEFAULT,
    return_aux: bool = False,
):
    """Gradient of the distribution-matching loss on the generator's output ``x`` (DMD, arXiv 2311.18828, eq.
    7-8; Re-DMD, arXiv 2512.04678, eq. 11)::

        real = c + g (c - u), fake likewise;     g = s ("self_forcing"), s - 1 ("dmd2": real = u + s (c - u))
        n    = max(mean|x - real| + eps, floor), the mean over the sample's elements
        d    = (fake - real) / n, then the NaN rule
        gradient = w m d / N,     loss = sum(w m d^2) / (2 N),     N = selected elements of the whole batch

    Args:
        x: [B, ...] generator output (video latents [B, F, C, H, W]), float64, float32, bfloat16 or float16.
        fake, real: conditional predictions of the fake and the real score, shape of ``x``, dtype of ``x`` or
            float32 (one dtype for all predictions and ``x_t``).
        fake_uncond, real_uncond: unconditional predictions. Not read where g = 0.
        fake_guidance, real_guidance: the scale s of the convention; default: no guidance.
        weight: [B], [B, F], or as many dimensions as ``x`` (size 1 broadcasts); used in float32 (float64 for
            float64 ``x``). See ``reward_weight``.
        mask: bool, shapes as ``weight``; True selects. It acts on gradient, loss and N, not on the
            normaliser.
        x_t, sigma: where the predictions are flows, x0 = x_t - sigma * prediction for each of them: the noisy
            input [B, ...] and its noise level, [B] or [B, F]. Without them the predictions are x0.
        options: a ``DMDOptions``: convention of guidance, normaliser, NaN rule, reduction.
        return_aux: also return a ``DMDAux``.

    Returns:
        gradient, shape and dtype of ``x``, without graph; or (gradient, DMDAux). N = 0: gradient and loss are
        0.

    Arithmetic is float32 (float64 for float64 ``x``); sums have two levels, fixed tiles in float32 (the
    normaliser's in float64) and their sums in float64, so results do not depend on threads, and norms and
    ``reduction="none"`` not on the other samples. Nothing is mutated. Inputs that are not contiguous are
    copied. Raises ArgumentError for a wrong call, before anything is computed.
    """
    inputs = _Inputs(
        x, fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, weight, mask, x_t, sigma
    )
    with torch.no_grad():
        gradient, *aux = _launch(inputs, options, scale_gradient=True)
    return (gradient, DMDAux(*aux)) if flag(_OP, "return_aux", return_aux) else gradient


@nvtx_annotated
def dmd_loss(
    x: Tensor,
    *,
    fake: Tensor,
    real: Tensor,
    fake_uncond: Tensor | None = None,
    real_uncond: Tensor | None = None,
    fake_guidance: float | None = None,
    real_guidance: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    x_t: Tensor | None = None,
    sigma: Tensor | None = None,
    options: DMDOptions = _DEFAULT,
    return_aux: bool = False,
):
    """The distribution-matching loss as a scalar that is differentiable in ``x``, and in ``x`` alone::

        loss = sum( w m (x - stop(x - d))^2 ) / (2 N)        d loss / d x = w m d / N

    Arguments as in ``dmd_gradient`` (same launch; loss and gradient come out together, backward is one
    multiplication); every other argument is a constant of the loss, as its definition says.
    ``options.reduction``: "mean" or "sum" (N = 1). For float16 ``x`` the division by N waits for backward, so
    that a scaled loss keeps small gradients out of the subnormal range. Returns the loss, [], float32
    (float64 for float64 ``x``); or (loss, DMDAux). Differentiating twice raises.
    """
    if isinstance(options, DMDOptions):
        choice("dmd_loss", "options.reduction", ("mean", "sum"), options.reduction)
    inputs = _Inputs(
        x, fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, weight, mask, x_t, sigma
    )
    constants = _Inputs(x, *(t.detach() if isinstance(t, Tensor) else t for t in inputs[1:]))
    scale_gradient = isinstance(x, Tensor) and x.dtype != torch.float16
    loss, *aux = _launch(constants, options, scale_gradient=scale_gradient)[1:]
    return (loss, DMDAux(loss.detach(), *aux)) if flag("dmd_loss", "return_aux", return_aux) else loss


class _Inputs(NamedTuple):
    """The tensors and scales of a call, as they were given."""

    x: Tensor
    fake: Tensor
    real: Tensor
    fake_uncond: Tensor | None
    real_uncond: Tensor | None
    fake_guidance: float | None
    real_guidance: float | None
    weight: Tensor | None
    mask: Tensor | None
    x_t: Tensor | None
    sigma: Tensor | None


def _acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _coefficient(which, scale, uncond, guidance):
    """The g of c + g (c - u)."""
    if scale is None:
        if uncond is not None:
            raise argument_error(
                _OP, which, f"a number, `{which.replace('guidance', 'uncond')}` being given", None
            )
        return 0.0
    return number(_OP, which, scale) - (1.0 if guidance == "dmd2" else 0.0)


def _launch(inputs: _Inputs, options: DMDOptions, *, scale_gradient: bool) -> list[Tensor]:
    """Gradient, loss and what DMDAux holds, from the registered op."""
    if not isinstance(options, DMDOptions):
        raise argument_error(_OP, "options", "a DMDOptions", type(options).__name__)
    x, fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, weight, mask, x_t, sigma = inputs
    optional = {
        "fake_uncond": fake_uncond,
        "real_uncond": real_uncond,
        "weight": weight,
        "mask": mask,
        "x_t": x_t,
        "sigma": sigma,
    }
    check_tensors(_OP, {"x": x, "fake": fake, "real": real}, optional)
    g_fake = _coefficient("fake_guidance", fake_guidance, fake_uncond, options.guidance)
    g_real = _coefficient("real_guidance", real_guidance, real_uncond, options.guidance)
    acc = _acc_dtype(x.dtype)
    weight = weight.to(acc) if weight is not None and weight.is_floating_point() else weight
    sigma = sigma.to(acc) if sigma is not None and sigma.is_floating_point() else sigma
    results = invoke(
        ops.dmd_gradient.default,
        *(x, fake, real, fake_uncond, real_uncond, g_fake, g_real, x_t, sigma, weight, mask),
        *(
            options.normalize,
            float(options.eps),
            float(options.floor),
            _NAN_RULES[options.nan],
            _REDUCTIONS[options.reduction],
            scale_gradient,
        ),
    )
    return list(results[:-1])


@register_fake("dmd_gradient")
def _fake(x, fake, *arguments):
    acc = _acc_dtype(x.dtype)
    per_sample = x.shape[:1]
    return (
        x.new_empty(x.shape),
        x.new_empty((), dtype=acc),
        x.new_empty(per_sample, dtype=acc),
        x.new_empty(per_sample, dtype=acc),
        x.new_empty(per_sample, dtype=acc),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((), dtype=acc),
    )


class _Once(torch.autograd.Function):
    """dx, bound to x and to the gradient of the loss by a node that raises: without it a second derivative of
    the loss would be 0."""

    @staticmethod
    def forward(ctx, dx, grad_loss, x):
        return dx.view_as(dx)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "rf_kernels.dmd_loss: its gradient is not differentiable (no double backward)"
        )


def _setup_context(ctx, inputs, output):
    gradient, _, *aux, scale = output
    ctx.mark_non_differentiable(gradient, *aux, scale)
    ctx.scaled = inputs[-1]
    ctx.save_for_backward(gradient, scale, inputs[0])


def _backward(ctx, _gradient, grad_loss, *_):
    gradient, scale, x = ctx.saved_tensors
    with torch.no_grad():
        factor = grad_loss if ctx.scaled else grad_loss * scale
        dx = gradient * factor  # 0-dim: applied in the arithmetic type, one rounding to the gradient's dtype
    if torch.is_grad_enabled():  # create_graph=True
        dx = _Once.apply(dx, grad_loss, x)
    return dx, *([None] * 16)


torch.library.register_autograd("rf_kernels::dmd_gradient", _backward, setup_context=_setup_context)
