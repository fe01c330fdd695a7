"""A linear-attention state of the frames that have left (Hybrid Forcing, arXiv 2604.10103)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState

_MAPS = {"relu": torch.relu, "softmax": lambda x: x.softmax(dim=-1)}


@dataclass(frozen=True)
class LinearState(rf.SinkPolicy):
    """The first S frames stay, and every frame that is W frames behind the newest is counted in a mean over
    all tokens so far, by head; the first S frames among them:

        KV = mean(v k_rotated^T)        z = mean(phi(k))
        Chunk.beside(layer, q) = (KV q_rotated) / (phi(q) . z + 1e-6)

    ``k`` and ``q`` are normalised. The model adds ``W_o`` of it to the attention (``project=``): W_o is the
    model's. What is counted keeps the distance to the chunk that it had when it was counted: positions are
    those of the sink, which moves along from the frame ``span`` on.

    Args:
        phi: "relu" or "softmax" over the channels.
        span: 0: sink and window together.

    Products are PyTorch's. State, a layer and sample, beside a static sink's: ``H (D^2 + D)`` numbers in
    float32.
    """

    phi: str = "relu"
    span: int = 0
    rephase = True

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        expect(self.phi in _MAPS, "LinearState", "phi", f"one of {', '.join(_MAPS)}", repr(self.phi))
        fits = self.span == 0 or self.span >= spec.ring.length
        expect(fits, "LinearState", "span", f"0, or at least {spec.ring.length}", self.span)
        expect(spec.sink_frames >= 1, "LinearState", "sink_frames", "at least 1", spec.sink_frames)
        expect(spec.window_frames >= 1, "LinearState", "window_frames", "at least 1", spec.window_frames)
        return _LinearState(self, spec)


class _LinearState(MemoryState):
    answers, resets = True, False
    latent = False  # an answer has the channels of a key

    def __init__(self, policy: LinearState, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        self.phi = _MAPS[policy.phi]
        wide, device, L = torch.promote_types(spec.dtype, torch.float32), spec.device, spec.layers
        heads, dim = spec.heads, spec.head_dim
        sizes = {
            "kv": (spec.batch, heads, dim, dim),  # values, then keys
            "z": (spec.batch, heads, dim),
            "frames": (),  # that are counted: the first ones of the stream
        }
        for name, size in sizes.items():
            self.tensors[name] = torch.zeros((L, *size), dtype=wide, device=device)
        self.allocate_phase()

    def has_state(self) -> bool:
        return True

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        return [list(leaving), *([] for _ in range(self.spec.sink_frames - 1))]

    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        S = self.spec.sink_frames
        shift = max(0, opening.end - (self.policy.span or opening.ring.length)) if self.turns else 0
        if shift:
            shift += opening.offsets[opening.begin] - opening.offsets[0]
        return (shift,) * S

    def absorb(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        S, W, n = self.spec.sink_frames, self.spec.window_frames, self.spec.frame_tokens
        count = self.tensors["frames"][layer]
        self.note_phase(layer, plan)

        back, found = self.undoing(plan.turns[0, -1]), []  # of (rotated and plain key, value, weight)
        # A sink frame does not leave, and a chunk may come again: whether it is counted is on the device.
        for j in range(min(S, plan.begin, plan.end - W) if plan.begin <= S + W else 0):
            key, value = self.state(layer, j)
            plain = self.plain(layer, j, key)
            found.append((self.turned(key, back), plain, value, (count <= j).to(key.dtype)))
        for i, e in enumerate(plan.sources[0]):
            at = self.tokens(plan.ring.slot(e))
            plain, value = self.source(k, v, plan, 0, i)
            plain = self.plain(layer, 0, plain)
            key = self.turned(k[:, at], back).to(value.dtype)
            found.append((key, plain, value, torch.ones_like(count)))
        if not found:
            return
        keys, plain, values, weights = zip(*found, strict=True)
        plain = [self.phi(x) for x in plain]
        weight = torch.stack(weights)
        keys = torch.stack([x * w for x, w in zip(keys, weights, strict=True)], 1).flatten(1, 2)
        values = torch.cat(values, 1)
        added = {
            "kv": values.permute(0, 2, 3, 1) @ keys.transpose(1, 2) / n,
            "z": sum(x.mean(1) * w for x, w in zip(plain, weights, strict=True)),
        }
        more = weight.sum()
        for name, new in added.items():
            mean = self.tensors[name][layer]
            mean.add_((new - mean * more) / (count + more))
        count.add_(more)

    def memory(self, layer: int, plan: rf.ChunkPlan) -> tuple[Tensor, ...]:
        kv, dtype = self.tensors["kv"][layer], self.spec.dtype
        kv = self.turned(kv, plan.turns[0, -1])
        return (
            kv.to(dtype, copy=True),
            self.tensors["z"][layer].to(dtype, copy=True),
            (self.tensors["frames"][layer] > 0).to(dtype),
        )

    def answer(self, q: Tensor, rotated: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        kv, z, there = memory
        q, rotated = (x.unflatten(2, (self.spec.heads, -1)) for x in (self.phi(q), rotated))
        over = torch.einsum("bnhgk,bhvk->bnhgv", rotated, kv)
        under = torch.einsum("bnhgk,bhk->bnhg", q, z) + 1e-6
        return (over / under.unsqueeze(-1)).flatten(2, 3), there
