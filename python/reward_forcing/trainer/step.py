"""One optimizer step: gradients of several micro-steps averaged, agreed on, clipped once, applied once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .distributed import agreed, full, mean, settle


class StoppedOnNonFinite(ArithmeticError):
    """Three optimizer steps in a row were skipped because a loss or a gradient was not finite."""


@dataclass
class StepReport:
    """What one optimizer step did. ``applied`` False: it was skipped, and nothing changed. ``skipped`` counts
    such steps of the run."""

    loss: float
    grad_norm: float
    applied: bool
    skipped: int = 0


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of optimizer step ``step`` (from 0) of ``steps``."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        warm *= 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return config.lr * warm


class Stepper:
    """AdamW over a model's parameters, with the rule for what is not finite: no rank applies the step unless
    every rank's loss and gradients are finite; three skipped steps in a row raise
    :class:`StoppedOnNonFinite`."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int):
        self.model, self.config, self.steps = model, config, steps
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.count = 0  # steps asked for
        self.skipped = 0
        self._in_a_row = 0

    def __call__(self, micro_steps: Iterable[Callable[[], Tensor]]) -> StepReport:
        """Run the micro-steps (each adds to the parameters' ``grad`` and returns its loss), then one
        optimizer step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = [micro_step().detach() for micro_step in micro_steps]
        settle(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        for p in parameters:
            p.grad.div_(len(losses))
        loss = mean(torch.stack([x.float().reshape(()) for x in losses]).mean())
        norm = full(nn.utils.get_total_norm([p.grad for p in parameters]))
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        applied = agreed(finite, loss.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.count, self.steps)
        self.count += 1
        if applied:
            if self.config.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
            self.optimizer.step()
            self._in_a_row = 0
        else:
            self.skipped += 1
            self._in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self._in_a_row >= 3:
            self._in_a_row = 0  # a run that goes on from here has three again
            raise StoppedOnNonFinite(f"optimizer step {self.count}: the third in a row that was not finite")
        return StepReport(float(loss), float(norm), applied, self.skipped)

    def counts(self) -> dict[str, int]:
        return {"count": self.count, "skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, counts: dict[str, int]) -> None:
        self.count, self.skipped, self._in_a_row = counts["count"], counts["skipped"], counts["in_a_row"]
