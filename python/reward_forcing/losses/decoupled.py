"""Decoupled DMD: matching and guidance taken at noise levels of their own (arXiv 2511.22677, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from ..scheduler import FlowMatchScheduler
from .common import Scorer
from .objective import Batch, Objective


def decoupled_dmd_loss(
    x: Tensor,
    *,
    fake: Scorer,
    real: Scorer,
    real_uncond: Scorer,
    noise: Tensor,
    t: Tensor,
    noise_ca: Tensor,
    t_ca: Tensor,
    scheduler: FlowMatchScheduler,
    real_guidance: float,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    options: rf.DMDOptions | None = None,
) -> Tensor:
    """``g = (fake - c)(x_t) - real_guidance (c - u)(x_t_ca)``, c and u the real score with text and without:
    distribution matching at t, the push of guidance at t_ca. Differentiable in x alone.

    The paper's scale is ``alpha = real_guidance + 1``. The normaliser is that of DMD, from the guided real
    score at t, as in fudan-generative-vision/Hallo-Live (hallolive/model/dual_stream_dmd_model.py); the
    paper's equation has none (``rf.DMDOptions(normalize=False)``). Where both draws are the same this is DMD.

    Args:
        noise, t: of the matching part. noise_ca, t_ca: of the other.
        weight, mask, options: as ``dmd_loss``.
    """
    with torch.no_grad():
        x_t, x_t_ca = scheduler.add_noise(x, noise, t), scheduler.add_noise(x, noise_ca, t_ca)
        fake_x0, cond, uncond = fake(x_t, t), real(x_t, t), real_uncond(x_t, t)
        push = real(x_t_ca, t_ca) - real_uncond(x_t_ca, t_ca)
        # Guidance at t stands in the normaliser alone: it is added to both sides of the difference.
        fake_x0 = fake_x0 + real_guidance * ((cond - uncond) - push)
    options = rf.DMDOptions() if options is None else options
    scores = {"fake": fake_x0, "real": cond, "real_uncond": uncond, "real_guidance": real_guidance}
    return rf.dmd_loss(x, **scores, weight=weight, mask=mask, options=options)


def without_fake_guidance(batch: Batch) -> dict:
    """The batch's arguments that this loss takes."""
    return {name: a for name, a in batch.arguments.items() if not name.startswith("fake_")}


@dataclass(frozen=True)
class DecoupledDMD(Objective):
    """t over the whole range; t_ca above the level that x is noised to next (the whole range where chunks
    leave at different steps)."""

    def generator_loss(self, batch: Batch) -> Tensor:
        other = {"noise_ca": batch.draw("guidance"), "t_ca": batch.timesteps("guidance", batch.next_t or 0.0)}
        return decoupled_dmd_loss(batch.x, **without_fake_guidance(batch), **other)
