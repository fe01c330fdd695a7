"""Phased DMD: distribution matching within a part of the noise levels (arXiv 2510.27684).

A phase ends at a noise level s, and its generator's output is ``x_s``. Scores are taken at levels t above
s, at ``x_t = (a_t / a_s) x_s + sigma_ts noise`` with ``a = 1 - sigma`` and ``sigma_ts^2 = sigma_t^2 - (a_t /
a_s)^2 sigma_s^2``. The critic never sees a clean sample, so its target is affine in what it does see (eq.
13).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..scheduler import FlowMatchScheduler
from .common import Scorer, predictions, sigma_of
from .objective import Batch, Objective, in_range


def subinterval(sigma_s: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
    """``a_t / a_s`` and ``sigma_ts`` of two noise levels, sigma_s <= sigma_t."""
    ratio = (1 - sigma_t) / (1 - sigma_s)
    return ratio, (sigma_t**2 - ratio**2 * sigma_s**2).clamp(min=0).sqrt()


def phased_noise(x_s: Tensor, noise: Tensor, sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """``x_t`` from ``x_s``."""
    ratio, sigma_ts = subinterval(sigma_s, sigma_t)
    return (ratio * x_s + sigma_ts * noise).to(x_s.dtype)


def phased_dmd_loss(
    x: Tensor,
    *,
    noise_s: Tensor,
    s: Tensor,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    normalize: bool = True,
    **scores,
) -> Tensor:
    """The generator's loss of a phase, differentiable in x, its x0 prediction.

    ``x_s = add_noise(x, noise_s, s)``, or x itself for s = 0.

    Args:
        normalize: True: d as in DMD, the normaliser from x0, as in ModelTC/LightX2V
            (lightx2v_train, phased DMD). False: the paper's ``w (v_real - v_fake) dx_s / dx``, predictions as
            flows, ``w = a_t (a_t / a_s) / sigma_t`` (a mean over the elements).
        noise_s, noise: like x. s, t: timesteps ``[B]``, s below t.
        scores: scorers and guidance of ``dmd_loss``.
    """
    sigma_s, sigma_t = (sigma_of(scheduler, level, x) for level in (s, t))
    sigma_s = torch.where(s.reshape(sigma_s.shape) == 0, 0, sigma_s)
    x_s = (1 - sigma_s) * x.detach() + sigma_s * noise_s
    found = predictions(phased_noise(x_s.to(x.dtype), noise, sigma_s, sigma_t), t, **scores)
    if normalize:
        return rf.dmd_loss(x, **found)
    # v_real - v_fake = (fake - real) / sigma_t in x0, and dx_s / dx = a_s.
    weight = ((1 - sigma_t) ** 2 / sigma_t**2).flatten()
    return rf.dmd_loss(x, **found, weight=weight, options=rf.DMDOptions(normalize=False))


def phased_critic_loss(
    fake: Scorer,
    x_s: Tensor,
    *,
    s: Tensor,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    largest: float = 10.0,
) -> Tensor:
    """Score matching within the subinterval (eq. 13): ``mean(clamp(1 / sigma_ts^2, 0, largest) |sigma_ts v -
    target|^2)``, ``target = (a_s^2 sigma_t + a_t sigma_s^2) / a_s^2 noise - sigma_ts / a_s x_s``, v the
    critic's flow at x_t.

    Args:
        x_s: what the phase's generator makes, at the timesteps s ``[B]``; s = 0: clean. Detached.
        noise, t: of x_t, as in ``phased_dmd_loss``.
    """
    x_s = x_s.detach()
    sigma_s, sigma_t = (sigma_of(scheduler, level, x_s) for level in (s, t))
    sigma_s = torch.where(s.reshape(sigma_s.shape) == 0, 0, sigma_s)
    _, sigma_ts = subinterval(sigma_s, sigma_t)
    x_t = phased_noise(x_s, noise, sigma_s, sigma_t)
    flow = scheduler.flow_from_x0(fake(x_t, t), x_t, t)
    slope = sigma_t + (1 - sigma_t) * sigma_s**2 / (1 - sigma_s) ** 2
    target = slope * noise - sigma_ts / (1 - sigma_s) * x_s
    weight = (1 / sigma_ts**2).clamp(max=largest)
    return (weight * (sigma_ts * flow - target).square()).mean()


@dataclass(frozen=True)
class PhasedDMD(Objective):
    """Every denoising step is a phase: it ends where the sampler noises its x0 to next, 0 after the last.

    Args:
        normalize: as ``phased_dmd_loss``.
        largest: of the critic's weight.
    """

    normalize: bool = True
    largest: float = 10.0
    needs_same_exit = True

    def __post_init__(self):
        in_range(self, "largest", 0)

    def _levels(self, batch: Batch) -> dict:
        expect(batch.next_t is not None, "PhasedDMD", "same_exit", "True", False)
        s = torch.full_like(batch.t, batch.next_t)
        t = batch.timesteps("phased", batch.next_t)
        return {"s": s, "t": t, "noise": batch.noise, "scheduler": batch.scheduler}

    def generator_loss(self, batch: Batch) -> Tensor:
        levels = self._levels(batch) | {"noise_s": batch.draw("phase end"), "normalize": self.normalize}
        return phased_dmd_loss(batch.x, **levels, **batch.scores)

    def critic_loss(self, batch: Batch) -> Tensor:
        levels, end = self._levels(batch), batch.draw("phase end")
        x_s = batch.x if batch.next_t == 0 else batch.scheduler.add_noise(batch.x, end, levels["s"])
        return phased_critic_loss(batch.fake, x_s, **levels, largest=self.largest)
