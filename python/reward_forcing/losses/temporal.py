"""Diagonal Distillation: distribution matching of the frames and of their differences (arXiv 2603.09488;
Sphere-AI-Lab/diagdistill, model/dmd.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from ..scheduler import FlowMatchScheduler
from .common import like, predictions, surrogate
from .objective import Batch, Objective, in_range

_EACH = rf.DMDOptions(nan="published", reduction="none")


def difference_weight(gradient: Tensor, x: Tensor, *, base: float = 1.2, share: float = 0.3) -> Tensor:
    """Weights of the differences, ``[B, F - 1]``: ``(1 - share) (1 + cumulative error / total error) + share
    base^f / mean``, the error of f being ``mean((gradient_f - x_{f + 1})^2)``, as published."""
    error = (gradient - x[:, 1:]).square().flatten(2).mean(dim=2)
    total = error.cumsum(dim=1)
    growing = base ** torch.arange(error.shape[1], device=x.device, dtype=error.dtype)
    return (1 - share) * (1 + total / total[:, -1:].clamp(min=1e-6)) + share * growing / growing.mean()


def diagonal_loss(
    x: Tensor, *, noise: Tensor, t: Tensor, scheduler: FlowMatchScheduler, motion: float = 1.0, **scores
) -> Tensor:
    """``dmd_loss + motion mean(w_f m^2)``: m is the normalised gradient of DMD of the differences between
    frames, each with the frame before, and w ``difference_weight``. Differentiable in x alone, where the
    second term's gradient is ``2 motion w m / N`` on the differences.

    Args:
        scores: scorers and guidance of ``dmd_loss``.
    """
    found = predictions(scheduler.add_noise(x.detach(), noise, t), t, **scores)
    loss = rf.dmd_loss(x, **found, options=rf.DMDOptions(nan="published"))
    moved = x.diff(dim=1)
    changes = {name: p.diff(dim=1) if isinstance(p, Tensor) else p for name, p in found.items()}
    m = rf.dmd_gradient(moved.detach(), **changes, options=_EACH)
    weighted = like(difference_weight(m, x.detach()), m) * m
    return loss + surrogate(motion * (weighted * m).mean(), moved, 2 * motion / m.numel() * weighted)


@dataclass(frozen=True)
class Diagonal(Objective):
    """Diagonal Distillation's two terms. Its regression on a frozen four-step student, its feature heads and
    its diagonal schedule of denoising steps are not covered.

    Args:
        motion: factor of the second term, 1 in the released configurations.
    """

    motion: float = 1.0

    def __post_init__(self):
        in_range(self, "motion", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        return diagonal_loss(batch.x, **batch.arguments, motion=self.motion)
