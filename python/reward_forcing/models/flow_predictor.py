"""Scorers of distillation: a bidirectional transformer asked for x0 at a noise level."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .._check import expect
from ..scheduler import FlowMatchScheduler
from .bidirectional_wan import BidirectionalWanModel


class FlowPrediction(NamedTuple):
    """A prediction in both of its forms, ``[B, F, C, H, W]``: ``flow = noise - x0``, and ``x0 = x_t - sigma
    flow``."""

    flow: Tensor
    x0: Tensor


class FlowPredictor(nn.Module):
    """Teacher or critic: predicts flow and x0 of noisy clips, differentiable in clip and parameters.

    Args:
        model: the transformer.
        scheduler: maps timesteps to noise levels.
    """

    def __init__(self, model: BidirectionalWanModel, scheduler: FlowMatchScheduler):
        super().__init__()
        self.model, self.scheduler = model, scheduler

    def forward(
        self, x_t: Tensor, t: Tensor, context: Tensor, *, seq_len: int | None = None
    ) -> FlowPrediction:
        """
        Args:
            x_t: noisy clips ``[B, F, C, H, W]``.
            t: one timestep per sample, ``[B]`` or ``[B, 1]``.
            context: text features ``[B, n, text_dim]``.
        """
        t = t.reshape(t.shape[0], -1)
        expect(
            t.shape[1] == 1, "FlowPredictor", "t", "one timestep per sample, [B] or [B, 1]", tuple(t.shape)
        )
        t = t.squeeze(1)
        flow = self.model(x_t.transpose(1, 2), t, self.model.text_keys(context), seq_len=seq_len).transpose(
            1, 2
        )
        return FlowPrediction(flow, self.scheduler.x0_from_flow(flow, x_t, t))
