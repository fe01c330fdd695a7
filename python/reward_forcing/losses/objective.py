"""What an objective of distillation is: the generator's loss and the critic's, on what the trainer hands it.

An objective is a frozen dataclass; its fields are what ``distill.options`` of a training file may say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .._check import expect
from ..scheduler import FlowMatchScheduler
from .common import Scorer


@dataclass
class Batch:
    """One micro-step, of the generator or of the critic. What an objective does not ask for is not computed.

    Args:
        x: the generator's output ``[B, F, C, H, W]``; a leaf in the generator's step.
        noise, t: of the scores: like x, and ``[B]``.
        scheduler: the noise schedule.
        fake, real, fake_uncond, real_uncond: scorers; of the critic's step, ``fake`` alone.
        real_guidance, fake_guidance: scale s of ``c + s (c - u)``; 0 is none.
        beta: of weights exp(beta reward).
        entered, entered_t: what entered the forward that gave x, and its timesteps ``[F]``.
        clean: the finished rollout; x, unless the objective ``revisits`` it.
        exit_t, next_t: timestep that all chunks left at, and that the sampler noises x to next (0: x is
            finished); None where chunks left at different steps.
        draw: noise like x, by name.
        timesteps: one timestep a sample, by name, between the second and the third argument (default: all).
        uniform: a number in [0, 1), by name, the same for all samples.
        prompts: the samples' prompts.
        rewards: scores of the reward on ``clean``, ``[B]``.
        saliency: size of the reward's gradient there, ``[B, F, H, W]``, on the grid of x.
        clips: real clips, like x. discriminator: logits of noised clips, where the objective needs one.
    """

    x: Tensor
    noise: Tensor
    t: Tensor
    scheduler: FlowMatchScheduler
    fake: Scorer
    entered: Tensor
    entered_t: Tensor
    clean: Tensor
    exit_t: float | None
    next_t: float | None
    draw: Callable[[str], Tensor]
    timesteps: Callable[..., Tensor]
    uniform: Callable[[str], float]
    prompts: Sequence[str]
    clips: Callable[[], Tensor]
    real: Scorer | None = None
    fake_uncond: Scorer | None = None
    real_uncond: Scorer | None = None
    real_guidance: float = 0.0
    fake_guidance: float = 0.0
    beta: float = 0.0
    rewards: Callable[[], Tensor] | None = None
    saliency: Callable[[], Tensor] | None = None
    discriminator: nn.Module | None = None

    @property
    def scores(self) -> dict:
        """Scorers and guidance, as ``dmd_loss`` takes them."""
        names = ("fake", "real", "fake_uncond", "real_uncond", "real_guidance", "fake_guidance")
        return {name: getattr(self, name) for name in names}

    @property
    def arguments(self) -> dict:
        """Scorers, guidance, and what x is noised with."""
        return self.scores | {"noise": self.noise, "t": self.t, "scheduler": self.scheduler}


class Objective:
    """Base of the objectives."""

    #: Whether ``Batch.rewards`` is asked for; whether all chunks must leave at the same step (``same_exit``).
    needs_reward: ClassVar[bool] = False
    needs_same_exit: ClassVar[bool] = False
    #: Whether a discriminator is trained beside the critic.
    needs_discriminator: ClassVar[bool] = False
    #: Whether the generator's x is its answer to its own finished clips, noised to their exit steps again,
    #: instead of the rollout.
    revisits: ClassVar[bool] = False

    def generator_loss(self, batch: Batch) -> Tensor:
        """A scalar, differentiable in ``batch.x``."""
        raise NotImplementedError

    def critic_loss(self, batch: Batch) -> Tensor:
        """A scalar, differentiable in the critic's parameters."""
        from . import dmd

        return dmd.critic_flow_loss(
            batch.fake, batch.x, noise=batch.noise, t=batch.t, scheduler=batch.scheduler
        )


def in_range(who: object, name: str, low: float, high: float = float("inf")) -> None:
    """Check a field of an objective: a number in [low, high]."""
    value = getattr(who, name)
    expect(low <= value <= high, type(who).__name__, name, f"a number in [{low}, {high}]", value)
