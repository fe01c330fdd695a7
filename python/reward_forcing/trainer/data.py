"""Where clips, prompts and text features come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import world
from .draws import Draws


class Source(Protocol):
    """What a stage asks of its data; ``samples`` are global sample indices of the step, so ranks split a
    batch freely.
    """

    latent_shape: tuple[int, int, int]

    def prompts(self, step: int, samples: Sequence[int]) -> list[str]: ...
    def clips(self, step: int, samples: Sequence[int], frames: int) -> tuple[Tensor, list[str]]: ...
    def embed(self, prompts: Sequence[str]) -> Tensor: ...
    def no_text(self, batch: int) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class WorldSource:
    """The embedded world: every clip is rendered when it is asked for, none is seen twice."""

    def __init__(self, draws: Draws, among: tuple[world.Prompt, ...] = world.PROMPTS):
        self.draws, self.among = draws, among
        self.codec = world.PatchCodec.fit()
        self.latent_shape = (len(self.codec.basis), world.SIZE // 4, world.SIZE // 4)

    def _drawn(self, step: int, samples: Sequence[int]) -> list[world.Prompt]:
        return [self.among[i] for i in self.draws.integers("prompt", step, len(self.among), samples)]

    def prompts(self, step: int, samples: Sequence[int]) -> list[str]:
        """The prompts of a step, as text."""
        return [str(prompt) for prompt in self._drawn(step, samples)]

    @torch.no_grad()
    def clips(self, step: int, samples: Sequence[int], frames: int) -> tuple[Tensor, list[str]]:
        """Latents ``[B, F, C, h, w]`` of freshly rendered clips, and their prompts."""
        drawn = self._drawn(step, samples)
        videos = [
            world.render([prompt], frames, generator=self.draws.generator("clip", step, sample))[0]
            for prompt, sample in zip(drawn, samples, strict=True)
        ]
        return self.codec.encode(torch.cat(videos)), [str(prompt) for prompt in drawn]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return world.embed([world.Prompt.parse(text) for text in prompts])

    def no_text(self, batch: int) -> Tensor:
        return world.no_text(batch)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)
