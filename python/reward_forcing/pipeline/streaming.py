"""Few-step streaming generation: noise goes in chunk by chunk, latents come out, memory stays as it was after
the first chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..config import StreamConfig
from ..models import CausalWanModel
from ..scheduler import FlowMatchScheduler
from .phases import Phase, PhaseClock
from .restart import Stretch
from .rolling import RollingWindow

#: Gaussian noise of the shape, dtype and device of its argument.
NoiseSource = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chunk:
    """One generated chunk: number ``index``, latents ``[B, F, C, H, W]`` of the frames from ``first_frame``
    on.

    ``carry``: what the stream needs beside its cache to go on behind this chunk, ``[B, n, C, H, W]``: with
    ``rolling`` the noisy frames that follow, with ``restart`` the last finished ones. None elsewhere.
    """

    index: int
    first_frame: int
    latents: Tensor
    carry: Tensor | None = None


def chunk_lengths(frames: int, chunk_frames: int, *, independent_first_frame: bool = False) -> list[int]:
    """Frames of every chunk of a clip: one frame first if it is independent, then chunks of ``chunk_frames``.

    Raises:
        rf_kernels.ArgumentError: the clip is not a whole number of chunks.
    """
    first = [1] if independent_first_frame and frames else []
    chunks, rest = divmod(frames - len(first), chunk_frames)
    expected = f"{'1 + ' if first else ''}a multiple of {chunk_frames}"
    expect(rest == 0, "chunk_lengths", "frames", expected, frames)
    return first + [chunk_frames] * chunks


class StreamingPipeline:
    """Generates a stream with a causal model in a few denoising steps a chunk.

    Every chunk: for each timestep t of the list, ``flow = model(z, t)``, ``x0 = z - sigma(t) flow``, and, but
    for the last step, ``z = (1 - sigma(t')) x0 + sigma(t') eps`` at the next timestep t'. Then one more
    forward, on the finished x0, without noise, at timestep ``context_noise``: it leaves the clean keys and
    values in the cache; without ``clean_forward`` there is none, and those of the last step stay.

    With ``rolling`` the chunks of a window go through the model together, each at its own timestep
    (``RollingWindow``). With ``restart`` a stretch that is full is followed by another, which begins with the
    last frames (``Stretch``).

        pipeline = StreamingPipeline(model, StreamConfig(...))
        for chunk in pipeline.stream(noise_chunks, context):  # noise_chunks: any iterable, also endless
            show(chunk.latents)

    Args:
        model: the causal transformer.
        config: chunking, sink, window, schedule.
        scheduler: defaults to the flow-matching schedule of ``config.shift``.
    """

    def __init__(
        self, model: CausalWanModel, config: StreamConfig, scheduler: FlowMatchScheduler | None = None
    ):
        self.model, self.config = model, config
        self.scheduler = (scheduler or FlowMatchScheduler(config.shift)).to(model.device)
        steps = list(config.denoising_step_list)
        #: Timesteps in use, host numbers.
        self.timesteps = self.scheduler.warp(steps) if config.warp else [float(t) for t in steps]

    def new_cache(self, batch: int, height: int, width: int, **options) -> rf.SinkWindowCache:
        """An empty cache for streams of latents ``[batch, frames, C, height, width]``, as ``config`` says;
        ``options`` as for ``CausalWanModel.cache_spec``."""
        frames = {"sink_frames": self.config.sink_frames, "window_frames": self.config.window_frames}
        spec = self.model.cache_spec(height, width, batch=batch, **frames, **options)
        cache = rf.SinkWindowCache(spec, sink=self.config.policy())
        asks, policy = self.model.config.linear_proj, self.config.sink_policy
        expected = f"a policy that {'answers' if asks else 'a model without linear_proj can stream with'}"
        expect(cache.answers == asks, "StreamingPipeline", "sink_policy", expected, repr(policy))
        return cache

    def split(self, clip: Tensor, *, starts_stream: bool = True) -> list[Tensor]:
        """The chunks of a whole clip ``[B, F, C, H, W]``. ``starts_stream``: its first frame is the stream's
        first."""
        independent = self.config.independent_first_frame and starts_stream
        lengths = chunk_lengths(clip.shape[1], self.config.chunk_frames, independent_first_frame=independent)
        return list(clip.split(lengths, dim=1))

    @torch.no_grad()
    def stream(
        self,
        noise_chunks: Iterable[Tensor],
        context: Tensor,
        *,
        initial_latent: Tensor | None = None,
        cache: rf.SinkWindowCache | None = None,
        start: int | None = None,
        carry: Tensor | None = None,
        noise_source: NoiseSource = torch.randn_like,
        on_phase: Callable[[Phase], None] | None = None,
    ) -> Iterator[Chunk]:
        """Yield the chunks of a stream as they are finished.

        Args:
            noise_chunks: initial noise of each chunk ``[B, F, C, H, W]``, F of any length that fits the
                window (with ``rolling``: ``chunk_frames``); read one at a time.
            context: text features ``[B, n, text_dim]``.
            initial_latent: clean frames ``[B, F0, C, H, W]`` that the stream continues; written into the
                cache at timestep 0, not yielded.
            cache: a cache of ``new_cache`` to stream into: an empty one, or one that holds a stream to be
                continued. Mutated.
            start: first frame of the first chunk (of ``initial_latent``, if given), as for
                ``SinkWindowCache.chunk``: any frame of an empty cache, or one to go back to. None: the frame
                behind the last.
            carry: that of the chunk behind which a stream in ``cache`` goes on, if it had one.
            noise_source: draws the noise between steps, e.g. from a seeded generator. Called once per
                renoising, in order; with ``rolling`` once for all chunks that are noised, the newest ones
                that were read, oldest first.
            on_phase: called after each phase with its wall-clock time; on a GPU this synchronises at every
                phase.

        An exception in the middle of a chunk (also of ``noise_source``) leaves a cache with ``undo_frames``
        as it was before that chunk, ready to go on; so does a commit that finds frames that are not finite.
        Without ``undo_frames`` the cache has a closed stream and must be ``reset``. With ``rolling`` a
        stream goes on after an exception from the ``start`` and the ``carry`` of the chunk before it. One
        while a stretch starts over (``restart``) leaves an empty cache.
        """
        clock = PhaseClock(on_phase, self.model.device)
        text = self.model.text_keys(context)
        stretch = Stretch(self, text, clock, carry) if self.config.restart else None
        index = 0
        if initial_latent is not None:
            expect(carry is None, "StreamingPipeline", "carry", "None with initial_latent", "a tensor")
            starts = cache is None or 0 in (cache.next_frame, start)
            for given in self.split(initial_latent, starts_stream=starts):
                cache = self.cache_for(given, cache)
                with (
                    self.open_chunk(cache, given.shape[1], start, stretch, index) as open_chunk,
                    clock("prefix", index),
                ):
                    self.flow(given, 0.0, text, open_chunk)
                if stretch is not None:
                    stretch.add(given)
                index, start = index + 1, None
        if self.config.rolling:
            window = RollingWindow(self, text, noise_source, clock)
            yield from self._rolled(window, noise_chunks, cache, start, carry, index)
            return
        for noise in noise_chunks:
            cache = self.cache_for(noise, cache)
            with self.open_chunk(cache, noise.shape[1], start, stretch, index) as open_chunk:
                latents = self._generate(noise, text, open_chunk, noise_source, clock, index)
            last = None if stretch is None else stretch.add(latents)
            yield Chunk(index, open_chunk.first_frame, latents, last)
            index, start = index + 1, None

    def _rolled(
        self, window: RollingWindow, noise_chunks: Iterable[Tensor], cache, start, carry, index: int
    ) -> Iterator[Chunk]:
        incoming = iter(noise_chunks)
        if carry is not None:
            window.resume(carry)
        while True:
            noise = next(incoming, None)
            if noise is not None:
                cache = self.cache_for(noise, cache)
                window.put(noise, 0)
            elif window.carry is None:
                return
            if window.first_frame is None:
                expect(cache is not None, "StreamingPipeline", "cache", "the one that goes with carry", None)
                window.first_frame = self.next_frame(cache, carry) if start is None else start
            latents = window.forward(cache, index)
            if latents is not None:
                first, window.first_frame = window.first_frame, window.first_frame + latents.shape[1]
                yield Chunk(index, first, latents, window.carry)
                index += 1

    def rollout(
        self, noise: Tensor, context: Tensor, *, initial_latent: Tensor | None = None, **options
    ) -> Tensor:
        """Stream a whole clip: noise ``[B, F, C, H, W]`` -> latents ``[B, F0 + F, C, H, W]``, given frames
        first."""
        chunks = self.split(noise, starts_stream=initial_latent is None)
        generated = self.stream(chunks, context, initial_latent=initial_latent, **options)
        parts = [] if initial_latent is None else [initial_latent]
        return torch.cat([*parts, *(chunk.latents for chunk in generated)], dim=1)

    @property
    def carries(self) -> bool:
        """Whether chunks have a ``carry``."""
        return self.config.rolling or bool(self.config.restart)

    def next_frame(self, cache: rf.SinkWindowCache, carry: Tensor | None) -> int:
        """The frame that comes next in a stream that was left behind a chunk with this ``carry``: in a
        rolling window without clean forwards the cache is ahead of it."""
        ahead = self.config.rolling and not self.config.clean_forward and carry is not None
        return cache.next_frame - carry.shape[1] if ahead else cache.next_frame

    def open_chunk(
        self,
        cache: rf.SinkWindowCache,
        frames: int,
        start: int | None,
        stretch: Stretch | None = None,
        index: int = 0,
    ) -> rf.Chunk:
        """The next chunk of a cache, or the one at ``start``; taken back if it fails, where the cache can.
        A stretch that is full is left before."""
        position = None if stretch is None else stretch.position(cache, frames, start, index)
        cut = (cache.next_frame if start is None else start) in self.config.cuts
        undo = frames <= cache.spec.undo_frames
        return cache.chunk(frames, start=start, position=position, cut=cut, undo=undo)

    def cache_for(self, latent: Tensor, cache: rf.SinkWindowCache | None) -> rf.SinkWindowCache:
        expect(latent.dim() == 5, "StreamingPipeline", "noise", "chunks [B, F, C, H, W]", tuple(latent.shape))
        if cache is None:
            return self.new_cache(latent.shape[0], *latent.shape[3:])
        same = latent.shape[0] == cache.spec.batch
        expect(
            same, "StreamingPipeline", "noise", f"the cache's batch of {cache.spec.batch}", latent.shape[0]
        )
        return cache

    def flow(self, latent: Tensor, t: float | Tensor, text, open_chunk: rf.Chunk) -> Tensor:
        """Flow of a chunk ``[B, F, C, H, W]`` at one timestep for all of its frames, or at ``[B, F]``."""
        if not isinstance(t, Tensor):
            t = torch.full((latent.shape[0], 1), t, device=latent.device)
        return self.model(latent.transpose(1, 2), t, text, open_chunk).transpose(1, 2)

    def _generate(
        self, z: Tensor, text, open_chunk: rf.Chunk, noise_source: NoiseSource, clock: PhaseClock, index: int
    ) -> Tensor:
        """One chunk, from its noise to its clean keys and values in the cache."""
        scheduler, batch = self.scheduler, z.shape[0]
        for step, t in enumerate(self.timesteps):
            with clock("denoise", index, step):
                flow = self.flow(z, t, text, open_chunk)
                x0 = scheduler.x0_from_flow(flow, z, torch.full((batch,), t, device=z.device))
            if step + 1 < len(self.timesteps):
                with clock("renoise", index, step):
                    following = torch.full((batch,), self.timesteps[step + 1], device=z.device)
                    z = scheduler.add_noise(x0, noise_source(x0), following)
        if not self.config.clean_forward:
            return x0
        with clock("context", index):
            self.flow(x0, float(self.config.context_noise), text, open_chunk)
        return x0
