"""The causal Wan transformer: generates a stream chunk by chunk, with the past in a ``SinkWindowCache``."""

from __future__ import annotations

from torch import Tensor

import rf_kernels as rf

from .blocks import CausalSelfAttention, TextKeys, WanTransformer


class CausalWanModel(WanTransformer):
    """Flow predictor of a chunk, given the stream so far.

    The model holds parameters alone. What a stream remembers is in the two objects every forward is given: the text's
    keys, from ``text_keys``, and the cache, from ``new_cache``; so one model serves any number of streams.

        text = model.text_keys(context)
        cache = model.new_cache(batch, height, width, sink_frames=3, window_frames=6, sink_policy=rf.EMASink(0.999))
        plan = cache.begin(frames=3)
        flow = model(x, t, text, cache, plan)          # any number of times under one plan
        cache.commit(plan)
    """

    self_attention = CausalSelfAttention

    def new_cache(
        self, batch: int, height: int, width: int, *, sink_frames: int, window_frames: int, sink_policy=None, **options
    ) -> rf.SinkWindowCache:
        """An empty cache for streams of latents ``[batch, C, frames, height, width]``, in the model's dtype and on its
        device.

        ``options`` go to ``rf_kernels.SinkWindowCache`` (``rephase``, ``undo_frames``, ...).
        """
        config = self.config
        return rf.SinkWindowCache(
            layers=config.num_layers,
            batch=batch,
            heads=config.num_heads,
            head_dim=config.head_dim,
            grid=config.grid(height, width),
            sink_frames=sink_frames,
            window_frames=window_frames,
            sink_policy=sink_policy,
            rope=config.rope,
            dtype=self.dtype,
            device=self.device,
            **options,
        )

    def forward(
        self, x: Tensor, t: Tensor, text: list[TextKeys], cache: rf.SinkWindowCache, plan: rf.ChunkPlan
    ) -> Tensor:
        """Flow ``noise - x0`` of a chunk.

        Args:
            x: noisy latent of the chunk ``[B, in_dim, F, H, W]``.
            t: timesteps per frame ``[B, F]``, or ``[B, 1]`` for all frames of the chunk.
            text: from ``text_keys``.
            cache, plan: from ``new_cache`` and its ``begin(F)``. Mutated: the chunk's slots and, in the chunk's first
                forward, the sink.
        Returns:
            ``[B, out_dim, F, H, W]``.
        Raises:
            rf_kernels.ArgumentError: before anything is written.
        """
        grid = self._check_latent(x)
        self._expect(grid[0] == plan.frames, "x", f"the {plan.frames} frames of the plan", grid[0])
        self._expect(grid[1:] == cache.grid, "x", f"a token grid of {cache.grid}, as the cache", grid[1:])
        self._expect(
            tuple(t.shape) in ((x.shape[0], 1), (x.shape[0], grid[0])), "t", "[B, F] or [B, 1]", tuple(t.shape)
        )
        self._expect(len(cache) == len(self.blocks), "cache", f"{len(self.blocks)} layers", len(cache))
        y = self._run(self._patchify(x), t, text, lambda layer: (cache[layer], plan))
        return self._unpatchify(y, grid)
