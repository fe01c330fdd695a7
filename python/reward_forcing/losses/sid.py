"""Score identity distillation: the gradient runs through both scores.

With ``d = real - fake`` and one normaliser n per sample, not differentiated, ``L = d ((real - x) - alpha d) /
n``. So, element by element and before the chain through the networks::

    dL/dx    = -d / n
    dL/dfake = ((x - real) + 2 alpha d) / n
    dL/dreal = ((real - x) + (1 - 2 alpha) d) / n

The first is the gradient of DMD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from ..scheduler import FlowMatchScheduler
from .common import Scorer, guided, like, predict, surrogate
from .objective import Batch, Objective


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
    real_x0 = guided(real(x_t, t), predict(real_uncond, real_guidance, x_t, t), real_guidance).double()
    difference = real_x0 - fake_x0
    normalizer = (x.detach() - real_x0.detach()).abs().flatten(1).mean(dim=1)
    elements = difference * ((real_x0 - x) - alpha * difference)
    return torch.nan_to_num(elements / normalizer.reshape(-1, *(1,) * (x.dim() - 1))).mean()


def sid_gradients(x: Tensor, fake: Tensor, real: Tensor, *, alpha: float = 1.0) -> tuple[Tensor, ...]:
    """``dL/dx, dL/dfake, dL/dreal`` of one launch, and the normalisers ``[B]``; of a sum over the elements.

    ``fake`` and ``real`` are x0 predictions, guided already; like x, without graph. A sample that is not
    finite has gradients 0, and the normaliser is not less than 1e-5.
    """
    options = rf.DMDOptions(floor=1e-5, reduction="none")
    dx, aux = rf.dmd_gradient(x, fake=fake, real=real, options=options, return_aux=True)
    finite = torch.stack([part.isfinite().flatten(1).all(dim=1) for part in (x, fake, real)]).all(dim=0)
    normalizer = aux.normalizer.where(finite, torch.inf)
    difference, distance = (part.nan_to_num(0.0, 0.0, 0.0) for part in (real - fake, real - x))
    dfake = (2 * alpha * difference - distance) / like(normalizer, x)
    dreal = (distance + (1 - 2 * alpha) * difference) / like(normalizer, x)
    return dx, dfake.to(fake.dtype), dreal.to(real.dtype), normalizer


def sid_lsg_loss(
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
    alpha: float = 1.0,
) -> Tensor:
    """SiD with guidance on both scores (SiD-LSG, arXiv 2406.01561; mingyuanzhou/SiD-LSG,
    training/sid_training_loop.py): the sum over the elements of a sample, the mean over the batch,
    normalisers not less than 1e-5, and samples that are not finite left out.

    Differentiable through x and both scorers, by ``sid_gradients``.
    """
    x_t = scheduler.add_noise(x, noise, t)
    fake_x0 = guided(fake(x_t, t), predict(fake_uncond, fake_guidance, x_t, t), fake_guidance)
    real_x0 = guided(real(x_t, t), predict(real_uncond, real_guidance, x_t, t), real_guidance)
    constants = [part.detach() for part in (x, fake_x0, real_x0)]
    *gradients, normalizer = sid_gradients(*constants, alpha=alpha)
    x0, f, r = (part.nan_to_num(0.0, 0.0, 0.0) for part in constants)
    value = ((r - f) * ((r - x0) - alpha * (r - f)) / like(normalizer, x0)).sum() / len(x)
    parts = zip((x, fake_x0, real_x0), gradients, strict=True)
    return surrogate(value, *(p for part, gradient in parts for p in (part, gradient / len(x))))


@dataclass(frozen=True)
class SiD(Objective):
    """SiD as Self-Forcing has it. Its critic is that of DMD.

    Args:
        alpha: of the loss.
    """

    alpha: float = 1.0

    def generator_loss(self, batch: Batch) -> Tensor:
        arguments = {name: a for name, a in batch.arguments.items() if not name.startswith("fake_")}
        return sid_loss(batch.x, **arguments, alpha=self.alpha)


@dataclass(frozen=True)
class SiDLSG(SiD):
    """SiD-LSG: a sum, guidance on the fake score too, by the file's ``fake_guidance``."""

    def generator_loss(self, batch: Batch) -> Tensor:
        return sid_lsg_loss(batch.x, **batch.arguments, alpha=self.alpha)
