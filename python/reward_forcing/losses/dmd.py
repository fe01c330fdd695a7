"""Distribution matching, and the systems whose gradient is that of DMD: DMD2, Re-DMD, AnyFlow, TMD.

The critic's flow loss is here too; every system of this package but Phased DMD and TDM trains its critic so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..scheduler import FlowMatchScheduler
from .common import Scorer, predictions
from .objective import Batch, Objective, in_range


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
            guidance is not 0 (not 1 where ``options`` say "dmd2").
        noise: as x. t: ``[B]``.
        weight: per sample, frame or element. mask: bool, True where an element counts.
        options: normaliser and NaN rule; default ``rf.DMDOptions()``.
    """
    options = rf.DMDOptions() if options is None else options
    scores = predictions(
        scheduler.add_noise(x.detach(), noise, t),
        t,
        fake=fake,
        real=real,
        real_uncond=real_uncond,
        fake_uncond=fake_uncond,
        real_guidance=real_guidance,
        fake_guidance=fake_guidance,
        none=1.0 if options.guidance == "dmd2" else 0.0,
    )
    return rf.dmd_loss(x, **scores, weight=weight, mask=mask, options=options)


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
    fake: Scorer,
    generated: Tensor,
    *,
    noise: Tensor,
    t: Tensor,
    scheduler: FlowMatchScheduler,
    mask: Tensor | None = None,
) -> Tensor:
    """What the critic is trained on: ``mean((flow - (noise - x))^2)`` with ``flow = (x_t - fake(x_t, t)) /
    sigma``, on detached x; of the samples that ``mask`` ``[B]`` selects, 0 where it selects none.

    Differentiable in the critic's parameters; a scalar in the prediction's dtype.
    """
    x = generated.detach()
    x_t = scheduler.add_noise(x, noise, t)
    flow = scheduler.flow_from_x0(fake(x_t, t), x_t, t)
    error = (flow - scheduler.training_target(x, noise)).square()
    if mask is None:
        return error.mean()
    return torch.where(mask, error.flatten(1).mean(dim=1), 0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class DMD(Objective):
    """DMD as CausVid, Self-Forcing and LongLive train with it."""

    def generator_loss(self, batch: Batch) -> Tensor:
        return dmd_loss(batch.x, **batch.arguments)


@dataclass(frozen=True)
class DMD2(Objective):
    """DMD2 (arXiv 2405.14867; tianweiy/DMD2, main/sd_guidance.py), its guidance ``u + s (c - u)`` and its NaN
    rule. The GAN loss on real clips is not covered.

    Args:
        guidance_scale: s of the real score; None: the file's ``real_guidance`` + 1, which is the same
            guidance.
    """

    guidance_scale: float | None = None

    def generator_loss(self, batch: Batch) -> Tensor:
        scale = 1 + batch.real_guidance if self.guidance_scale is None else self.guidance_scale
        guidance = {"real_guidance": scale, "fake_guidance": 1 + batch.fake_guidance}
        options = rf.DMDOptions(guidance="dmd2", nan="published")
        return dmd_loss(batch.x, **batch.arguments | guidance, options=options)


@dataclass(frozen=True)
class TMD(Objective):
    """The distribution matching of Transition Matching Distillation (arXiv 2601.09881): that of DMD2 on the
    rolled-out student. Its flow head and its discriminator are not covered.

    Args:
        eps: added to the normaliser, as in NVlabs/FastGen (methods/common_loss.py), which has the same loss.
    """

    eps: float = 1e-6

    def __post_init__(self):
        in_range(self, "eps", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        return dmd_loss(batch.x, **batch.arguments, options=rf.DMDOptions(eps=self.eps))


@dataclass(frozen=True)
class AnyFlow(Objective):
    """On-policy stage of AnyFlow (arXiv 2605.13724; NVlabs/AnyFlow,
    far/trainers/trainer_far_wan_anyflow_onpolicy.py): ``dmd_weight mean((x - stop(x - d))^2)``, without the
    half of DMD. Its flow-map student and the loss that is trained beside it are not covered.

    Args:
        dmd_weight: the factor.
    """

    dmd_weight: float = 1.0

    def __post_init__(self):
        in_range(self, "dmd_weight", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        options = rf.DMDOptions(nan="published")
        return 2 * self.dmd_weight * dmd_loss(batch.x, **batch.arguments, options=options)


@dataclass(frozen=True)
class ReDMD(Objective):
    """Reward Forcing: weights exp(beta reward), beta that of the file."""

    needs_reward = True

    def generator_loss(self, batch: Batch) -> Tensor:
        return re_dmd_loss(batch.x, reward=batch.rewards(), beta=batch.beta, **batch.arguments)
