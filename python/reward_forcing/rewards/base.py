"""What a reward is, and the one place that checks what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._check import expect


class Reward(Protocol):
    """Callable on decoded frames ``[B, F, 3, H, W]`` in [-1, 1] and B prompts; one score per sample, ``[B]``,
    higher is better. Any class with this ``__call__`` serves."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor: ...


@torch.no_grad()
def scores(reward: Reward, frames: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's scores, float32 ``[B]`` on the device of ``frames``.

    A score that is not finite is returned as it is: the trainer decides for all ranks at once what to do
        about it.

    Raises:
        rf_kernels.ArgumentError: a wrong number of prompts, or of scores.
    """
    name = type(reward).__name__
    fits = frames.dim() == 5 and frames.shape[2] == 3
    expect(fits, name, "frames", "[B, F, 3, H, W]", tuple(frames.shape))
    expect(len(prompts) == len(frames), name, "prompts", f"{len(frames)} prompts", len(prompts))
    given = reward(frames, prompts)
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    expect(shape == (len(frames),), name, "scores", f"one per sample, ({len(frames)},)", shape)
    return given.to(frames.device, torch.float32)
