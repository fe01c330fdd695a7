"""Trajectory distribution matching (TDM, arXiv 2503.06674; Luo-Yihong/TDM, train_tdm_demo.py).

The sampler takes x on to the level s with the student's own noise e; scores are taken at t >= s, on ``x_t =
a_t x + sigma_t m`` with the mixed noise ``m = ((a_t / a_s) sigma_s e + sigma_ts noise) / sigma_t``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..scheduler import FlowMatchScheduler
from .common import Scorer, guided, like, predictions, sigma_of, surrogate
from .objective import Batch, Objective, in_range
from .phased import subinterval


def mixed_noise(own: Tensor, noise: Tensor, *, s: Tensor, t: Tensor, scheduler: FlowMatchScheduler) -> Tensor:
    """m, from the student's noise and a fresh one, like both; s, t ``[B]``, s = 0: the fresh one."""
    sigma_s, sigma_t = (sigma_of(scheduler, level, noise) for level in (s, t))
    sigma_s = torch.where(like(s, noise) == 0, 0, sigma_s)
    ratio, sigma_ts = subinterval(sigma_s, sigma_t)
    return ((ratio * sigma_s * own + sigma_ts * noise) / sigma_t).to(noise.dtype)


def tdm_loss(
    x: Tensor, *, noise: Tensor, t: Tensor, scheduler: FlowMatchScheduler, huber: float = 1e-3, **scores
) -> Tensor:
    """The generator's loss: ``mean(rho(e) / n)`` with ``e = fake - real``, real guided, ``n = mean|x -
    real|``, ``rho(e) = sqrt(e^2 + huber^2) - huber``, or ``e^2`` for huber = 0. Differentiable in x alone,
    where the gradient is ``rho'(e) / (n N)``.

    Args:
        noise: that x is noised with: ``mixed_noise``. t: ``[B]``.
        scores: scorers and guidance of ``dmd_loss``; the published scale is 1 + ``real_guidance``.
    """
    found = predictions(scheduler.add_noise(x.detach(), noise, t), t, **scores)
    e = found["fake"] - guided(found["real"], found["real_uncond"], found["real_guidance"])
    if found["fake_uncond"] is not None:
        e = e + found["fake_guidance"] * (found["fake"] - found["fake_uncond"])
    e = e.to(torch.promote_types(e.dtype, torch.float32))
    # The op knows no rho: its slope over e, 1 / sqrt(e^2 + huber^2) or 2, is a weight of the elements.
    slope = (e.square() + huber**2).rsqrt() if huber else e.new_full((len(x),), 2.0)
    gradient, aux = rf.dmd_gradient(x.detach(), **found, weight=slope, return_aux=True)
    rho = (e.square() + huber**2).sqrt() - huber if huber else e.square()
    n = aux.normalizer.where(aux.normalizer > 0, torch.inf)
    return surrogate((rho / like(n, rho)).mean(), x, gradient)


def tdm_critic_loss(
    fake: Scorer,
    x: Tensor,
    *,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    fresh: Tensor | None = None,
    largest: float = 5.0,
) -> Tensor:
    """What the critic is trained on: the mean over the samples of ``min(SNR_t, largest) w mean((fake(x_t, t)
    - x)^2)``, ``SNR = (a_t / sigma_t)^2``, on detached x.

    Args:
        noise: that x is noised with. fresh: the fresh noise in it; then ``w = exp(-mean(noise^2) / 2) /
            exp(-mean(fresh^2) / 2)`` weighs by importance, else w = 1.
    """
    x = x.detach()
    sigma = scheduler.sigma(t).to(torch.promote_types(x.dtype, torch.float32))
    weight = ((1 - sigma) / sigma).square().clamp(max=largest)
    if fresh is not None:
        energy = [part.to(weight.dtype).square().flatten(1).mean(dim=1) for part in (noise, fresh)]
        weight = weight * torch.exp((energy[1] - energy[0]) / 2)
    error = (fake(scheduler.add_noise(x, noise, t), t) - x).square().flatten(1).mean(dim=1)
    return (weight * error).mean()


@dataclass(frozen=True)
class TDM(Objective):
    """TDM, s where the sampler noises x to next; t reaches to the top of the range, as published without
    ``use_separate``.

    Args:
        huber: c of the pseudo-Huber; 0: squares.
        largest: of the signal-to-noise ratio in the critic's loss.
    """

    huber: float = 1e-3
    largest: float = 5.0
    needs_same_exit = True

    def __post_init__(self):
        in_range(self, "huber", 0)
        in_range(self, "largest", 0)

    def _noised(self, batch: Batch) -> dict:
        expect(batch.next_t is not None, "TDM", "same_exit", "True", False)
        entered, sigma = batch.entered, sigma_of(batch.scheduler, batch.entered_t, batch.x[0])
        own = (entered - (1 - sigma) * batch.x.detach()) / sigma
        t, s = batch.timesteps("tdm", batch.next_t), torch.full_like(batch.t, batch.next_t)
        noise = mixed_noise(own, batch.noise, s=s, t=t, scheduler=batch.scheduler)
        return {"noise": noise, "t": t, "scheduler": batch.scheduler}

    def generator_loss(self, batch: Batch) -> Tensor:
        return tdm_loss(batch.x, **self._noised(batch), **batch.scores, huber=self.huber)

    def critic_loss(self, batch: Batch) -> Tensor:
        given = self._noised(batch) | {"fresh": batch.noise, "largest": self.largest}
        return tdm_critic_loss(batch.fake, batch.x, **given)
