"""Phases of a stream: an nvtx range each, and a timing for whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

try:
    import nvtx
except ImportError:  # the ranges are for profilers; a stream does not need them
    nvtx = None


@dataclass(frozen=True)
class Phase:
    """One finished phase of a chunk.

    name: "prefix" (a given chunk written into the cache), "denoise" (forward and x0), "renoise" (to the next noise
        level), or "context"
    (the finished chunk written into the cache). ``step``: denoising step, 0 elsewhere. ``seconds``: wall clock, device
    work included.
    """

    name: str
    chunk: int
    step: int
    seconds: float


def nvtx_range(name: str) -> AbstractContextManager:
    """A named range in the profiler's timeline; nothing without the nvtx package."""
    return nullcontext() if nvtx is None else nvtx.annotate(name, domain="reward_forcing")


class PhaseClock:
    """Marks phases, and reports them to ``on_phase`` if there is one. Only then is the device synchronised at their
    ends.
    """

    def __init__(self, on_phase: Callable[[Phase], None] | None, device: torch.device):
        self._on_phase, self._device = on_phase, device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str, chunk: int, step: int = 0) -> Iterator[None]:
        with nvtx_range(name):
            if self._on_phase is None:
                yield
                return
            start = self._now()
            yield
            self._on_phase(Phase(name, chunk, step, self._now() - start))
