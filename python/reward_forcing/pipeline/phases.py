"""Phases of a stream: an nvtx range each, and a timing for whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rf_kernels.profiling import nvtx_range


@dataclass(frozen=True)
class Phase:
    """One finished phase of a chunk.

    Attributes:
        name: "prefix" (a given chunk goes into the cache), "denoise" (forward, and x0 of it), "renoise" (to
            the next noise level), or "context" (the finished chunk goes into the cache).
        chunk: index of the chunk. step: denoising step, 0 elsewhere.
        seconds: wall clock, device work included.
    """

    name: str
    chunk: int
    step: int
    seconds: float


class PhaseClock:
    """Marks phases, and reports them to ``on_phase`` if there is one: only then is the device
    synchronised."""

    def __init__(self, on_phase: Callable[[Phase], None] | None, device: torch.device):
        self._on_phase, self._device = on_phase, device

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, name: str, chunk: int, step: int = 0) -> Iterator[None]:
        with nvtx_range(name, domain="reward_forcing"):
            if self._on_phase is None:
                yield
                return
            start = self._now()
            yield
            self._on_phase(Phase(name, chunk, step, self._now() - start))
