"""Teacher forcing of the causal student on whole clips, under the rule of the stream it will run in.

Every chunk is denoised given the clean frames before it, all chunks at once: one pass over clean and noisy
tokens, in which chunk c attends the sink as it stands when c is streamed, the clean window before c, and
itself. What the cache does in place (absorbing what leaves, turning the sink's keys) is done here by ordinary
differentiable operations, so gradient reaches the clean keys too, and the sink. A streamed forward on the
same frames gives the same flow (tests/model/test_teacher_forcing.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from ..config import StreamConfig
from ..models.blocks import Projections, TextKeys, WanTransformer


@dataclass(frozen=True)
class StreamRule:
    """Which frames a chunk sees, and what its sink has absorbed, for a clip of ``frames`` frames."""

    stream: StreamConfig
    frames: int
    grid: tuple[int, int]
    rope: rf.RoPE

    def chunks(self) -> list[tuple[int, int]]:
        step, policy = self.stream.chunk_frames, self.stream.sink_policy
        known = policy in ("none", "static", "ema")
        expect(known, "StreamRule", "sink_policy", "none, static or ema", policy)
        expect(self.frames % step == 0, "StreamRule", "frames", f"a multiple of {step}", self.frames)
        return [(first, first + step) for first in range(0, self.frames, step)]

    def leaving(self, first: int, end: int) -> range:
        """Frames that leave the window when the chunk [first, end) comes."""
        S, W = self.stream.sink_frames, self.stream.window_frames
        return range(max(S, first - W), max(S, end - W))

    def window(self, first: int, end: int) -> range:
        """Clean frames before the chunk, behind the sink, that it sees."""
        return range(min(first, max(self.stream.sink_frames, end - self.stream.window_frames)), first)

    def shift(self, end: int) -> int:
        """By how many frames the sink's positions have moved when the chunk that ends at ``end`` is
        generated.
        """
        moves = self.stream.policy().rephase
        return max(0, end - self.stream.local_attn_size) if moves else 0

    def rotate(
        self, x: Tensor, frames: list[int], *, spatial: bool = True, weight=None, eps: float = 0.0
    ) -> Tensor:
        """Whole frames ``[B, len(frames) * n, H, D]`` turned to the temporal positions ``frames`` (and, with
        ``spatial``, to their places in the frame), normalised first if there is a weight."""
        places = [range(length) if spatial else [0] * length for length in self.grid]
        angles, axes = self.rope.table([frames, *places], dtype=torch.promote_types(x.dtype, torch.float32))
        return rf.rope(
            x,
            angles=angles.to(x.device),
            axes=axes,
            layout=self.rope.layout,
            weight=weight,
            norm="model",
            eps=eps,
        )


class TeacherForcedAttention(Projections):
    """Self-attention of clean and noisy tokens ``[B, 2 * F * n, dim]``, clean first."""

    def forward(self, x: Tensor, rule: StreamRule) -> Tensor:
        n, both = rule.grid[0] * rule.grid[1], list(range(rule.frames)) * 2
        q, k, v = self.raw_qkv(x)
        q_weight, k_weight = (getattr(norm, "weight", None) for norm in (self.norm_q, self.norm_k))
        q = rule.rotate(q, both, weight=q_weight, eps=self.eps)
        k = rule.rotate(k, both, weight=k_weight, eps=self.eps)
        clean, noisy = ([t.chunk(2, dim=1)[half].split(n, dim=1) for t in (q, k, v)] for half in (0, 1))

        sink_kv: list[tuple[Tensor, Tensor]] = []  # keys at the temporal phase of their own slots, and values
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for first, end in rule.chunks():
            sink_kv += [
                (clean[1][j], clean[2][j]) for j in range(len(sink_kv), min(rule.stream.sink_frames, first))
            ]
            sink_kv = self._absorb(sink_kv, rule, rule.leaving(first, end), clean)
            past = self._past(sink_kv, rule, first, end, clean)
            for half, output in zip((clean, noisy), outputs, strict=True):
                q_own, k_own, v_own = (torch.cat(t[first:end], dim=1) for t in half)
                keys = torch.cat([*(k for k, _ in past), k_own], dim=1)
                values = torch.cat([*(v for _, v in past), v_own], dim=1)
                output.append(rf.sink_window_attention(q_own, keys, values, kv_tokens=keys.shape[1]))
        return self.o(torch.cat([*outputs[0], *outputs[1]], dim=1).flatten(2))

    @staticmethod
    def _absorb(sink_kv, rule: StreamRule, leaving: range, clean) -> list[tuple[Tensor, Tensor]]:
        """``sink[j] <- alpha sink[j] + (1 - alpha) R(j - e) frame e``, ``j = (e - S) mod S``, in order."""
        if rule.stream.sink_policy != "ema" or not sink_kv:
            return sink_kv
        sink_kv, alpha, frames = list(sink_kv), rule.stream.alpha, rule.stream.sink_frames
        for e in leaving:
            j = (e - frames) % frames
            turn = [j - e if rule.stream.policy().rephase else 0]
            key, value = rule.rotate(clean[1][e], turn, spatial=False), clean[2][e]
            sink_kv[j] = (
                alpha * sink_kv[j][0] + (1 - alpha) * key,
                alpha * sink_kv[j][1] + (1 - alpha) * value,
            )
        return sink_kv

    @staticmethod
    def _past(sink_kv, rule: StreamRule, first: int, end: int, clean) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that the chunk sees beside its own: the sink, turned, and the clean window."""
        shift = rule.shift(end)
        turned = [(rule.rotate(k, [shift], spatial=False) if shift else k, v) for k, v in sink_kv]
        return turned + [(clean[1][f], clean[2][f]) for f in rule.window(first, end)]


class TeacherForcedWan(WanTransformer):
    """The causal model on whole clips; its parameters are ``CausalWanModel``'s, name by name."""

    self_attention = TeacherForcedAttention

    def forward(
        self,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor,
        text: list[TextKeys] | Tensor,
        stream: StreamConfig,
        t_context: float = 0.0,
    ) -> Tensor:
        """Flow of the noisy frames, each chunk given the clean frames before it.

        Args:
            clean, noisy: latents ``[B, C, F, H, W]``, F a multiple of the chunk.
            t: timesteps of the noisy frames ``[B, F]``.
            text: from ``text_keys``.
            stream: chunk, sink and window of the stream.
            t_context: timestep at which clean frames are embedded, as the stream's context forward does.
        """
        frames, *grid = self._check_latent(noisy)
        same = clean.shape == noisy.shape and tuple(t.shape) == (noisy.shape[0], frames)
        self._expect(
            same, "clean, t", f"{tuple(noisy.shape)} and [B, F]", (tuple(clean.shape), tuple(t.shape))
        )
        self._expect(self.parallel is None, "self", "tokens and heads on one rank", "a head-parallel model")
        rule = StreamRule(stream, frames, tuple(grid), self.config.rope)
        tokens = torch.cat([self._patchify(clean), self._patchify(noisy)], dim=1)
        times = torch.cat([torch.full_like(t, t_context), t], dim=1)
        y = self._run(tokens, times, text, lambda layer: (rule,))
        return self._unpatchify(y.chunk(2, dim=1)[1], (frames, *grid)).to(noisy.dtype)
