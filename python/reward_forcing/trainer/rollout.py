"""Training rollouts through the streaming cache, which evicts here exactly as it does in inference.

Caches hold constants, so every generator loss factors through dL/dx and no graph has to span chunks:

1. ``generate`` streams without gradient and keeps, per chunk, what its exit forward was given (the tape);
2. the loss gives dL/dx on the tape's ``x``;
3. ``replay`` streams the same chunks again: per chunk the exit forward with gradient, ``backward`` at once,
   then the context forward on the stored result. Memory is that of one chunk, whatever the length of the
   rollout; the price is one exit and one context forward per chunk.

``graph`` is the same rollout as one ordinary graph, for tests and for losses that do not factor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..models import CausalWanModel
from ..pipeline import StreamingPipeline, chunk_lengths

#: ``noise(purpose, chunk, like) -> Tensor``: the noise of one re-noising, of the shape, dtype and device of
#: ``like``.
NoiseSource = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True)
class TapeEntry:
    """One chunk of a rollout: ``z`` entered the exit forward at denoising step ``exit_step``, ``x0`` came
    out, and ``context`` is what was written into the cache."""

    z: Tensor
    exit_step: int
    x0: Tensor
    context: Tensor


@dataclass(frozen=True)
class Tape:
    """A rollout without its graph."""

    entries: tuple[TapeEntry, ...]

    @property
    def x(self) -> Tensor:
        """The generator's output ``[B, F, C, H, W]``, without graph."""
        return torch.cat([entry.x0 for entry in self.entries], dim=1)


