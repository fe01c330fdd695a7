"""Losses of distillation: DMD and Re-DMD through ``rf_kernels.dmd_loss``, the critic's flow loss and SiD in
plain PyTorch.

A scorer is a callable ``scorer(x_t, t) -> x0 prediction``, with its text (or the empty one, for guidance)
bound: clips ``[B, F, C, H, W]``, one timestep per sample ``[B]``. All losses take the noise and the timesteps
they shall use, so that a step can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import rf_kernels as rf

from ._check import expect
from .scheduler import FlowMatchScheduler

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


def guided(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance as published: ``c + scale (c - u)``; ``c`` itself for scale 0."""
    if scale == 0:
        return conditional
    expect(unconditional is not None, "guided", "unconditional", f"a prediction for the scale {scale}", None)
    return conditional + (conditional - unconditional) * scale


def _predict(scorer: Scorer | None, scale: float, x_t: Tensor, t: Tensor) -> Tensor | None:
    """The unconditional prediction, if guidance needs it."""
    return scorer(x_t, t) if scorer is not None and scale != 0 else None


def dmd_loss(
    x: Tensor,
    *,
    fake: Scorer,
    real: Scorer,
    real_uncond: Scorer | None = None,
    fake_uncond: Scorer | None = None,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    real_guidance: float,
    fake_guidance: float = 0.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    options: rf.DMDOptions | None = None,
) -> Tensor:
    """Distribution matching distillation (DMD2, arXiv 2405.14867), differentiable in x alone.

    ``x_t = add_noise(x, noise, t)``; with the guided estimates real and fake, ``d = nan_rule((fake - real) /
    mean|x - real|)``, one normaliser per sample; ``loss = sum(weight mask d^2) / (2 N)`` over the N selected
    elements, and ``d loss / d x = weight mask d / N``.

    Args:
        x: generator output ``[B, F, C, H, W]``.
        fake, real, fake_uncond, real_uncond: scorers; the unconditional ones are called only where their
            guidance is not 0.
        noise: as x. t: ``[B]``.
        weight: per sample, frame or element. mask: bool, True where an element counts.
        options: normaliser and NaN rule; default ``rf.DMDOptions()``.
    """
    with torch.no_grad():
        x_t = scheduler.add_noise(x, noise, t)
        predictions = {
            "fake": fake(x_t, t),
            "fake_uncond": _predict(fake_uncond, fake_guidance, x_t, t),
            "real": real(x_t, t),
            "real_uncond": _predict(real_uncond, real_guidance, x_t, t),
        }
    return rf.dmd_loss(
        x,
        **predictions,
        real_guidance=real_guidance,
        fake_guidance=fake_guidance,
        weight=weight,
        mask=mask,
        options=rf.DMDOptions() if options is None else options,
    )


def re_dmd_loss(x: Tensor, *, reward: Tensor, beta: float, **arguments) -> Tensor:
    """Rewarded DMD (Reward Forcing, arXiv 2512.04678): ``dmd_loss`` with the weight ``exp(beta reward)``, not
    differentiated.

    Args:
        reward: standardised motion-quality reward, ``[B]``; or ``[1]``, one reward for the whole batch, as
            published.
        arguments: of ``dmd_loss``, without ``weight``.
    """
    fits = reward.dim() == 1 and reward.shape[0] in (1, x.shape[0])
    expect(fits, "re_dmd_loss", "reward", f"[1] or [{x.shape[0]}]", tuple(reward.shape))
    weight = rf.reward_weight(reward.detach(), beta).expand(x.shape[0])
    return dmd_loss(x, weight=weight, **arguments)


def critic_flow_loss(
    fake: Scorer, generated: Tensor, *, noise: Tensor, t: Tensor, scheduler: FlowMatchScheduler
) -> Tensor:
    """What the critic is trained on: ``mean((flow - (noise - x))^2)`` with ``flow = (x_t - fake(x_t, t)) /
    sigma``, on detached x.

    Differentiable in the critic's parameters; a scalar in the prediction's dtype.
    """
    x = generated.detach()
    x_t = scheduler.add_noise(x, noise, t)
    flow = scheduler.flow_from_x0(fake(x_t, t), x_t, t)
    return (flow - scheduler.training_target(x, noise)).square().mean()


def sid_loss(
    x: Tensor,
    *,
    fake: Scorer,
    real: Scorer,
    real_uncond: Scorer | None = None,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    real_guidance: float,
    alpha: float = 1.0,
) -> Tensor:
    """Score identity distillation (arXiv 2404.04057), as published for causal video.

    With ``d = real - fake``: ``mean(nan_to_num(d ((real - x) - alpha d) / mean|x - real|))``, products in
    float64, one normaliser per sample, not differentiated. The gradient runs through x and through both
    scorers (x_t is not detached). A float64 scalar.
    """
    x_t = scheduler.add_noise(x, noise, t)
    fake_x0 = fake(x_t, t).double()
    real_x0 = guided(real(x_t, t), _predict(real_uncond, real_guidance, x_t, t), real_guidance).double()
    difference = real_x0 - fake_x0
    normalizer = (x.detach() - real_x0.detach()).abs().flatten(1).mean(dim=1)
    elements = difference * ((real_x0 - x) - alpha * difference)
    return torch.nan_to_num(elements / normalizer.reshape(-1, *(1,) * (x.dim() - 1))).mean()
