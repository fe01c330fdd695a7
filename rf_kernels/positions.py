"""Rotary positions: which pairs of a head turn with which axis, and the tables of cosines and sines the ops
read.

All angles are formed in float64 on the host from host integers and rounded once to the dtype the kernel
computes in: no drift, no position limit (at frame 10^8 a float32 table is within 2^-24 of exact). Design:
design of the cache, section "Positions in detail" of docs/architecture.md; Wan2.1's split is ``RoPE3D.wan``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ._backend import argument_error, choice, integer, number

LAYOUTS = {"adjacent": 0, "half": 1, "axis_half": 2}


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the cos/sin table for data of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class RoPE:
    """Rotary embedding over any number of axes.

    Pair ``i`` of axis ``a`` at coordinate ``c`` turns by ``c * bases[a] ** (-i / pairs[a])`` radians, or by
    ``c * given[a][i]`` where frequencies are given:
    ``(x, y) -> (x cos - y sin, x sin + y cos)``. Pairs are numbered axis after axis; P = sum(pairs).

    Args:
        pairs: rotated pairs of each axis (0 leaves an axis without rotation).
        bases: base of each axis' frequencies.
        layout: where pair p lies in the head. "adjacent": dims (2p, 2p+1) (Wan, LLaMA-original). "half": dims
            (p, p + P) (GPT-NeoX, transformers). "axis_half": axis a owns 2 * pairs[a] consecutive dims, its
            pair i is (i, i + pairs[a]) there.
        temporal_axis: the axis whose coordinate is the latent frame; None when no axis is temporal
            (re-phasing is the identity).
        given: radians per unit of position for each pair, in the place of what ``bases`` says: for each axis
            a sequence of ``pairs[a]`` numbers, or None (RIFLEx, YaRN, a temporal scale). None: ``bases`` for
            all. See :meth:`with_frequencies`.

    Dims beyond 2P are not rotated.
    """

    pairs: tuple[int, ...]
    bases: tuple[float, ...]
    layout: str = "adjacent"
    temporal_axis: int | None = 0
    given: tuple[tuple[float, ...] | None, ...] | None = None

    def __post_init__(self):
        for name, values in (("pairs", self.pairs), ("bases", self.bases)):
            if not isinstance(values, tuple | list):
                raise argument_error("RoPE", name, "a tuple with one entry per axis", type(values).__name__)
        if len(self.pairs) == 0 or len(self.pairs) != len(self.bases):
            raise argument_error(
                "RoPE", "bases", f"one base per axis ({len(self.pairs)} axes)", f"{len(self.bases)}"
            )
        if any(not isinstance(p, int) or isinstance(p, bool) or p < 0 for p in self.pairs):
            raise argument_error("RoPE", "pairs", "counts >= 0", self.pairs)
        if any(not 0 < number("RoPE", "bases", b) < math.inf for b in self.bases):
            raise argument_error("RoPE", "bases", "positive numbers", self.bases)
        choice("RoPE", "layout", LAYOUTS, self.layout)
        if self.temporal_axis is not None and not 0 <= integer(
            "RoPE", "temporal_axis", self.temporal_axis
        ) < len(self.pairs):
            raise argument_error(
                "RoPE", "temporal_axis", f"None or 0..{len(self.pairs) - 1}", self.temporal_axis
            )

        if self.given is not None:
            object.__setattr__(self, "given", self._checked(self.given))

    def _checked(self, given) -> tuple[tuple[float, ...] | None, ...] | None:
        """Frequencies as plain numbers; a copy, so that the rope stays what it is."""
        if not isinstance(given, tuple | list) or len(given) != len(self.pairs):
            raise argument_error("RoPE", "given", f"one entry per axis ({len(self.pairs)})", repr(given))
        axes = []
        for values, pairs in zip(given, self.pairs, strict=True):
            if values is not None:
                try:
                    array = np.asarray(values, dtype=np.float64)
                except (TypeError, ValueError, OverflowError):
                    array = np.zeros(0) if pairs else np.zeros(1)
                if array.shape != (pairs,) or not np.isfinite(array).all():
                    expected = f"{pairs} finite numbers, or None"
                    raise argument_error("RoPE", "given", expected, repr(values))
                values = tuple(array.tolist())
            axes.append(values)
        return tuple(axes) if any(axis is not None for axis in axes) else None

    def with_frequencies(self, axis: int, frequencies: Sequence[float] | np.ndarray) -> "RoPE":
        """This rope with other frequencies on one axis, in radians per unit of position:
        ``frequencies(axis)`` changed as RIFLEx, YaRN or a temporal scale has it."""
        if not 0 <= integer("RoPE.with_frequencies", "axis", axis) < len(self.pairs):
            raise argument_error("RoPE.with_frequencies", "axis", f"0..{len(self.pairs) - 1}", axis)
        given = list(self.given or (None,) * len(self.pairs))
        given[axis] = frequencies
        return replace(self, given=tuple(given))

    @property
    def total_pairs(self) -> int:
        return sum(self.pairs)

    @property
    def rotated_dims(self) -> int:
        """Leading dims of a head that are rotated."""
        return 2 * self.total_pairs

    @cached_property
    def _frequencies(self) -> tuple[np.ndarray, ...]:
        usual = (
            np.power(float(base), -(np.arange(n, dtype=np.float64) / n)) if n else np.zeros(0)
            for n, base in zip(self.pairs, self.bases, strict=True)
        )
        given = self.given or (None,) * len(self.pairs)
        return tuple(u if g is None else np.array(g) for u, g in zip(usual, given, strict=True))

    def frequencies(self, axis: int) -> np.ndarray:
        """Radians per unit of position for each pair of ``axis``, float64 [pairs[axis]]."""
        return self._frequencies[axis].copy()

    def axis_table(self, axis: int, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """cos and sin of every (position, pair) of one axis: float64 [len(positions), pairs[axis], 2]."""
        angles = np.multiply.outer(np.asarray(positions, dtype=np.float64), self._frequencies[axis])
        return np.stack((np.cos(angles), np.sin(angles)), axis=-1)

    def temporal_table(self, frames: Sequence[int] | np.ndarray) -> np.ndarray:
        """``axis_table`` of the temporal axis (empty without one): the turn R_t(d) for each d in ``frames``,
        float64 [len, nt, 2]."""
        if self.temporal_axis is None:
            return np.zeros((len(frames), 0, 2))
        return self.axis_table(self.temporal_axis, frames)

    @property
    def temporal_pairs(self) -> int:
        return 0 if self.temporal_axis is None else self.pairs[self.temporal_axis]

    @cached_property
    def temporal_dims(self) -> tuple[int, int, int]:
        """First dim of x, first dim of y, step; temporal pair i is dims ``(x0 + i*step, y0 + i*step)`` of the
        head."""
        axis = self.temporal_axis or 0
        before = sum(self.pairs[:axis])
        if self.layout == "adjacent":
            return 2 * before, 2 * before + 1, 2
        if self.layout == "half":
            return before, before + self.total_pairs, 1
        return 2 * before, 2 * before + self.pairs[axis], 1

    def axes(self, lengths: Sequence[int]) -> list[int]:
        """The flat ``[length, pairs, offset] * axes`` description of a table whose axes follow one another,
        for the ops."""
        if len(lengths) != len(self.pairs):
            raise argument_error("RoPE", "lengths", f"{len(self.pairs)} axes", f"{tuple(lengths)}")
        out, offset = [], 0
        for length, pairs in zip(lengths, self.pairs, strict=True):
            out += [int(length), pairs, offset]
            offset += int(length) * pairs
        return out

    def table(
        self,
        positions: Sequence[Sequence[int] | np.ndarray],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, list[int]]:
        """The ``(angles, axes)`` arguments of ``rope`` and ``rope_append`` for a grid of tokens.

        Args:
            positions: for each axis, the position of every coordinate: host integers ``[length]``, or ``[B,
                length]`` for positions of their own per sample (then every axis is broadcast to B).
            dtype: dtype of the data to be rotated.
        Returns:
            angles ``[1 or B, R, 2]`` (cos, sin) and the flat list ``axes``; tokens are ordered with axis 0
            slowest.
        """
        if len(positions) != len(self.pairs):
            raise argument_error(
                "RoPE.table", "positions", f"one sequence per axis ({len(self.pairs)})", f"{len(positions)}"
            )
        grids = [np.atleast_2d(np.asarray(p, dtype=np.float64)) for p in positions]
        batch = max(g.shape[0] for g in grids)
        if any(g.ndim != 2 or g.shape[0] not in (1, batch) for g in grids):
            raise argument_error(
                "RoPE.table", "positions", "[length] or [B, length] with one B", [g.shape for g in grids]
            )
        rows = []
        for axis, grid in enumerate(grids):
            part = self.axis_table(axis, grid.reshape(-1)).reshape(grid.shape[0], -1, 2)
            rows.append(np.broadcast_to(part, (batch, *part.shape[1:])))
        angles = torch.from_numpy(np.concatenate(rows, axis=1)).to(device=device, dtype=table_dtype(dtype))
        return angles, self.axes([g.shape[1] for g in grids])


class RoPE3D(RoPE):
    """RoPE over (frame, row, column)."""

    @classmethod
    def wan(cls, head_dim: int, base: float = 10000.0) -> "RoPE3D":
        """Wan2.1's split: of D/2 pairs, D/2 // 3 turn with the row, as many with the column, the rest with
        the frame (22, 21, 21 for D = 128); adjacent pairs; each axis' base runs over its own width."""
        if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
            raise argument_error("RoPE3D.wan", "head_dim", "an even number >= 2", head_dim)
        base, spatial = number("RoPE3D.wan", "base", base), head_dim // 2 // 3
        return cls(pairs=(head_dim // 2 - 2 * spatial, spatial, spatial), bases=(base,) * 3)
