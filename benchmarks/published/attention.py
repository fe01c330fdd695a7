"""Self-attention with the EMA sink, as published (golden kind ``ema_self_attention_stream``, README section
3).

The cache holds keys before RoPE. It is rolled by cloning when it overflows, sink and window are concatenated,
and all attended keys are rotated again, in float64, at every call. This structure is kept on purpose: it is
what the library is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .rope import rope_apply, rope_table

#: ``attention(q, k, v) -> out``, all ``[B, S, H, D]``.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D)) v`` per head, written out, every step in the dtype of the inputs. ``[B, S,
    H, D]``, no mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    probability = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return (probability @ v).transpose(1, 2)


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same through PyTorch's fused attention, which stands for the flash kernels that the published path
    calls."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis: for q and k the whole model width, all heads
    together.

    Statistics are float32 (float64 for float64 input); the normalised value is rounded to the input dtype
    before the weight.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


class Window(NamedTuple):
    """What one call attends to, in tokens and frames of the concatenation [sink slots, slots from ``start``
    on]."""

    start: int  #: first slot of the window part; it ends at the local end
    attended_tokens: int  #: keys that enter the softmax, zero slots that were never written included
    kv_frames: int  #: whole frames among them; these are rotated, at positions 0, 1, 2, ...
    q_start_frame: int  #: frame position of the first query


def read_window(
    local_end: int, num_tokens: int, frame_tokens: int, num_sink_tokens: int, max_attention_tokens: int
) -> Window:
    """Keys and positions of a call with ``num_tokens`` queries after which the cache ends at ``local_end``.

    With ``S`` sink tokens and a window of ``M``: slots ``[0, S)`` and ``[a, local_end)``, ``a = max(S,
    local_end - M + S)``. Queries take the last positions, ``floor((S + local_end - a - num_tokens) /
    frame_tokens)`` on.

    Published quirks: slots of ``[0, S)`` that were never written are attended as zeros; and without a sink
    the first query frame is ``floor((local_end - M - num_tokens) / frame_tokens)``, which is negative
    (``rope_apply`` says what that does).
    """
    start = max(num_sink_tokens, local_end - max_attention_tokens + num_sink_tokens)
    attended = num_sink_tokens + max(0, local_end - start)
    kv_frames = (num_sink_tokens + local_end - start) // frame_tokens
    if num_sink_tokens:
        first_query = num_sink_tokens + local_end - start - num_tokens
    else:
        first_query = local_end - max_attention_tokens - num_tokens
    return Window(start, attended, kv_frames, first_query // frame_tokens)


class EMASinkKVCache:
    """Keys (normalised, not rotated) and values of one layer: ``k, v [B, capacity, H, D]``, zeros at first.

    ``local_end`` is the first free slot, ``global_end`` the number of tokens of the stream so far; both are
    device tensors, and reading them is a synchronisation, as in the published code.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        self.k = torch.zeros(batch, capacity, heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.local_end = torch.zeros(1, dtype=torch.long, device=device)
        self.global_end = torch.zeros(1, dtype=torch.long, device=device)

    def detach_(self) -> None:
        """Cut k and v from the autograd graph. The published training rollout does not."""
        self.k, self.v = self.k.detach(), self.v.detach()

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        current_start: int,
        num_sink_tokens: int,
        alpha: float,
        windowed: bool = True,
    ) -> int:
        """Write the keys and values ``[B, L, H, D]`` of one call, evict on overflow, update the sink; return
        the new local end.

        ``current_start`` counts tokens since the start of the stream and is the same for all forwards of a
        chunk: the first one moves the ends, later ones overwrite its slots. Eviction needs ``windowed``, a
        new end, and ``local_end + L > capacity``: the overflow of ``E`` tokens behind the sink is taken out
        and what follows it moves down.

        - ``E == S``: ``sink = alpha * sink + (1 - alpha) * evicted`` for k and v, each product and the sum
          rounded to the cache dtype.
        - ``E != S``, published quirk: the first ``min(E, S)`` sink tokens are replaced by evicted ones,
          without an average.

        Under no_grad the writes keep the autograd history of the slots, also a published quirk (see
        ``pipeline.training_rollout``).
        """
        tokens, capacity, sink_end = k.shape[1], self.k.shape[1], num_sink_tokens
        end, local_end, global_end = (current_start + tokens, self.local_end.item(), self.global_end.item())
        overflow = local_end + tokens - capacity
        evicting = windowed and end > global_end and overflow > 0
        new_end = local_end + end - global_end - (overflow if evicting else 0)
        for cache, new in ((self.k, k), (self.v, v)):
            if evicting:
                evicted = cache[:, sink_end : sink_end + overflow].clone()
                cache[:, sink_end : local_end - overflow] = cache[:, sink_end + overflow : local_end].clone()
            cache[:, new_end - tokens : new_end] = new
            if evicting and overflow == num_sink_tokens:
                cache[:, :sink_end] = alpha * cache[:, :sink_end] + (1 - alpha) * evicted
            elif evicting:
                replaced = min(overflow, num_sink_tokens)
                cache[:, :replaced] = evicted[:, :replaced]
        self.global_end.fill_(end)
        self.local_end.fill_(new_end)
        return new_end


