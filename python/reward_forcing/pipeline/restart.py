"""Streams in stretches: the memory only grows, and when it is full the stream starts over (CausVid, arXiv
2412.07772)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .phases import PhaseClock

if TYPE_CHECKING:
    from .streaming import StreamingPipeline


class Stretch:
    """The stretches of a stream, ``restart = (frames, overlap)``.

    Before a chunk that would be beyond ``frames`` frames, the cache is emptied, and the last ``overlap``
    frames of the video go through the model once more, at timestep 0: they are the first of the next stretch.
    Positions count from the first frame of the stretch. Frames of the video, and the cache's numbers, go on.

    Differs from the published script in one point: there the first of the overlapping latent frames is
    encoded anew from its pixels by the VAE, whose first latent frame stands for one pixel frame and not for
    four; here all of them are the latents that were generated.
    """

    def __init__(self, pipeline: StreamingPipeline, text, clock: PhaseClock, recent: Tensor | None):
        self.pipeline, self.text, self.clock, self._recent = pipeline, text, clock, recent
        self.frames, self.overlap = pipeline.config.restart

    def add(self, latents: Tensor) -> Tensor:
        """Note the frames of a chunk; the last ones that a stretch would begin with."""
        recent = latents if self._recent is None else torch.cat([self._recent, latents], dim=1)
        self._recent = recent[:, -self.overlap :].clone()
        return self._recent

    def position(self, cache: rf.SinkWindowCache, frames: int, start: int | None, index: int) -> int:
        """Temporal position of the next chunk of ``frames`` frames, or of that at ``start``; starts over
        before it if the stretch is full."""
        if cache.next_frame == cache.first_frame or start in (0, cache.first_frame):
            return 0
        at = cache.next_frame if start is None else start
        if at - cache.first_frame + frames > self.frames:
            self._begin(cache, at, index)
        return at - cache.first_frame

    def _begin(self, cache: rf.SinkWindowCache, end: int, index: int) -> None:
        found = 0 if self._recent is None else self._recent.shape[1]
        expected = f"the last {self.overlap} frames of the stream"
        expect(found == self.overlap, "StreamingPipeline", "carry", expected, f"{found} frames")
        cache.reset()
        pipeline, first = self.pipeline, end - self.overlap
        for part in self._recent.split(pipeline.config.chunk_frames, dim=1):
            with cache.chunk(part.shape[1], start=first, position=first - (end - self.overlap)) as chunk:
                with self.clock("prefix", index):
                    pipeline.flow(part, 0.0, self.text, chunk)
            first += part.shape[1]
