"""Random numbers by counter: every draw is named, none depends on the draws before it.

A draw's seed is a hash of (seed, purpose, step, global sample index). So there is no generator state to save
for an exact resume, and two ranks with half the batch each draw what one rank with all of it draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """The draws of one training run. ``samples`` are global sample indices: rank r of n takes its own part of
    them.

    Args:
        seed: of the run.
        device: where drawn tensors are put. They are drawn on the CPU, so every device sees the same numbers.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu"):
        self.seed, self.device = seed, torch.device(device)

    def generator(self, purpose: str, step: int, sample: int = 0) -> torch.Generator:
        """A CPU generator for one purpose, step and sample."""
        name = f"{self.seed}/{purpose}/{step}/{sample}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(seed)

    def normal(self, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal, float32 ``[len(samples), *shape]``, one generator a sample."""
        rows = [torch.randn(tuple(shape), generator=self.generator(purpose, step, s)) for s in samples]
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str, step: int, samples: Sequence[int]) -> Tensor:
        """Uniform in [0, 1), float32 ``[len(samples)]``."""
        rows = [torch.rand((), generator=self.generator(purpose, step, s)) for s in samples]
        return torch.stack(rows).to(self.device)

    def integers(self, purpose: str, step: int, high: int, samples: Sequence[int]) -> list[int]:
        """Uniform integers in [0, high), on the host."""
        return [int(torch.randint(high, (), generator=self.generator(purpose, step, s))) for s in samples]