class Rollout:
    """Rolls a causal student out in few steps a chunk, each chunk leaving at a step of its own.

    Args:
        pipeline: the student with its stream's configuration; its cache is built anew for every rollout.
        renoise_context: as published, the finished chunk is noised to the timestep ``context_noise`` before
            it is written into the cache (at timestep 0 the schedule still has sigma > 0); False writes it as
            it is, as ``StreamingPipeline`` does in inference.
        cache: options of ``CausalWanModel.cache_spec``, where keys and values come in another dtype, or with
            other heads, than the model's parameters say.
    """

    def __init__(
        self, pipeline: StreamingPipeline, *, renoise_context: bool = False, cache: dict | None = None
    ):
        self.pipeline, self.renoise_context, self.cache = pipeline, renoise_context, cache or {}

    @property
    def model(self) -> CausalWanModel:
        return self.pipeline.model

    @torch.no_grad()
    def generate(
        self, noise: Tensor, context: Tensor, exits: Sequence[int], noise_source: NoiseSource
    ) -> Tape:
        """Roll out without gradient.

        Args:
            noise: ``[B, F, C, H, W]``, a whole number of chunks.
            context: text features ``[B, n, text_dim]``.
            exits: per chunk, the index of the denoising step whose x0 is the chunk's output.
            noise_source: the noise between steps, by purpose ("step 1", ..., "context") and chunk.
        """
        pieces = self._split(noise, exits)
        cache = self._new_cache(noise)
        entries = []
        for index, (z, exit_step) in enumerate(zip(pieces, exits, strict=True)):
            with cache.chunk(z.shape[1]) as chunk:
                z = self._denoise(z, exit_step, context, chunk, index, noise_source)
                x0 = self._x0(z, exit_step, context, chunk)
                written = self._context(x0, index, noise_source)
                self._write(written, context, chunk)
            entries.append(TapeEntry(z, exit_step, x0, written))
        return Tape(tuple(entries))

    @torch.no_grad()
    def revisit(self, tape: Tape, context: Tensor, noise: Tensor) -> Tape:
        """The tape whose chunks enter their exit step anew, from their own results noised to it (``noise`` is
        like x), given the same past: x is then the student's answer to its own clips."""
        cache = self._new_cache(noise)
        entries = []
        parts = noise.split([entry.z.shape[1] for entry in tape.entries], dim=1)
        for entry, part in zip(tape.entries, parts, strict=True):
            z = self.pipeline.scheduler.add_noise(entry.x0, part, self._timesteps(part, entry.exit_step))
            with cache.chunk(z.shape[1]) as chunk:
                x0 = self._x0(z, entry.exit_step, context, chunk)
                self._write(entry.context, context, chunk)
            entries.append(replace(entry, z=z, x0=x0))
        return Tape(tuple(entries))

    def replay(
        self, tape: Tape, context: Tensor, grad: Tensor, *, chunks: Collection[int] | None = None
    ) -> None:
        """Add d<grad, x>/d(parameters) to the parameters' ``grad``, chunk by chunk.

        Args:
            tape, context: of ``generate``.
            grad: dL/dx ``[B, F, C, H, W]``.
            chunks: the chunks that get gradient; all by default.
        """
        expect(
            grad.shape == tape.x.shape, "Rollout.replay", "grad", str(tuple(tape.x.shape)), tuple(grad.shape)
        )
        cache = self._new_cache(grad)
        parts = grad.split([entry.z.shape[1] for entry in tape.entries], dim=1)
        for index, (entry, part) in enumerate(zip(tape.entries, parts, strict=True)):
            with cache.chunk(entry.z.shape[1]) as chunk:
                if chunks is None or index in chunks:
                    self._x0(entry.z, entry.exit_step, context, chunk).backward(part)
                with torch.no_grad():
                    self._write(entry.context, context, chunk)

    def graph(self, tape: Tape, context: Tensor) -> Tensor:
        """x of the tape ``[B, F, C, H, W]`` as one graph over all chunks: what ``replay`` is held against.
        Memory grows with the length. The past of every chunk is a constant, as in ``replay``."""
        cache = self._new_cache(tape.entries[0].z)
        outputs = []
        for entry in tape.entries:
            with cache.chunk(entry.z.shape[1]) as chunk:
                outputs.append(self._x0(entry.z, entry.exit_step, context, chunk))
                with torch.no_grad():
                    self._write(entry.context, context, chunk)
        return torch.cat(outputs, dim=1)

    # ---- the steps of a chunk ------------------------------------------------------------------------------
    def _new_cache(self, like: Tensor) -> rf.SinkWindowCache:
        return self.pipeline.new_cache(like.shape[0], *like.shape[3:], **self.cache)

    def _split(self, noise: Tensor, exits: Sequence[int]) -> list[Tensor]:
        config = self.pipeline.config
        lengths = chunk_lengths(
            noise.shape[1], config.chunk_frames, independent_first_frame=config.independent_first_frame
        )
        expect(len(exits) == len(lengths), "Rollout.generate", "exits", f"{len(lengths)} steps", len(exits))
        steps = len(self.pipeline.timesteps)
        inside = all(0 <= step < steps for step in exits)
        expect(inside, "Rollout.generate", "exits", f"steps in 0..{steps - 1}", list(exits))
        return list(noise.split(lengths, dim=1))

    def _timesteps(self, z: Tensor, step: int) -> Tensor:
        return torch.full((z.shape[0],), self.pipeline.timesteps[step], device=z.device)

    def _x0(self, z: Tensor, step: int, context: Tensor, chunk: rf.Chunk) -> Tensor:
        flow = self.pipeline.flow(z, self.pipeline.timesteps[step], context, chunk)
        return self.pipeline.scheduler.x0_from_flow(flow, z, self._timesteps(z, step))

    def _denoise(self, z: Tensor, exit_step: int, context, chunk, index: int, noise_source) -> Tensor:
        """The chunk's noise, taken down to what its exit forward is given."""
        for step in range(exit_step):
            x0 = self._x0(z, step, context, chunk)
            noise = noise_source(f"step {step + 1}", index, x0)
            z = self.pipeline.scheduler.add_noise(x0, noise, self._timesteps(z, step + 1))
        return z

    def _context(self, x0: Tensor, index: int, noise_source: NoiseSource) -> Tensor:
        if not self.renoise_context:
            return x0
        t = torch.full((x0.shape[0],), float(self.pipeline.config.context_noise), device=x0.device)
        return self.pipeline.scheduler.add_noise(x0, noise_source("context", index, x0), t)

    def _write(self, latent: Tensor, context: Tensor, chunk: rf.Chunk) -> None:
        self.pipeline.flow(latent, float(self.pipeline.config.context_noise), context, chunk)
