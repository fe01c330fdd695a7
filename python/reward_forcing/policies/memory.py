"""What policies share whose sink frames are written from a state, at every chunk that moves or changes
them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rf_kernels as rf


class MemoryState(rf.SinkState):
    """Sink frames in float32 (float64 for a float64 cache), keys at the phase of their own slot. A subclass
    changes them in ``absorb``; the slots are written from them. By itself: a static sink.

    Bytes beside the slots: ``2 S n H D`` numbers a layer and sample.

    Where values are channels of the keys (``value_dims``) they have a state all the same. It follows the rule
    of the keys, so what is written to these channels twice is the same.
    """

    latent = True
    #: So many of the last sink frames absorb all that leaves.
    absorbing = 0
    #: Whether the sink frames from ``static`` on stay where they are, while the first ones move along.
    stays = False
    static = 0

    def __init__(self, policy: rf.SinkPolicy, spec: rf.CacheSpec):
        super().__init__(policy, spec)
        if self.has_state():
            self.allocate_frames(spec.sink_frames)

    def has_state(self) -> bool:
        """Whether the sink ever differs from its slots."""
        return self.spec.sink_frames > 0 and self.turns

    def allocate_frames(self, frames: int) -> None:
        """State for the keys and values of the first sink frames."""
        wide, tokens = torch.promote_types(self.spec.dtype, torch.float32), frames * self.spec.frame_tokens
        for name in ("k_state", "v_state"):
            self.allocate(name, wide, tokens, values=name == "v_state")

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        if not self.absorbing or not leaving:
            return None
        still = [[] for _ in range(self.spec.sink_frames - self.absorbing)]
        return [*still, *(list(leaving) for _ in range(self.absorbing))]

    def shifts(self, opening: rf.Opening) -> Sequence[float]:
        moved = super().shifts(opening)
        return [*moved[: self.static], *(0 for _ in moved[self.static :])] if self.stays else moved

    def absorb(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        """Change the state by ``plan.sources``."""

    def tokens(self, slot: int) -> slice:
        n = self.spec.frame_tokens
        return slice(slot * n, (slot + 1) * n)

    def state(self, layer: int, j: int) -> tuple[Tensor, Tensor]:
        """Key and value ``[B, n, H, D]`` of sink frame ``j``: views."""
        return tuple(self.tensors[name][layer][:, self.tokens(j)] for name in ("k_state", "v_state"))

    def source(self, k: Tensor, v: Tensor, plan: rf.ChunkPlan, j: int, i: int) -> tuple[Tensor, Tensor]:
        """Source ``i`` of sink frame ``j``, its key at the phase of slot ``j``."""
        at = self.tokens(plan.ring.slot(plan.sources[j][i]))
        return self.turned(k[:, at], plan.turns[j, i]), v[:, at].to(self.tensors["v_state"].dtype)

    def table(self, position: int):
        """Angles of a frame's keys at a position, and their axes; None without RoPE."""
        if self.spec.rope is None:
            return None
        places = [[position], *(range(length) for length in self.spec.grid)]
        wide = torch.promote_types(self.spec.dtype, torch.float32)
        return self.spec.rope.table(places, dtype=wide, device=self.spec.device)

    def rotated(self, x: Tensor, table, back: bool = False) -> Tensor:
        """Keys or queries rotated by a table, or that undone."""
        if table is None:
            return x
        angles, axes = table
        angles = self.undoing(angles) if back else angles
        return rf.rope(x.contiguous(), angles=angles, axes=axes, layout=self.spec.layout)

    def allocate_phase(self) -> None:
        """A state for the rotation of each sink frame by its own position: ``note_phase`` fills it."""
        spec = self.spec
        size = (spec.layers, spec.sink_frames, spec.rope.temporal_pairs if spec.rope else 0, 2)
        wide = torch.promote_types(spec.dtype, torch.float32)
        self.tensors["phase"] = torch.zeros(size, dtype=wide, device=spec.device)
        self._place = self.table(0)

    def note_phase(self, layer: int, plan: rf.ChunkPlan) -> None:
        """To be called in every chunk that has frames of the sink."""
        phase = self.tensors["phase"][layer]
        if plan.begin < self.spec.sink_frames and phase.shape[1]:
            _, pairs, row = plan.axes[:3]
            own = plan.angles[0, row : row + plan.frames * pairs].unflatten(0, (plan.frames, pairs))
            end = min(plan.end, self.spec.sink_frames)
            phase[plan.begin : end].copy_(own[: end - plan.begin])

    def plain(self, layer: int, j: int, key: Tensor) -> Tensor:
        """A key at the phase of slot ``j``, without any rotation."""
        key = self.turned(key, self.undoing(self.tensors["phase"][layer, j]))
        return self.rotated(key.to(self.tensors["phase"].dtype), self._place, back=True)

    def placed(self, layer: int, j: int, key: Tensor) -> Tensor:
        """What ``plain`` undoes."""
        return self.turned(self.rotated(key, self._place), self.tensors["phase"][layer, j])

    def undoing(self, table: Tensor) -> Tensor:
        """The table ``[..., 2]`` that turns round what this one does."""
        return torch.stack((table[..., 0], -table[..., 1]), -1)

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        self.unite(layer, k, v, plan)
        self.absorb(layer, k, v, plan)
        self.write(layer, k, v, plan, self.spec.sink_frames)

    def unite(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan) -> None:
        """Take the state from the slots, the first time."""
        for name, slots in (("k_state", k), ("v_state", v)) if plan.first else ():
            state = self.tensors[name][layer]
            state.copy_(slots[:, : state.shape[1]])

    def write(self, layer: int, k: Tensor, v: Tensor, plan: rf.ChunkPlan, frames: int) -> None:
        """The slots of the first sink frames, from the state."""
        for j in range(frames):
            key, value = self.state(layer, j)
            k[:, self.tokens(j)] = self.turned(key, plan.turns[j, -1]).to(k.dtype)
            v[:, self.tokens(j)] = value.to(v.dtype)

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.tensors:
            return k, v
        return self.tensors["k_state"][layer], self.tensors["v_state"][layer]
