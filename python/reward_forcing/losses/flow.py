"""Flow losses with weights from outside: advantage-weighted matching and on-policy distillation.

A squared error with a weight per sample is ``dmd_gradient`` without normaliser, of the prediction against its
target: one launch, whose ``per_sample_loss`` is the vector that advantages are applied to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .common import PLAIN, guided, like, sigma_of, surrogate
from .objective import Batch, Objective, in_range
from .weights import standardized

WEIGHTINGS = ("uniform", "t", "t2")


def awm_loss(
    flow: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    factor: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    clip_range: float = 1.0,
    clip_advantage: float = 5.0,
) -> Tensor:
    """Advantage-weighted matching (AWM, arXiv 2509.25050; scxue/advantage_weighted_matching,
    scripts/train_sd3_awm.py): ``mean_b max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range))`` with ``r =
    exp(l - l_old)`` and ``l = -factor mean((flow - target)^2)``, the flow-matching loss as a likelihood.

    Args:
        flow: the student's, at noised clips of its own; differentiable. target: ``noise - clip``.
        advantage: ``[B]``, clipped to +-clip_advantage.
        factor: ``[B]``, the weighting of the noise level; default 1.
        old_log_prob: l of the policy that made the clips, ``[B]``; default: this one, r = 1.
    """
    options = {"options": PLAIN, "return_aux": True}
    gradient, aux = rf.dmd_gradient(flow.detach(), fake=flow.detach(), real=target, **options)
    factor = torch.ones_like(aux.per_sample_loss) if factor is None else factor.to(aux.per_sample_loss)
    log_prob = (
        -factor * aux.per_sample_loss * 2 * len(flow)
    )  # the op's loss is a half, and a mean over the batch
    old = log_prob if old_log_prob is None else old_log_prob.detach()
    advantage = advantage.to(log_prob).clamp(-clip_advantage, clip_advantage)
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    terms, bounds = -advantage * ratio, -advantage * clipped
    moves = (ratio == clipped) | (terms > bounds)  # else the clipped branch is the larger, and constant
    slope = torch.where(moves, 2 * advantage * ratio * factor, 0)
    return surrogate(
        torch.maximum(terms, bounds).mean(), flow, gradient * like(slope, flow).to(gradient.dtype)
    )


def diffusion_opd_loss(student: Tensor, teacher: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """On-policy distillation (DiffusionOPD, arXiv 2605.15055): the closed-form divergence of two transitions
    of one state, ``mean((student - teacher)^2 / (2 scale^2))``, of their means. Differentiable in
    ``student``.

    Args:
        student, teacher: means of the next state, like each other.
        scale: standard deviation of the transition, ``[B]`` or ``[B, F]``; None: 1, an ODE's.
    """
    weight = None if scale is None else 1 / scale.square()
    return rf.dmd_loss(student, fake=student.detach(), real=teacher, weight=weight, options=PLAIN)


def student_flow(batch: Batch) -> Tensor:
    """The student's flow where x was made: ``(entered - x) / sigma``."""
    sigma = sigma_of(batch.scheduler, batch.entered_t, batch.x[0].detach())
    return (batch.entered - batch.x) / sigma


@dataclass(frozen=True)
class AWM(Objective):
    """AWM on the student's own clips, each chunk noised to its exit step, given the clean past. The advantage
    is the reward, standardised over the step.

    Args:
        weighting: of the noise level, "uniform", "t" or "t2".
        clip_range, clip_advantage: of ``awm_loss``.
    """

    weighting: str = "uniform"
    clip_range: float = 1.0
    clip_advantage: float = 5.0
    needs_reward = True
    needs_same_exit = True
    revisits = True

    def __post_init__(self):
        expect(self.weighting in WEIGHTINGS, "AWM", "weighting", f"one of {WEIGHTINGS}", repr(self.weighting))
        in_range(self, "clip_range", 0)
        in_range(self, "clip_advantage", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        sigma = sigma_of(batch.scheduler, batch.entered_t, batch.x[0].detach())
        target = (
            batch.entered - batch.clean
        ) / sigma  # noise - clip, from entered = (1 - sigma) clip + sigma noise
        power = WEIGHTINGS.index(self.weighting)
        factor = batch.scheduler.sigma(batch.entered_t[:1]).expand(len(batch.x)) ** power
        clips = {"clip_range": self.clip_range, "clip_advantage": self.clip_advantage}
        advantage = standardized(batch.rewards(), 1e-4)
        return awm_loss(student_flow(batch), target, advantage, factor=factor, **clips)


@dataclass(frozen=True)
class DiffusionOPD(Objective):
    """DiffusionOPD, one teacher: at the states that the student's sampler came to, its Euler step against
    that of the guided teacher.

    Args:
        scale: standard deviation of the transition; 0: an ODE's, without the division.
    """

    scale: float = 0.0
    needs_same_exit = True

    def __post_init__(self):
        in_range(self, "scale", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        expect(batch.next_t is not None, "DiffusionOPD", "same_exit", "True", False)
        t = batch.entered_t[:1].expand(len(batch.x))
        with torch.no_grad():
            uncond = batch.real_uncond(batch.entered, t) if batch.real_guidance else None
            x0 = guided(batch.real(batch.entered, t), uncond, batch.real_guidance)
        here = batch.scheduler.sigma(t)
        there = (
            batch.scheduler.sigma(torch.full_like(t, batch.next_t))
            if batch.next_t
            else torch.zeros_like(here)
        )
        # entered + (there - here) v, with v = (entered - x0) / here
        share = like((1 - there / here).to(x0.dtype), x0)
        student, teacher = (batch.entered + share * (x - batch.entered) for x in (batch.x, x0))
        scale = torch.full_like(here, self.scale) if self.scale else None
        return diffusion_opd_loss(student, teacher, scale=scale)
