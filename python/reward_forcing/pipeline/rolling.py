"""A rolling window of noise (Rolling Forcing, arXiv 2509.25161; StreamDiT, arXiv 2507.03745): several chunks
are denoised together, each at a level of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .phases import PhaseClock

if TYPE_CHECKING:
    from .streaming import NoiseSource, StreamingPipeline


class RollingWindow:
    """The chunks between noise and video: the i-th oldest is one level noisier than the one before it.

    With T levels, every forward takes all of them, each frame at its own timestep. The oldest chunk, which
    had its T-th forward, is finished; the others are noised to their next levels, and a chunk of pure noise
    comes in. Until T chunks are in (ramp-up) no chunk is finished; behind the last noise (ramp-down) none
    comes in.

    The keys and values of all frames of a forward lie in the cache behind those of the video. The next
    forward writes them again at the same slots, from the first unfinished frame on (``start=``), and a
    context forward on the finished chunk alone leaves its clean ones. Attention is not causal inside the
    window, as published.

    Attributes:
        first_frame: of the oldest chunk.
    """

    def __init__(self, pipeline: StreamingPipeline, text, noise_source: NoiseSource, clock: PhaseClock):
        self.pipeline, self.text, self.noise_source, self.clock = pipeline, text, noise_source, clock
        self.chunk_frames, self.levels = pipeline.config.chunk_frames, pipeline.timesteps
        self._z: list[Tensor] = []
        self._done: list[int] = []  # forwards that each chunk has been through
        self.first_frame: int | None = None

    def put(self, z: Tensor, done: int) -> None:
        """Take in a chunk that has been through ``done`` forwards."""
        found, frames = z.shape[1] if z.dim() == 5 else tuple(z.shape), self.chunk_frames
        expect(found == frames, "StreamingPipeline", "noise", f"chunks of {frames} frames", found)
        self._z.append(z)
        self._done.append(done)

    @property
    def carry(self) -> Tensor | None:
        return torch.cat(self._z, dim=1) if self._z else None

    def resume(self, carry: Tensor) -> None:
        """Take in the frames that another window had when a chunk of it was finished."""
        chunks, rest = divmod(carry.shape[1], self.chunk_frames)
        most = len(self.levels) - 1
        expected = f"at most {most} chunks of {self.chunk_frames} frames"
        expect(rest == 0 and chunks <= most, "StreamingPipeline", "carry", expected, tuple(carry.shape))
        for i, z in enumerate(carry.split(self.chunk_frames, dim=1)):
            self.put(z, most - i)

    def forward(self, cache: rf.SinkWindowCache, index: int) -> Tensor | None:
        """One forward of all chunks; the latents of the oldest if it is finished."""
        pipeline, F, scheduler = self.pipeline, self.chunk_frames, self.pipeline.scheduler
        z = torch.cat(self._z, dim=1)
        finished = self._done[0] == len(self.levels) - 1
        out = F if finished else 0
        with pipeline.open_chunk(cache, z.shape[1], self.first_frame) as chunk:
            with self.clock("denoise", index, self._done[0]):
                t = self._timesteps(z, self._done)
                x0 = scheduler.x0_from_flow(pipeline.flow(z, t, self.text, chunk), z, t)
            self._done = [done + 1 for done in self._done[finished:]]
            if self._done:
                with self.clock("renoise", index, self._done[0]):
                    rest = x0[:, out:]
                    noised = scheduler.add_noise(
                        rest, self.noise_source(rest), self._timesteps(rest, self._done)
                    )
                    self._z = list(noised.split(F, dim=1))
            else:
                self._z = []
        if not finished:
            return None
        latents = x0[:, :F]
        if pipeline.config.clean_forward:
            with pipeline.open_chunk(cache, F, self.first_frame) as chunk, self.clock("context", index):
                pipeline.flow(latents, float(pipeline.config.context_noise), self.text, chunk)
        return latents

    def _timesteps(self, like: Tensor, done: list[int]) -> Tensor:
        """``[B, F]``, those of chunks that have been through so many forwards."""
        t = torch.tensor([self.levels[d] for d in done for _ in range(self.chunk_frames)], device=like.device)
        return t.expand(like.shape[0], -1)
