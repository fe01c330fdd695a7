"""Where clips, prompts and text features come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import world
from .._check import expect
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


def read_prompts(path: str) -> tuple[world.Prompt, ...]:
    """The prompts of a text file, one a line; all prompts of the world for "".

    Raises:
        rf_kernels.ArgumentError: no file, not text, no prompt in it, or one that the world cannot render (its
            line is named).
    """
    if not path:
        return world.PROMPTS
    prompts = []
    for number, line in read_lines(path):
        try:
            prompts.append(world.Prompt.parse(line))
        except ValueError as error:
            expect(
                False, "read_prompts", "prompts", "prompts of the world", f"{path}, line {number}: {error}"
            )
    return tuple(prompts)


def read_lines(path: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers.

    Raises:
        rf_kernels.ArgumentError: no file, not text, or no line in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expect(False, "read_prompts", "prompts", "a text file", f"{path}: {error}")
    kept = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    expect(len(kept) > 0, "read_prompts", "prompts", "one prompt a line", f"no prompt in {path}")
    return kept


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
        latents = self.codec.encode(torch.cat(videos)).to(self.draws.device)
        return latents, [str(prompt) for prompt in drawn]

    def embed(self, prompts: Sequence[str]) -> Tensor:
        return world.embed([world.Prompt.parse(text) for text in prompts]).to(self.draws.device)

    def no_text(self, batch: int) -> Tensor:
        return world.no_text(batch).to(self.draws.device)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents.cpu())