def cached_attention(
    q: torch.Tensor,
    cache: EMASinkKVCache,
    window: Window,
    grid: tuple[int, int, int],
    num_sink_tokens: int,
    table: torch.Tensor,
    attention: Attention = sdpa_attention,
) -> torch.Tensor:
    """Attention of un-rotated queries ``[B, L, H, D]`` on a ``(frames, rows, columns)`` grid over sink and
    window of ``cache``.

    Concatenates sink and window, rotates all of it from position 0 on and the queries from
    ``window.q_start_frame`` on.
    """
    local_end = cache.local_end.item()
    k, v = (
        torch.cat([x[:, :num_sink_tokens], x[:, window.start : local_end]], dim=1) for x in (cache.k, cache.v)
    )
    q = rope_apply(q, grid, table, window.q_start_frame)
    k = rope_apply(k, (window.kv_frames, *grid[1:]), table)
    return attention(q, k, v)


class SelfAttention(nn.Module):
    """q, k, v, o projections and q/k RMSNorm over the width, parameters under the official names. ``[B, S,
    dim]`` in and out."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = True, eps: float = 1e-6):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        # Kept out of the state dict and of dtype casts: the table is complex128 in every run.
        self._table: torch.Tensor | None = None

    def table(self, device: torch.device) -> torch.Tensor:
        """``rope_table(head_dim)`` on ``device``, made at the first use."""
        if self._table is None or self._table.device != device:
            self._table = rope_table(self.head_dim, device=device)
        return self._table

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, S, dim] -> [B, S, H, D]``; heads are consecutive slices of the width."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised, un-rotated q and k, and v, each ``[B, S, H, D]``."""
        return (self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x))), self.heads(self.v(x)))


class CausalSelfAttention(SelfAttention):
    """Streaming self-attention of one layer.

    Args:
        sink_frames: frames of the sink, ``S`` tokens once the grid is known.
        local_attn_size: window in frames; -1 switches eviction off.
        max_attention_tokens: ``M``, sink included. The published constructor fixes it for 1560 tokens a
            frame: ``1560 * local_attn_size``, or 32760 without a window; None gives that.
        alpha: EMA factor. The published model never passes it on, so there it is always 0.999.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool = True,
        eps: float = 1e-6,
        *,
        sink_frames: int = 0,
        local_attn_size: int = -1,
        max_attention_tokens: int | None = None,
        alpha: float = 0.999,
        attention: Attention = sdpa_attention,
    ):
        super().__init__(dim, num_heads, qk_norm, eps)
        self.sink_frames, self.local_attn_size, self.alpha, self.attention = (
            sink_frames,
            local_attn_size,
            alpha,
            attention,
        )
        if max_attention_tokens is None:
            max_attention_tokens = 32760 if local_attn_size == -1 else 1560 * local_attn_size
        self.max_attention_tokens = max_attention_tokens

    def window(self, local_end: int, grid: tuple[int, int, int]) -> Window:
        """``read_window`` of a call on ``grid`` after which the cache ends at ``local_end``."""
        frame_tokens = grid[1] * grid[2]
        return read_window(
            local_end,
            grid[0] * frame_tokens,
            frame_tokens,
            self.sink_frames * frame_tokens,
            self.max_attention_tokens,
        )

    def forward(
        self, x: torch.Tensor, grid: tuple[int, int, int], cache: EMASinkKVCache, current_start: int
    ) -> torch.Tensor:
        """One call: ``x [B, f*h*w, dim]`` on ``grid = (f, h, w)``. Mutates ``cache``."""
        num_sink_tokens = self.sink_frames * grid[1] * grid[2]
        q, k, v = self.qkv(x)
        local_end = cache.append(k, v, current_start, num_sink_tokens, self.alpha, self.local_attn_size != -1)
        window = self.window(local_end, grid)
        out = cached_attention(q, cache, window, grid, num_sink_tokens, self.table(x.device), self.attention)
        return self.o(out.flatten(2))


class BidirectionalSelfAttention(SelfAttention):
    """Self-attention over a whole sequence, frame positions from 0 on, no cache (README section 8)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool = True,
        eps: float = 1e-6,
        *,
        attention: Attention = sdpa_attention,
    ):
        super().__init__(dim, num_heads, qk_norm, eps)
        self.attention = attention

    def forward(self, x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """``x [B, S, dim]``; tokens beyond ``f*h*w`` of ``grid`` are padding: not rotated, and masked out as
        keys."""
        tokens = grid[0] * grid[1] * grid[2]
        q, k, v = self.qkv(x)
        table = self.table(x.device)
        q, k = rope_apply(q, grid, table), rope_apply(k, grid, table)
        return self.o(self.attention(q, k[:, :tokens], v[:, :tokens]).flatten(2))


class CrossAttentionCache:
    """Keys and values of the text for one layer, ``[B, n, H, D]``: None until the first call fills them."""

    def __init__(self) -> None:
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None


class CrossAttention(SelfAttention):
    """Attention to the text: no RoPE, padding of the text is not masked; k and v computed once a rollout if a
    cache is given."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool = True,
        eps: float = 1e-6,
        *,
        attention: Attention = sdpa_attention,
    ):
        super().__init__(dim, num_heads, qk_norm, eps)
        self.attention = attention

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, cache: CrossAttentionCache | None = None
    ) -> torch.Tensor:
        """``x [B, S, dim]``, ``text [B, n, dim]``; fills ``cache`` at its first use and ignores ``text``
        afterwards."""
        q = self.heads(self.norm_q(self.q(x)))
        if cache is not None and cache.k is not None:
            k, v = cache.k, cache.v
        else:
            k, v = self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))
            if cache is not None:
                cache.k, cache.v = k, v
        return self.o(self.attention(q, k, v).flatten(2))
