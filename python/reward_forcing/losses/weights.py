"""Weights of distribution matching: of samples, frames and elements.

A weight is a constant of the loss. It goes to ``rf_kernels.dmd_gradient`` as it is: ``[B]``, ``[B, F]`` or
``[B, F, 1, H, W]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import rf_kernels as rf

from .decoupled import decoupled_dmd_loss, without_fake_guidance
from .dmd import dmd_loss
from .objective import Batch, Objective, in_range


# ---- frames ------------------------------------------------------------------------------------------------
def frame_ramp(frames: int, ratio: float) -> Tensor:
    """Weights ``[F]`` that grow linearly from the first frame to the last, which weighs ``ratio`` times the
    first; their mean is 1."""
    weight = torch.linspace(1, ratio, frames)
    return weight / weight.mean()


@dataclass(frozen=True)
class AdaState(Objective):
    """Horizon-weighted DMD of AdaState (arXiv 2605.30349): the weight of a frame grows linearly with its
    index. Where the paper's line begins and ends was not found, so it has no default here.

    Args:
        ratio: weight of the last frame over that of the first.
    """

    ratio: float

    def __post_init__(self):
        in_range(self, "ratio", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        weight = frame_ramp(batch.x.shape[1], self.ratio).to(batch.x.device)
        return dmd_loss(batch.x, **batch.arguments, weight=weight.expand(len(batch.x), -1))


# ---- several rewards: Hallo-Live ---------------------------------------------------------------------------
def standardized(scores: Tensor, eps: float = 1e-6) -> Tensor:
    """``(r - mean) / max(std, eps)`` over all samples of all ranks, ``[B]``; the standard deviation is that
    of a population (fudan-generative-vision/Hallo-Live, hallolive/utils/misc.py)."""
    r = scores.detach().double()
    moments = torch.stack([r.new_tensor(len(r)), r.sum(), r.square().sum()])
    if dist.is_initialized():
        dist.all_reduce(moments)
    mean = moments[1] / moments[0]
    std = (moments[2] / moments[0] - mean**2).clamp(min=0).sqrt()
    return ((r - mean) / std.clamp(min=eps)).to(scores.dtype)


def product_weight(rewards: Sequence[Tensor], beta: float) -> Tensor:
    """``prod_m exp(beta r_m)``, ``[B]``: Hallo-Live's weight of a modality, of all rewards that judge it."""
    return rf.reward_weight(torch.stack(list(rewards)).sum(dim=0), beta)


@dataclass(frozen=True)
class HalloLive(Objective):
    """The video part of Hallo-Live (arXiv 2604.23632; hallolive/model/dual_stream_dmd_model.py): DMD with
    weights exp(beta reward). Its audio stream has the same loss on its own latents.

    Args:
        standardize: the reward over all samples of the step, as its synchronisation reward is.
        decoupled: as Decoupled DMD, with one noise, the push of guidance at a level not above that of x's
            exit step (off in the released configurations).
    """

    standardize: bool = False
    decoupled: bool = False
    needs_reward = True

    def generator_loss(self, batch: Batch) -> Tensor:
        reward = batch.rewards()
        weight = product_weight([standardized(reward) if self.standardize else reward], batch.beta)
        if not self.decoupled:
            return dmd_loss(batch.x, **batch.arguments, weight=weight)
        t_ca = batch.timesteps("guidance", 0.0, 1000.0 if batch.exit_t is None else batch.exit_t)
        other = {"noise_ca": batch.noise, "t_ca": t_ca, "weight": weight}
        return decoupled_dmd_loss(batch.x, **without_fake_guidance(batch), **other)
