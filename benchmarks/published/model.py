"""Wan diffusion transformers of the published path: causal (README section 4) and bidirectional (section 8).

Both have the official parameter names, so one state dict fits both. Inputs are latents ``[B, C, F, H, W]``;
the output is the flow ``noise - x0`` in the same layout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import (
    Attention,
    BidirectionalSelfAttention,
    CausalSelfAttention,
    CrossAttention,
    CrossAttentionCache,
    EMASinkKVCache,
    sdpa_attention,
)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a text-to-video Wan transformer. The defaults are those of Wan2.1-T2V-1.3B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    in_dim: int = 16
    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6


@dataclass
class RolloutCaches:
    """Caches of one rollout, an entry per layer."""

    self_attn: list[EMASinkKVCache]
    cross_attn: list[CrossAttentionCache]

    def detach_(self) -> None:
        """Cut the self-attention caches from the autograd graph."""
        for cache in self.self_attn:
            cache.detach_()


def sinusoidal_embedding(dim: int, position: torch.Tensor) -> torch.Tensor:
    """``[cos(t w_0), cos(t w_1), ..., sin(t w_0), ...]``, ``w_i = 10000^(-i/(dim/2))``: ``[N] -> [N, dim]``
    float64."""
    frequency = torch.pow(
        10000, -torch.arange(dim // 2, dtype=torch.float64, device=position.device) / (dim // 2)
    )
    angle = torch.outer(position.double(), frequency)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose result has the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


def _modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x * (1 + scale) + shift``; ``x [B, S, dim]`` in ``G`` equal groups of tokens, ``shift`` and ``scale``
    ``[B, G, dim]``."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return (grouped * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def _gate(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``y * gate``, grouped as in ``_modulate``."""
    return (y.unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


class Block(nn.Module):
    """``x += g1 SelfAttn(LN(x)(1+sc1) + sh1); x += CrossAttn(norm3(x)); x += g2 FFN(LN(x)(1+sc2) + sh2)``.

    ``(sh1, sc1, g1, sh2, sc2, g2) = modulation + e``, ``e [B, G, 6, dim]`` for ``G`` groups of tokens: the
    frames in the causal model, one group in the bidirectional one.
    """

    def __init__(self, config: WanConfig, self_attn: nn.Module, attention: Attention):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = self_attn
        self.norm3 = LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, config.num_heads, config.qk_norm, eps, attention=attention)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        text: torch.Tensor,
        cross_cache: CrossAttentionCache | None,
        *self_attn_args,
    ) -> torch.Tensor:
        """``x [B, S, dim]``; ``self_attn_args`` follow ``x`` in the call of the self-attention."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.unsqueeze(1) + e).unbind(dim=2)
        y = self.self_attn(_modulate(self.norm1(x), shift1, scale1), *self_attn_args)
        x = x + _gate(y, gate1)
        x = x + self.cross_attn(self.norm3(x), text, cross_cache)
        y = self.ffn(_modulate(self.norm2(x), shift2, scale2))
        return x + _gate(y, gate2)


class Head(nn.Module):
    """``head(LN(x)(1+sc) + sh)``, ``(sh, sc) = modulation + e``: the time embedding before its projection,
    added to both rows."""

    def __init__(self, config: WanConfig):
        super().__init__()
        features = config.out_dim * config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, features)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """``x [B, S, dim]``, ``e [B, G, dim]`` -> ``[B, S, patch features]``."""
        shift, scale = (self.modulation.unsqueeze(1) + e.unsqueeze(2)).unbind(dim=2)
        return self.head(_modulate(self.norm(x), shift, scale))


class _WanModel(nn.Module):
    """Embeddings, blocks and head shared by both models."""

    def __init__(self, config: WanConfig, make_self_attn, attention: Attention):
        super().__init__()
        self.config = config
        patch = tuple(config.patch_size)
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU("tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(
            Block(config, make_self_attn(), attention) for _ in range(config.num_layers)
        )
        self.head = Head(config)

    def grid(self, latent: torch.Tensor) -> tuple[int, int, int]:
        """Tokens of a latent along (frames, rows, columns)."""
        return tuple(
            size // patch for size, patch in zip(latent.shape[2:], self.config.patch_size, strict=True)
        )

    def embed_patches(self, latent: torch.Tensor) -> torch.Tensor:
        """``[B, C, F, H, W] -> [B, S, dim]``, tokens frame-major, then row, then column."""
        return self.patch_embedding(latent).flatten(2).transpose(1, 2)

    def embed_text(self, text: torch.Tensor) -> torch.Tensor:
        """Zero-pad ``[B, n, text_dim]`` to ``text_len`` and embed. Published quirk: the padding is attended
        to."""
        padding = text.new_zeros(text.shape[0], self.config.text_len - text.shape[1], text.shape[2])
        return self.text_embedding(torch.cat([text, padding], dim=1))

    def embed_time(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, G]`` timesteps -> time embedding ``[B, G, dim]`` and its projection ``[B, G, 6, dim]``."""
        frequencies = sinusoidal_embedding(self.config.freq_dim, timestep.flatten())
        e = self.time_embedding(frequencies.to(self.patch_embedding.weight.dtype))
        e0 = self.time_projection(e).unflatten(1, (6, -1))
        return e.unflatten(0, timestep.shape), e0.unflatten(0, timestep.shape)

    def unpatchify(self, y: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """``[B, S, features] -> [B, C, F, H, W]``; features are (frame, row, column in the patch, channel),
        channel fastest."""
        patch = self.config.patch_size
        y = y.reshape(y.shape[0], *grid, *patch, self.config.out_dim)
        y = y.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return y.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class CausalWanModel(_WanModel):
    """The streaming model: every call pushes one chunk of frames through, on top of the caches.

    Args:
        config: sizes.
        sink_frames, local_attn_size, max_attention_tokens, alpha: see ``CausalSelfAttention``.
        attention: kernel of self- and cross-attention.
        gradient_checkpointing: recompute blocks in the backward. Published quirk: a call with gradients then
            does not use the cross-attention cache, so text keys and values are recomputed, with gradient,
            even after a no-grad call cached them.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        sink_frames: int = 0,
        local_attn_size: int = -1,
        max_attention_tokens: int | None = None,
        alpha: float = 0.999,
        attention: Attention = sdpa_attention,
        gradient_checkpointing: bool = False,
    ):
        make_self_attn = functools.partial(
            CausalSelfAttention,
            config.dim,
            config.num_heads,
            config.qk_norm,
            config.eps,
            sink_frames=sink_frames,
            local_attn_size=local_attn_size,
            max_attention_tokens=max_attention_tokens,
            alpha=alpha,
            attention=attention,
        )
        super().__init__(config, make_self_attn, attention)
        self.gradient_checkpointing = gradient_checkpointing

    def new_caches(self, batch: int, capacity: int) -> RolloutCaches:
        """Empty caches of ``capacity`` tokens a layer, in the dtype and on the device of the model."""
        weight, heads = self.patch_embedding.weight, self.config.num_heads
        return RolloutCaches(
            [
                EMASinkKVCache(batch, capacity, heads, self.config.dim // heads, weight.dtype, weight.device)
                for _ in self.blocks
            ],
            [CrossAttentionCache() for _ in self.blocks],
        )

    def forward(
        self,
        latent: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        caches: RolloutCaches,
        current_start: int,
    ) -> torch.Tensor:
        """Flow of one chunk ``[B, C, F, H, W]``.

        Args:
            latent: ``[B, C, F, H, W]``.
            timestep: ``[B, F]``, or ``[B, 1]`` for all frames of the chunk.
            text: ``[B, n, text_dim]``, ``n <= text_len``; only looked at until the cross-attention caches are
                filled.
            caches: mutated.
            current_start: tokens before this chunk, the same in all forwards of a chunk.
        """
        grid = self.grid(latent)
        x = self.embed_patches(latent)
        e, e0 = self.embed_time(timestep)
        text = self.embed_text(text)
        for block, cache, cross_cache in zip(self.blocks, caches.self_attn, caches.cross_attn, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, e0, text, None, grid, cache, current_start, use_reentrant=False)
            else:
                x = block(x, e0, text, cross_cache, grid, cache, current_start)
        return self.unpatchify(self.head(x, e), grid)


class BidirectionalWanModel(_WanModel):
    """The score model: all frames attend to each other, one timestep per sample, no cache."""

    def __init__(self, config: WanConfig, *, attention: Attention = sdpa_attention):
        make_self_attn = functools.partial(
            BidirectionalSelfAttention,
            config.dim,
            config.num_heads,
            config.qk_norm,
            config.eps,
            attention=attention,
        )
        super().__init__(config, make_self_attn, attention)

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, seq_len: int | None = None
    ) -> torch.Tensor:
        """Flow ``[B, C, F, H, W]`` of a clip.

        Args:
            latent: ``[B, C, F, H, W]``.
            timestep: ``[B]``.
            text: ``[B, n, text_dim]``, ``n <= text_len``.
            seq_len: pad the tokens with zeros to this length, as the published wrapper does; padding is
                masked out as keys and dropped at the end, so the result does not depend on it.
        """
        grid = self.grid(latent)
        x = self.embed_patches(latent)
        tokens = x.shape[1]
        if seq_len is not None:
            x = torch.cat([x, x.new_zeros(x.shape[0], seq_len - tokens, x.shape[2])], dim=1)
        e, e0 = self.embed_time(timestep.unsqueeze(1))
        text = self.embed_text(text)
        for block in self.blocks:
            x = block(x, e0, text, None, grid)
        return self.unpatchify(self.head(x, e)[:, :tokens], grid)
