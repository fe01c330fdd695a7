"""Parts that the causal and the bidirectional transformer share. Parameter names are the published ones.

Tokens of a latent are ordered frame-major, then row, then column. Modulation vectors come per *group* of
consecutive tokens ``[B, G, dim]``: a group is a frame in the causal model and the whole sequence in the
bidirectional one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rf_kernels as rf

from .._check import expect
from ..config import ModelConfig
from .head_parallel import HeadParallel

#: Keys and values of the text, ``[B, text_len, heads, head_dim]`` each.
TextKeys = tuple[Tensor, Tensor]


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """``[cos(t w_i), sin(t w_i)]`` with ``w_i = 10000^(-i / (width / 2))``, float64 ``[*t.shape, width]``."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.double().unsqueeze(-1) * torch.pow(10000.0, -exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """``[B, N, dim]`` as ``[B, G, N / G, dim]``."""
    return x.unflatten(1, (groups, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` with vectors ``[B, G, dim]`` over the tokens ``[B, N, dim]`` of their
    groups."""
    return (by_group(x, shift.shape[1]) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """``x gate`` with vectors ``[B, G, dim]``."""
    return (by_group(x, gate.shape[1]) * gate.unsqueeze(2)).flatten(1, 2)


class Projections(nn.Module):
    """q, k, v and output projections of an attention, and the RMSNorm of q and k over the whole model
    width."""

    #: Set by ``head_parallel.parallelize_heads``.
    parallel: HeadParallel | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_dim, self.eps = config.num_heads, config.head_dim, config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps) if config.qk_norm else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """``[B, N, dim]`` as ``[B, N, heads, head_dim]``."""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def tell(self, text: Tensor, *attention) -> None:
        """What the self-attention needs of the text's keys: nothing, unless a policy does."""

    def raw_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, neither normalised nor rotated: the ops do both."""
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def normed_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected and normalised, not rotated: where this rank will not see all heads of a token."""
        return self.split(self.norm_q(self.q(x))), self.split(self.norm_k(self.k(x))), self.split(self.v(x))


class CausalSelfAttention(Projections):
    """Self-attention of one chunk over sink, window and itself, through one layer of a
    ``SinkWindowCache``, and what its policy answers beside them if the model has a map of it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.linear_proj = None
        if config.linear_proj:
            self.linear_proj = nn.Linear(config.head_dim, config.head_dim)
            for parameter in self.linear_proj.parameters():
                nn.init.zeros_(parameter)

    def tell(self, text: Tensor, layer: int, chunk: rf.Chunk) -> None:
        """Tells the policy the keys of the text, in the heads that this rank has."""
        if chunk.hears:
            chunk.tell(layer, text if self.parallel is None else self.parallel.own_heads(text))

    def forward(self, x: Tensor, layer: int, chunk: rf.Chunk) -> Tensor:
        """x ``[B, F * n, dim]`` -> the same; writes the chunk's keys and values into the cache's
        ``layer``."""
        if self.parallel is not None:
            q, k, v = (self.parallel.to_heads(t, chunk.frames) for t in self.normed_qkv(x))
            y = chunk.attend(layer, q, k, v)
            if self.linear_proj is not None:
                y = y + chunk.beside(layer, q, project=self.linear_proj)
            return self.o(self.parallel.to_tokens(y, chunk.frames).flatten(2))
        q, k, v = self.raw_qkv(x)
        norm = {"q_norm": self.norm_q, "norm": "model", "eps": self.eps}
        y = chunk.attend(layer, q, k, v, k_norm=self.norm_k, **norm)
        if self.linear_proj is not None:
            y = y + chunk.beside(layer, q, project=self.linear_proj, **norm)
        return self.o(y.flatten(2))


class BidirectionalSelfAttention(Projections):
    """Self-attention over a whole sequence."""

    def _rotate(
        self, x: Tensor, tokens: int, norm: nn.Module | None, angles: Tensor, axes: list[int], layout: str
    ) -> Tensor:
        weight = getattr(norm, "weight", None)
        y = rf.rope(
            x[:, :tokens], angles=angles, axes=axes, layout=layout, weight=weight, norm="model", eps=self.eps
        )
        return y if tokens == x.shape[1] else torch.cat((y, x[:, tokens:]), dim=1)

    def forward(self, x: Tensor, tokens: int, angles: Tensor, axes: list[int], layout: str) -> Tensor:
        """x ``[B, N, dim]`` -> the same. Tokens from ``tokens`` on are padding: no query sees them, and they
        have no position.
        """
        norm_q, norm_k = self.norm_q, self.norm_k
        if self.parallel is None:
            q, k, v = self.raw_qkv(x)
        else:
            q, k, v = (self.parallel.to_heads(t, 1) for t in self.normed_qkv(x))
            norm_q = norm_k = None
        q = self._rotate(q, tokens, norm_q, angles, axes, layout)
        k = self._rotate(k, tokens, norm_k, angles, axes, layout)
        y = rf.sink_window_attention(q, k, v, kv_tokens=tokens)
        return self.o((y if self.parallel is None else self.parallel.to_tokens(y, 1)).flatten(2))


class CrossAttention(Projections):
    """Attention of the tokens over the text, whose keys and values are computed once per text."""

    def keys(self, text: Tensor) -> TextKeys:
        """Keys and values of an embedded text ``[B, text_len, dim]``."""
        return self.split(self.norm_k(self.k(text))), self.split(self.v(text))

    def forward(self, x: Tensor, text: TextKeys) -> Tensor:
        """x ``[B, N, dim]`` -> the same. The text's zero padding is attended, as published."""
        q = self.split(self.norm_q(self.q(x))).transpose(1, 2)
        k, v = (t.transpose(1, 2) for t in text)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class WanBlock(nn.Module):
    """One block: self-attention, cross-attention, feed-forward; the first and the last are modulated by time
    (adaLN)."""

    def __init__(self, config: ModelConfig, self_attention: type[Projections]):
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = self_attention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time: Tensor, text: TextKeys | Tensor, *attention, checkpointing: bool = False
    ) -> Tensor:
        """x ``[B, N, dim]`` -> the same.

        Args:
            time: projected time embedding ``[B, G, 6, dim]``.
            text: ``CrossAttention.keys`` of this block, or the embedded text that they are made of.
            attention: what this block's self-attention takes beside x.
            checkpointing: keep the arguments alone for backward. Here, inside a shard's unit: its parameters
                are gathered when backward computes the block again.
        """
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, time, text, *attention, use_reentrant=False)
        return self._forward(x, time, text, *attention)

    def _forward(self, x: Tensor, time: Tensor, text: TextKeys | Tensor, *attention) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.unsqueeze(1) + time).unbind(2)
        text = self.cross_attn.keys(text) if isinstance(text, Tensor) else text
        self.self_attn.tell(text[0], *attention)
        x = x + gated(self.self_attn(modulate(self.norm1(x), shift1, scale1), *attention), gate1)
        x = x + self.cross_attn(self.norm3(x), text)
        return x + gated(self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)


