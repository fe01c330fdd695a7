"""dmd_gradient, dmd_loss, reward_weight: the distribution-matching gradient with guidance, reward weight,
mask and NaN rule."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import argument_error, build_info, check_tensors, choice, invoke, number, ops, register_fake
from ..profiling import nvtx_annotated

_OP = "dmd_gradient"


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
    """[B] what d was divided by: mean|x - real| + eps, or 1 without normalisation."""
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
    if not math.isfinite(number("reward_weight", "beta", beta)):
        raise argument_error("reward_weight", "beta", "a finite number", beta)
    r = r.detach()
    return torch.exp(beta * r.to(_acc_dtype(r.dtype)))


@nvtx_annotated
def dmd_gradient(
    x: Tensor,
    *,
    fake: Tensor,
    real: Tensor,
    fake_uncond: Tensor | None = None,
    real_uncond: Tensor | None = None,
    real_guidance: float | None = None,
    fake_guidance: float | None = None,
    guidance: str = "self_forcing",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    nan: str = "sample",
    prediction: str = "x0",
    x_t: Tensor | None = None,
    sigma: Tensor | None = None,
    reduction: str = "mean",
    return_aux: bool = False,
):
    """Gradient of the distribution-matching loss on the generator's output ``x`` (DMD, arXiv 2311.18828, eq.
    7-8; Re-DMD, arXiv 2512.04678, eq. 11)::

        real = c + g (c - u), fake likewise;     g = s ("self_forcing"), s - 1 ("dmd2": real = u + s (c - u))
        d    = (fake - real) / (mean|x - real| + eps), the mean over the sample's elements, then the NaN rule
        gradient = w m d / N,     loss = sum(w m d^2) / (2 N),     N = selected elements of the whole batch

    Args:
        x: [B, ...] generator output (video latents [B, F, C, H, W]), float64, float32, bfloat16 or float16.
        fake, real: conditional predictions of the fake and the real score, shape of ``x``, dtype of ``x`` or
            float32 (one dtype for all predictions and ``x_t``).
        fake_uncond, real_uncond: unconditional predictions. Not read where g = 0.
        fake_guidance, real_guidance: the scale s of the convention; default: no guidance.
        guidance: "self_forcing": v = c + s (c - u), none at s = 0 (CausVid, Self-Forcing, Reward Forcing;
            their 3.0 is 4.0 of the other). "dmd2": v = u + s (c - u), none at s = 1.
        weight: [B], [B, F], or as many dimensions as ``x`` (size 1 broadcasts); used in float32 (float64 for
            float64 ``x``). See ``reward_weight``.
        mask: bool, shapes as ``weight``; True selects. It acts on gradient, loss and N, not on the
            normaliser.
        normalize, eps: False divides by 1 (``x`` is then not read). A sample whose divisor is 0 has d = 0.
        nan: "sample" (default): a sample whose d (or weight) is not finite in every element, in the
            predictions' dtype, gets gradient 0 and is counted in ``dropped``; N does not change. "published":
            NaN -> 0, +-inf -> the largest finite number of the predictions' dtype, element by element, a zero
            divisor included (the loss may then overflow). "raise": an ArgumentError instead of a dropped
            sample; the only mode that waits for the device.
        prediction: "x0", or "flow": x0 = x_t - sigma * prediction, for every prediction.
        x_t, sigma: for "flow": the noisy input [B, ...] and its noise level, [B] or [B, F].
        reduction: "mean": as above. "sum", "none": the divisor N is 1, the gradient is w m d.
        return_aux: also return a ``DMDAux``.

    Returns:
        gradient, shape and dtype of ``x``, without graph; or (gradient, DMDAux). N = 0: gradient and loss are
        0.

    Arithmetic is float32 (float64 for float64 ``x``); sums have two levels, fixed tiles in float32 and their
    sums in float64, so results do not depend on threads, and norms and ``reduction="none"`` not on the other
    samples. Nothing is mutated. Inputs that are not contiguous are copied. Raises ArgumentError for a wrong
    call, before anything is computed.
    """
    choice(_OP, "reduction", ("mean", "sum", "none"), reduction)
    _check_tensors(x, fake, real, fake_uncond, real_uncond, weight, mask, x_t, sigma)
    with torch.no_grad():
        arguments = _arguments(
            x,
            fake,
            real,
            fake_uncond,
            real_uncond,
            real_guidance,
            fake_guidance,
            guidance,
            weight,
            mask,
            normalize,
            eps,
            nan,
            prediction,
            x_t,
            sigma,
            reduction,
            True,
        )
        gradient, *aux, _ = invoke(ops.dmd_gradient.default, *arguments)
    return (gradient, DMDAux(*aux)) if return_aux else gradient


@nvtx_annotated
def dmd_loss(
    x: Tensor,
    *,
    fake: Tensor,
    real: Tensor,
    fake_uncond: Tensor | None = None,
    real_uncond: Tensor | None = None,
    real_guidance: float | None = None,
    fake_guidance: float | None = None,
    guidance: str = "self_forcing",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool = True,
    eps: float = 0.0,
    nan: str = "sample",
    prediction: str = "x0",
    x_t: Tensor | None = None,
    sigma: Tensor | None = None,
    reduction: str = "mean",
    return_aux: bool = False,
):
    """The distribution-matching loss as a scalar that is differentiable in ``x``, and in ``x`` alone::

        loss = sum( w m (x - stop(x - d))^2 ) / (2 N)        d loss / d x = w m d / N

    Arguments as in ``dmd_gradient`` (same launch; loss and gradient come out together, backward is one
    multiplication); every other argument is a constant of the loss, as its definition says. ``reduction``:
    "mean" or "sum" (N = 1). For float16 ``x`` the division by N waits for backward, so that a scaled loss
    keeps small gradients out of the subnormal range. Returns the loss, [], float32 (float64 for float64
    ``x``); or (loss, DMDAux). Differentiating twice raises.
    """
    choice(_OP, "reduction", ("mean", "sum"), reduction)
    _check_tensors(x, fake, real, fake_uncond, real_uncond, weight, mask, x_t, sigma)
    fixed = [None if t is None else t.detach() for t in (fake, real, fake_uncond, real_uncond)]
    weight, x_t, sigma = (None if t is None else t.detach() for t in (weight, x_t, sigma))
    arguments = _arguments(
        x,
        *fixed,
        real_guidance,
        fake_guidance,
        guidance,
        weight,
        mask,
        normalize,
        eps,
        nan,
        prediction,
        x_t,
        sigma,
        reduction,
        x.dtype != torch.float16,
    )
    _, loss, *aux, _ = invoke(ops.dmd_gradient.default, *arguments)
    return (loss, DMDAux(loss.detach(), *aux)) if return_aux else loss


def _check_tensors(x, fake, real, fake_uncond, real_uncond, weight, mask, x_t, sigma):
    optional = {
        "fake_uncond": fake_uncond,
        "real_uncond": real_uncond,
        "weight": weight,
        "mask": mask,
        "x_t": x_t,
        "sigma": sigma,
    }
    check_tensors(_OP, {"x": x, "fake": fake, "real": real}, optional)


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


def _arguments(
    x,
    fake,
    real,
    fake_uncond,
    real_uncond,
    real_guidance,
    fake_guidance,
    guidance,
    weight,
    mask,
    normalize,
    eps,
    nan,
    prediction,
    x_t,
    sigma,
    reduction,
    scale_gradient,
):
    """What only Python can see (strings, conventions), into the arguments of the registered op."""
    choice(_OP, "guidance", ("self_forcing", "dmd2"), guidance)
    choice(_OP, "prediction", ("x0", "flow"), prediction)
    for name, value in (("x_t", x_t), ("sigma", sigma)):
        if (value is not None) != (prediction == "flow"):
            expected = 'a tensor, with prediction="flow"' if value is None else 'None, with prediction="x0"'
            raise argument_error(_OP, name, expected, "None" if value is None else "a tensor")
    g_fake = _coefficient("fake_guidance", fake_guidance, fake_uncond, guidance)
    g_real = _coefficient("real_guidance", real_guidance, real_uncond, guidance)
    acc = _acc_dtype(x.dtype)
    weight = weight.to(acc) if weight is not None and weight.is_floating_point() else weight
    sigma = sigma.to(acc) if sigma is not None and sigma.is_floating_point() else sigma
    return (
        x,
        fake,
        real,
        fake_uncond,
        real_uncond,
        g_fake,
        g_real,
        x_t,
        sigma,
        weight,
        mask,
        bool(normalize),
        number(_OP, "eps", eps),
        nan,
        reduction,
        scale_gradient,
    )


def supports(dtype: torch.dtype = torch.float32, prediction_dtype: torch.dtype | None = None, device="cpu"):
    """(True, backend) or (False, reason), without touching a device."""
    prediction_dtype = prediction_dtype or dtype
    kind = torch.device(device).type
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return False, f"x of dtype {dtype}: float64, float32, bfloat16 or float16"
    if prediction_dtype not in (dtype, torch.float32):
        return False, f"predictions of dtype {prediction_dtype} with x of {dtype}: the dtype of x, or float32"
    if kind == "cpu":
        return True, "cpu"
    if kind == "cuda":
        archs = build_info()["cuda_archs"]
        return (
            (True, f"cuda ({archs})")
            if archs
            else (False, "this build has no CUDA part (built without nvcc)")
        )
    return False, f"device {kind}: cpu or cuda"


def cost(
    shape,
    dtype: torch.dtype = torch.float32,
    prediction_dtype: torch.dtype | None = None,
    *,
    fake_uncond: bool = False,
    real_uncond: bool = True,
    flow: bool = False,
    normalize: bool = True,
    weight_elements: int = 0,
    mask_elements: int = 0,
) -> dict:
    """FLOPs and the floor in bytes: every input read once, the gradient written once."""
    elements = math.prod(shape)
    predictions = 2 + fake_uncond + real_uncond + (flow and normalize)
    size, prediction_size = dtype.itemsize, (prediction_dtype or dtype).itemsize
    bytes_ = elements * (size * (1 + normalize) + prediction_size * predictions)
    bytes_ += weight_elements * _acc_dtype(dtype).itemsize + mask_elements
    # guided: 3 each; difference, division, coefficient and product, two terms and their sums: 8; distance and
    # its sum: 2; flow: 3
    flops = elements * (3 * (fake_uncond + real_uncond) + 8 + 2 * normalize + 3 * flow)
    return {"flops": flops, "bytes": bytes_}


for _function in (dmd_gradient, dmd_loss):
    _function.supports = supports
    _function.cost = cost


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


def _setup_context(ctx, inputs, output):
    gradient, _, *aux, scale = output
    ctx.mark_non_differentiable(gradient, *aux, scale)
    ctx.scaled = inputs[-1]
    ctx.save_for_backward(gradient, scale)


@torch.autograd.function.once_differentiable
def _backward(ctx, _gradient, grad_loss, *_):
    gradient, scale = ctx.saved_tensors
    factor = grad_loss if ctx.scaled else grad_loss * scale
    if type(factor) is Tensor and factor.is_cpu and factor.item() == 1:
        # backward() of the loss itself: nothing to multiply by, and on the CPU looking costs nothing
        dx = gradient
    else:
        dx = gradient * factor  # 0-dim: applied in the arithmetic type, one rounding to the gradient's dtype
    return dx, *([None] * 15)


torch.library.register_autograd("rf_kernels::dmd_gradient", _backward, setup_context=_setup_context)
