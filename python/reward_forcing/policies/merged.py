"""Tokens that resemble one another are kept as one, which counts them (TempCache, arXiv 2602.01801)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import rf_kernels as rf

from .._check import expect
from .memory import MemoryState


@dataclass(frozen=True)
class MergedTokens(rf.SinkPolicy):
    """The last C sink frames are C n places, the first G are static. A place holds the mean key ``k_j`` and
    the mean value ``v_j`` of ``m_j`` tokens, and weighs as much as they: its logit gets ``log m_j``. This is
    exact for equal keys. The frames that leave go into the places one by one. In each layer and sample, a
    token ``u`` of a frame seeks the place whose key is most like its own over all heads, ``s = max_j cos(k_u,
    k_j)``, by exact search:

        s >= threshold:  k_j <- k_j + (k_u - k_j) / (m_j + 1),  v_j likewise,  m_j <- m_j + 1
        s < threshold:   k_j, v_j, m_j <- k_u, v_u, 1  for the place that was joined or taken longest ago

    Empty places come first. All tokens of a frame see the places as they were before it; those that join come
    before those that take. A token that is not finite goes nowhere. The places are empty at first; when a
    frame first leaves, the sink frames from G on go in before it.

    Args:
        frames: C.
        threshold: of the cosine, in -1..1.
        rephase: True: keys are compared and averaged without temporal rotation, and all places stand where
            the last sink frame does; the sink moves along. False: keys are compared, averaged and seen as
            they were rotated, so that equal content of two frames has unequal keys; the static frames stay
            where they are.
        most: a place weighs as much as so many tokens at most; None: as all that it has.
    """

    frames: int = 1
    threshold: float = 0.9
    rephase: bool = True
    most: float | None = None

    def bind(self, spec: rf.CacheSpec) -> rf.SinkState:
        fits = 1 <= self.frames <= spec.sink_frames
        expect(fits, "MergedTokens", "frames", f"1..{spec.sink_frames} sink frames", self.frames)
        expect(-1 <= self.threshold <= 1, "MergedTokens", "threshold", "a cosine in -1..1", self.threshold)
        fits = self.most is None or self.most >= 1
        expect(fits, "MergedTokens", "most", "at least 1, or None", self.most)
        return _MergedState(self, spec)


class _MergedState(MemoryState):
    weighs_keys, resets = True, False
    absorbing = 1

    def __init__(self, policy: MergedTokens, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        S, n, wide = spec.sink_frames, spec.frame_tokens, self.tensors["k_state"].dtype
        self.static = S - policy.frames
        self.places = slice(self.static * n, S * n)
        self.allocate_numbers("count", wide, policy.frames * n)
        self.allocate_numbers("used", torch.int64, policy.frames * n)
        self.allocate_numbers("bias")
        self._to_last = [None] * S  # R_t(S - 1 - j), for the frames that begin in the slots
        if self.turns:
            table = spec.rope.temporal_table([S - 1 - j for j in range(S)])
            self._to_last = list(torch.from_numpy(table).to(device=spec.device, dtype=wide))

    def has_state(self) -> bool:
        return True

    def key_bias(self, layer: int, plan: rf.ChunkPlan) -> Tensor:
        return self.tensors["bias"][layer]

    def unite(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        super().unite(layer, k, v, plan)
        if not plan.first:
            return
        begun = range(self.static, self.spec.sink_frames)
        frames = [[x.clone() for x in self.state(layer, j)] for j in begun]
        for name, empty in (("k_state", 0), ("v_state", 0), ("count", 0), ("used", -1)):
            tensor = self.tensors[name][layer]
            (tensor if tensor.dim() == 2 else tensor[:, self.places]).fill_(empty)
        for j, (key, value) in zip(begun, frames, strict=True):
            self._take_in(layer, key if not self.turns else self.turned(key, self._to_last[j]), value, j)

    def absorb(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        last = self.spec.sink_frames - 1
        for i, frame in enumerate(plan.sources[last]):
            key, value = self.source(k, v, plan, last, i)
            if not self.turns:
                key = k[:, self.tokens(plan.ring.slot(frame))]
            self._take_in(layer, key.to(value.dtype), value, frame)
        weight = self.tensors["count"][layer].clamp(max=self.policy.most or torch.inf)
        self.tensors["bias"][layer][:, self.places] = weight.log()

    def _take_in(self, layer: int, key: Tensor, value: Tensor, frame: int) -> None:
        """The tokens of one frame ``[B, n, H, D]`` into the places."""
        means = [self.tensors[name][layer][:, self.places].flatten(2) for name in ("k_state", "v_state")]
        count, used = (self.tensors[name][layer] for name in ("count", "used"))
        tokens = [x.flatten(2) for x in (key, value)]

        like = functional.normalize(tokens[0], dim=-1) @ functional.normalize(means[0], dim=-1).mT
        best, place = like.masked_fill_((count == 0)[:, None], -torch.inf).max(dim=-1)
        finite = tokens[0].isfinite().all(-1) & tokens[1].isfinite().all(-1)
        joins = finite & (best >= self.policy.threshold)

        rows = torch.cat([*tokens, torch.ones_like(best)[..., None]], -1)
        sums = _summed(place, torch.where(joins[..., None], rows, 0), count.shape[1])
        *added, more = sums.split([*(x.shape[-1] for x in tokens), 1], -1)
        for mean, part in zip(means, added, strict=True):
            mean += (part - more * mean) / (count[..., None] + more).clamp_(min=1)
        count += more[..., 0]
        used.masked_fill_(more[..., 0] > 0, frame)

        takes, coming = (~finite | joins).to(torch.uint8).sort(dim=1, stable=True)
        takes = takes == 0
        oldest = used.argsort(dim=1, stable=True)[:, : takes.shape[1]]
        one, now = torch.ones_like(best), torch.full_like(place, frame)
        for target, new in ((count, one), (used, now), *zip(means, tokens, strict=True)):
            at, source, taken = (
                (x if new.dim() == 2 else x[..., None].expand_as(new)) for x in (oldest, coming, takes)
            )
            target.scatter_(1, at, torch.where(taken, new.gather(1, source), target.gather(1, at)))

    def write(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan, frames: int) -> None:
        super().write(layer, k, v, plan, self.static)
        key, value = (self.tensors[name][layer][:, self.places] for name in ("k_state", "v_state"))
        k[:, self.places] = self.turned(key, plan.turns[-1, -1]).to(k.dtype)
        v[:, self.places] = value.to(v.dtype)


def _summed(place: Tensor, rows: Tensor, places: int) -> Tensor:
    """Rows ``[B, n, X]`` by their places ``[B, n]``, as ``[B, places, X]``: in the same order every time."""
    B = len(rows)
    at = (place + torch.arange(0, B * places, places, device=place.device)[:, None]).flatten()
    sums, rows = rows.new_zeros(B * places, rows.shape[-1]), rows.flatten(0, 1)
    # each of the two has a fixed order on its device, and none on the other
    sums = sums.index_put_((at,), rows, accumulate=True) if rows.is_cuda else sums.index_add_(0, at, rows)
    return sums.view(B, places, -1)
