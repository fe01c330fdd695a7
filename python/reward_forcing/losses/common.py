"""What the losses share: scorers, timesteps, guidance, and a scalar with the gradient it is given.

A scorer is a callable ``scorer(x_t, t) -> x0 prediction``, with its text (or the empty one, for guidance)
bound: clips ``[B, F, C, H, W]``, one timestep per sample ``[B]``. All losses take the noise and the timesteps
they shall use, so that a step can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..scheduler import FlowMatchScheduler

Scorer = Callable[[Tensor, Tensor], Tensor]


def warp_timesteps(
    n: Tensor, *, shift: float, min_step: float = 20, max_step: float = 980, num_train_timesteps: int = 1000
) -> Tensor:
    """Timesteps of integers n in [0, num_train_timesteps): ``T shift (n/T) / (1 + (shift - 1) n/T)``, clamped
    to [min_step, max_step].

    Float32, of n's shape. The clamp keeps training off both ends, where the score is undefined or trivial.
    """
    s = n.float() / num_train_timesteps
    return (shift * s / (1 + (shift - 1) * s) * num_train_timesteps).clamp(min_step, max_step)


def draw_timesteps(
    batch: int,
    *,
    shift: float,
    min_step: float = 20,
    max_step: float = 980,
    num_train_timesteps: int = 1000,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One training timestep per sample, float32 ``[batch]``: a uniform integer through ``warp_timesteps``."""
    n = torch.randint(0, num_train_timesteps, (batch,), device=device, generator=generator)
    return warp_timesteps(
        n, shift=shift, min_step=min_step, max_step=max_step, num_train_timesteps=num_train_timesteps
    )


def like(t: Tensor, data: Tensor) -> Tensor:
    """``t`` ``[B]`` or ``[B, F]`` with dimensions of size 1 behind it, as many as ``data`` has."""
    return t.reshape(t.shape + (1,) * (data.dim() - t.dim()))


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance as published: ``c + scale (c - u)``; ``c`` itself for scale 0."""
    if scale == 0:
        return conditional
    expect(unconditional is not None, "guided", "unconditional", f"a prediction for the scale {scale}", None)
    return conditional + (conditional - unconditional) * scale


def predict(scorer: Scorer | None, scale: float, x_t: Tensor, t: Tensor) -> Tensor | None:
    """The unconditional prediction, if guidance needs it."""
    return scorer(x_t, t) if scorer is not None and scale != 0 else None


@torch.no_grad()
def predictions(
    x_t: Tensor,
    t: Tensor,
    *,
    fake: Scorer,
    real: Scorer,
    real_uncond: Scorer | None = None,
    fake_uncond: Scorer | None = None,
    real_guidance: float = 0.0,
    fake_guidance: float = 0.0,
    none: float = 0.0,
) -> dict:
    """The arguments of ``rf_kernels.dmd_gradient`` that the scorers give at x_t. An unconditional
    scorer is called only where its scale is not ``none``, the scale that means no guidance."""
    return {
        "fake": fake(x_t, t),
        "fake_uncond": predict(fake_uncond, fake_guidance - none, x_t, t),
        "real": real(x_t, t),
        "real_uncond": predict(real_uncond, real_guidance - none, x_t, t),
        "real_guidance": real_guidance,
        "fake_guidance": fake_guidance,
    }


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, *pairs):
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        gradients = [grad.to(g.dtype) * g for g in ctx.saved_tensors]
        return None, *(part for g in gradients for part in (g, None))


def surrogate(value: Tensor, *pairs: Tensor) -> Tensor:
    """A scalar of this value whose gradient on each tensor of ``pairs`` (x, gradient, y, gradient, ...) is
    the gradient behind it: for losses that are not ``rf_kernels.dmd_loss`` with other arguments."""
    return _Surrogate.apply(value.detach(), *(p if i % 2 == 0 else p.detach() for i, p in enumerate(pairs)))


def sigma_of(scheduler: FlowMatchScheduler, t: Tensor, data: Tensor) -> Tensor:
    """Noise level of t in the dtype that sums over ``data`` are formed in, ready to multiply it."""
    return like(scheduler.sigma(t).to(torch.promote_types(data.dtype, torch.float32)), data)


#: For ``rf_kernels.dmd_gradient`` where a formula brings a normaliser of its own, or none.
PLAIN = rf.DMDOptions(normalize=False)
