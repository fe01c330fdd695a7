"""The causal Wan transformer: generates a stream chunk by chunk, with the past in a ``SinkWindowCache``."""

from __future__ import annotations

import torch
from torch import Tensor

import rf_kernels as rf

from .blocks import CausalSelfAttention, TextKeys, WanTransformer


class CausalWanModel(WanTransformer):
    """Flow predictor of a chunk, given the stream so far.

    The model holds parameters alone. What a stream remembers is in the two objects every forward is given:
    the text's keys, from ``text_keys``, and the open chunk of a cache; so one model serves any number of
    streams.

        text = model.text_keys(context)
        spec = model.cache_spec(height, width, sink_frames=3, window_frames=6)
        cache = rf.SinkWindowCache(spec, sink=rf.EMASink(0.999))
        with cache.chunk(frames=3) as chunk:
            flow = model(x, t, text, chunk)            # any number of times in one chunk

    Under grad it is differentiable, the past being a constant; activation checkpointing is safe
    (``rf_kernels.Chunk.attend``).
    """

    self_attention = CausalSelfAttention

    def cache_spec(
        self,
        height: int,
        width: int,
        *,
        sink_frames: int,
        window_frames: int,
        batch: int = 1,
        heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        undo_frames: int = 0,
    ) -> rf.CacheSpec:
        """What a cache for streams of latents ``[batch, C, frames, height, width]`` must be.

        Args:
            heads, dtype, device: of the keys and values that will come, where these are not the model's:
                heads are split over devices, or parameters are kept in another dtype than they compute in.
        """
        config = self.config
        return rf.CacheSpec(
            layers=config.num_layers,
            batch=batch,
            heads=config.num_heads if heads is None else heads,
            head_dim=config.head_dim,
            grid=config.grid(height, width),
            sink_frames=sink_frames,
            window_frames=window_frames,
            rope=config.rope,
            dtype=self.dtype if dtype is None else dtype,
            device=self.device if device is None else device,
            undo_frames=undo_frames,
        )

    def forward(self, x: Tensor, t: Tensor, text: list[TextKeys] | Tensor, chunk: rf.Chunk) -> Tensor:
        """Flow ``noise - x0`` of a chunk.

        Args:
            x: noisy latent of the chunk ``[B, in_dim, F, H, W]``.
            t: timesteps per frame ``[B, F]``, or ``[B, 1]`` for all frames of the chunk.
            text: from ``text_keys``; or text features ``[B, n, text_dim]``, whose keys it then makes:
                in training their parameters get gradient, and shards are gathered block by block.
            chunk: the open chunk of F frames of a cache. The cache is mutated: the chunk's slots and, in the
                chunk's first forward, the sink.
        Returns:
            ``[B, out_dim, F, H, W]``.
        Raises:
            rf_kernels.ArgumentError: before anything is written.
        """
        grid, spec = self._check_latent(x), chunk.cache.spec
        self._expect(grid[0] == chunk.frames, "x", f"the {chunk.frames} frames of the chunk", grid[0])
        self._expect(grid[1:] == spec.grid, "x", f"a token grid of {spec.grid}, as the cache", grid[1:])
        self._expect(
            tuple(t.shape) in ((x.shape[0], 1), (x.shape[0], grid[0])),
            "t",
            "[B, F] or [B, 1]",
            tuple(t.shape),
        )
        self._expect(
            spec.layers == len(self.blocks), "chunk", f"a cache of {len(self.blocks)} layers", spec.layers
        )
        y = self._run(self._patchify(x), t, text, lambda layer: (layer, chunk), grid[0])
        return self._unpatchify(y, grid).to(x.dtype)
