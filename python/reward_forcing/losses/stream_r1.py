"""Stream-R1: a weight per rollout, by its reward, and per element, by where the reward has gradient (arXiv
2605.03849; wangbei1/Stream-R1, model/stream_r1.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .dmd import dmd_loss
from .objective import Batch, Objective, in_range


def _scaled(t: Tensor, dims: Sequence[int], strength: float, floor: float) -> Tensor:
    """t to [0, 1] over ``dims`` (1 where it is constant), mixed with 1, floored, divided by its mean."""
    low, high = t.amin(dims, keepdim=True), t.amax(dims, keepdim=True)
    flat = high - low <= 1e-8
    scaled = torch.where(flat, 1.0, (t - low) / torch.where(flat, 1.0, high - low))
    weight = ((1 - strength) + strength * scaled).clamp(min=floor)
    return weight / weight.mean(dims, keepdim=True)


def saliency_weight(
    saliency: Tensor,
    *,
    strength: float = 1.0,
    floor: float = 0.5,
    temporal_strength: float = 1.0,
    temporal_floor: float = 0.3,
) -> Tensor:
    """The weight of the elements, its temporal part included: the mean saliency of each frame over the
    frames, times the saliency within each frame, each ``max((1 - s) + s minmax(.), floor) / mean``, and all
    of it divided by its mean.

    Args:
        saliency: ``[B, F, H, W]``, not negative. Returns ``[B, F, 1, H, W]``.
    """
    expect(saliency.dim() == 4, "saliency_weight", "saliency", "[B, F, H, W]", tuple(saliency.shape))
    frames = _scaled(saliency.mean(dim=(2, 3), keepdim=True), (1, 2, 3), temporal_strength, temporal_floor)
    weight = frames * _scaled(saliency, (2, 3), strength, floor)
    return (weight / weight.mean(dim=(1, 2, 3), keepdim=True)).unsqueeze(2)


def mixed_saliency(maps: Tensor, scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Stream-R1's mix of the maps of several rewards ``[M, ...]`` by their scores ``[M]``: shares
    ``softmax(-scores / temperature)``, so the reward that is lowest weighs most."""
    weight = torch.softmax(-scores.to(maps.dtype) / temperature, dim=0)
    return (weight.reshape(-1, *[1] * (maps.dim() - 1)) * maps).sum(dim=0)


class BalancedReward:
    """Stream-R1's reward of several: their mean, less ``penalty`` times the standard deviation (that of a
    sample) of what each has gained within the last ``window`` calls, its second half over its first. The
    penalty begins at call ``warmup``.
    """

    def __init__(self, *, penalty: float = 0.5, window: int = 50, warmup: int = 50):
        self.penalty, self.warmup = penalty, warmup
        self.history: deque[Tensor] = deque(maxlen=window)
        self.calls = 0

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores ``[M]`` of one clip to a scalar."""
        self.calls += 1
        self.history.append(scores.detach())
        if self.calls < self.warmup or len(self.history) < 4 or len(scores) < 2:
            return scores.mean()
        history = torch.stack(list(self.history))
        half = len(history) // 2
        gained = history[half:].mean(dim=0) - history[:half].mean(dim=0)
        return scores.mean() - self.penalty * gained.std()


@dataclass(frozen=True)
class StreamR1(Objective):
    """Stream-R1: Re-DMD with a weight of every element from where the reward has gradient.

    Args:
        strength, floor, temporal_strength, temporal_floor: of ``saliency_weight``.
    """

    strength: float = 1.0
    floor: float = 0.5
    temporal_strength: float = 1.0
    temporal_floor: float = 0.3
    needs_reward = True

    def __post_init__(self):
        for name in ("strength", "floor", "temporal_strength", "temporal_floor"):
            in_range(self, name, 0, 1)

    def generator_loss(self, batch: Batch) -> Tensor:
        weight = saliency_weight(
            batch.saliency(),
            strength=self.strength,
            floor=self.floor,
            temporal_strength=self.temporal_strength,
            temporal_floor=self.temporal_floor,
        )
        reward = rf.reward_weight(batch.rewards(), batch.beta).reshape(-1, 1, 1, 1, 1)
        return dmd_loss(batch.x, **batch.arguments, weight=weight * reward)