class Head(nn.Module):
    """Modulated projection of every token to its patch of output channels."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        _, rows, columns = config.patch_size
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, rows * columns * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x ``[B, N, dim]``, time embedding (before its projection) ``[B, G, dim]`` -> ``[B, N, rows *
        columns * out_dim]``.
        """
        shift, scale = (self.modulation.unsqueeze(1) + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class WanTransformer(nn.Module):
    """What both Wan transformers are around their self-attention: patching, time and text embeddings, blocks,
    head."""

    #: The blocks' self-attention.
    self_attention: type[Projections]
    #: Activation checkpointing, block by block.
    checkpointing: bool = False
    #: Tokens and heads over ranks: ``head_parallel.parallelize_heads``.
    parallel: HeadParallel | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(
            config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config, self.self_attention) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; inside a sharded forward, that which it computes in."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def text_keys(self, context: Tensor) -> list[TextKeys]:
        """Cross-attention keys and values of every block for text features ``[B, n <= text_len, text_dim]``.

        Features are zero-padded to ``text_len`` before they are embedded. Compute once per text, pass to
        every forward.
        """
        text = self._embed_text(context)
        return [block.cross_attn.keys(text) for block in self.blocks]

    def _embed_text(self, context: Tensor) -> Tensor:
        """Text features ``[B, n, text_dim]`` -> ``[B, text_len, dim]``."""
        config = self.config
        fits = (
            context.dim() == 3 and context.shape[1] <= config.text_len and context.shape[2] == config.text_dim
        )
        expected = f"[B, at most {config.text_len}, {config.text_dim}]"
        self._expect(fits, "context", expected, tuple(context.shape))
        context = context.to(self.dtype)
        return self.text_embedding(F.pad(context, (0, 0, 0, config.text_len - context.shape[1])))

    def _expect(self, condition: bool, argument: str, expected: str, found: object) -> None:
        expect(condition, type(self).__name__, argument, expected, found)

    def _check_latent(self, x: Tensor) -> tuple[int, int, int]:
        """The token grid (frames, rows, columns) of a latent."""
        self._expect(
            x.dim() == 5 and x.shape[1] == self.config.in_dim,
            "x",
            f"[B, {self.config.in_dim}, F, H, W]",
            tuple(x.shape),
        )
        return x.shape[2], *self.config.grid(x.shape[3], x.shape[4])

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps ``[B, G]`` -> embedding ``[B, G, dim]`` and its projection ``[B, G, 6, dim]``."""
        embedding = self.time_embedding(sinusoidal_embedding(t, self.config.freq_dim).to(self.dtype))
        return embedding, self.time_projection(embedding).unflatten(-1, (6, self.config.dim))

    def _run(
        self,
        tokens: Tensor,
        t: Tensor,
        text: list[TextKeys] | Tensor,
        attention: Callable[[int], tuple],
        frames: int = 1,
    ) -> Tensor:
        """Blocks and head over embedded tokens ``[B, N, dim]``; ``attention(layer)``: what its self-attention
        takes beside x. ``frames``: parts of the sequence of which each rank takes its share.
        """
        parallel = self.parallel
        tokens = tokens if parallel is None else parallel.split(tokens, frames)
        embedding, projected = self._embed_time(t)
        text = [self._embed_text(text)] * len(self.blocks) if isinstance(text, Tensor) else text
        for layer, block in enumerate(self.blocks):
            tokens = block(
                tokens, projected, text[layer], *attention(layer), checkpointing=self.checkpointing
            )
        y = self.head(tokens, embedding)
        return y if parallel is None else parallel.gather(y, frames)

    def _patchify(self, x: Tensor) -> Tensor:
        """Latent ``[B, C, F, H, W]`` -> embedded tokens ``[B, F * h * w, dim]``."""
        return self.patch_embedding(x.to(self.dtype)).flatten(2).transpose(1, 2)

    def _unpatchify(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Head output ``[B, F * h * w, rows * columns * C]`` (channel fastest) -> latent ``[B, C, F, H,
        W]``."""
        _, rows, columns = self.config.patch_size
        frames, h, w = grid
        y = y.reshape(y.shape[0], frames, h, w, rows, columns, self.config.out_dim)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(
            y.shape[0], self.config.out_dim, frames, h * rows, w * columns
        )
