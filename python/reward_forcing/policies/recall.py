"""Frames that queries ask for are kept, and drawn towards what is trusted (TetherCache, arXiv 2606.13035)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class RecalledFrames(rf.SinkPolicy):
    """The last M sink frames are chosen, the first G are static; both lie behind the window, in the order of
    their frames. When frames leave, they and the M compete, in each layer and sample:

        mass_f = softmax_f(mean(q . k) / sqrt(D)),    over heads, tokens, and the queries of the chunk before
        score_f = mass_f + weight (1 - max_{g != f} exp(-|f - g| / s) mass_g)
        s       = max(1, half of the frames from the first to the last)

    Keys and queries count without rotation. The M best stay. One that comes anew is first made like the
    trusted, the frames that were in the sink: ``x <- (1 - tau) x + tau (std_t (x - mean) / std + mean_t)``,
    for keys (without rotation) and values, by head and channel.

    Args:
        frames: M.
        weight: of being apart from other frames.
        tau: in 0..1.
    """

    frames: int = 2
    weight: float = 0.35
    tau: float = 0.3
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.frames <= spec.sink_frames
        expect(fits, "RecalledFrames", "frames", f"1..{spec.sink_frames} sink frames", self.frames)
        expect(0 <= self.tau <= 1, "RecalledFrames", "tau", "a number in 0..1", self.tau)
        return _RecalledState(self, spec)


class _RecalledState(MemoryState):
    """Keys of the state are without any rotation."""

    observes, resets = True, False
    absorbing = 1

    def __init__(self, policy: RecalledFrames, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.static = spec.sink_frames - policy.frames
        self.allocate("q_mean", self.tensors["k_state"].dtype, tokens=1)
        self.allocate_numbers("number", torch.int64, policy.frames)
        self.allocate_phase()

    def has_state(self) -> bool:
        return True

    def _numbers(self, frames: Sequence[int]) -> Tensor:
        """``[B, len(frames)]``, made on the device: a copy from the host would wait."""
        like = {"dtype": torch.int64, "device": self.spec.device}
        return torch.cat([torch.full((self.spec.batch, 1), frame, **like) for frame in frames], 1)

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        self.note_phase(layer, plan)
        q = q.to(self.tensors["q_mean"].dtype)
        q = self.rotated(q, None if plan.angles is None else (plan.angles, plan.axes), back=True)
        groups = q.unflatten(2, (self.spec.heads, -1))
        self.tensors["q_mean"][layer].copy_(groups.mean(dim=(1, 3)).unsqueeze(1))

    def unite(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        super().unite(layer, k, v, plan)
        for j in range(self.spec.sink_frames if plan.first else 0):
            key, _ = self.state(layer, j)
            key.copy_(self.plain(layer, j, key))
        if plan.first:
            numbers = range(self.static, self.spec.sink_frames)
            self.tensors["number"][layer].copy_(self._numbers(numbers))

    def absorb(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        count, j = len(plan.sources[-1]), self.spec.sink_frames - 1
        n, M = self.spec.frame_tokens, self.policy.frames
        if not count:
            return
        trusted = [self.tensors[name][layer] for name in ("k_state", "v_state")]
        old = [x[:, self.static * n :].unflatten(1, (M, n)) for x in trusted]
        new = [self.source(k, v, plan, j, i) for i in range(count)]
        new = [(self.plain(layer, j, key), value) for key, value in new]
        known = self.tensors["number"][layer]
        numbers = torch.cat([known, self._numbers(plan.sources[-1])], 1)

        keys = torch.cat([old[0], torch.stack([key for key, _ in new], 1)], 1)
        logits = (keys.mean(dim=2) * self.tensors["q_mean"][layer]).sum(dim=-1).mean(dim=-1)
        mass = (logits * self.spec.head_dim**-0.5).softmax(dim=-1)
        extent = (numbers.amax(1) - numbers.amin(1) + 1).to(mass.dtype)
        apart = (numbers[:, :, None] - numbers[:, None]).abs().to(mass.dtype)
        near = torch.exp(-apart / (extent / 2).clamp(min=1.0)[:, None, None]) * (apart > 0)
        score = mass + self.policy.weight * (1 - (near * mass[:, None]).amax(dim=-1)).clamp(min=0.0)
        chosen = score.topk(M, dim=1).indices.sort(dim=1).values

        values = torch.cat([old[1], torch.stack([value for _, value in new], 1)], 1)
        for frames, trust in ((keys, trusted[0]), (values, trusted[1])):
            fresh = frames[:, M:]
            mean, std = (
                fresh.mean(2, keepdim=True),
                fresh.std(2, keepdim=True, unbiased=False).clamp(min=1e-6),
            )
            to = trust.mean(1)[:, None, None], trust.std(1, unbiased=False).clamp(min=1e-6)[:, None, None]
            fresh.lerp_(to[1] * (fresh - mean) / std + to[0], self.policy.tau)
            kept = frames.gather(1, chosen[:, :, None, None, None].expand(-1, -1, *frames.shape[2:]))
            trust[:, self.static * n :] = kept.flatten(1, 2)
        known.copy_(numbers.gather(1, chosen))

    def write(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan, frames: int) -> None:
        for j in range(frames):
            key, value = self.state(layer, j)
            key = self.turned(self.placed(layer, j, key), plan.turns[j, -1])
            k[:, self.tokens(j)] = key.to(k.dtype)
            v[:, self.tokens(j)] = value.to(v.dtype)
