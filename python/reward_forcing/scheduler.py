"""The flow-matching noise schedule: tables, noising, and the conversions between flow, x0 and x_t.

With ``x_t = (1 - sigma) x0 + sigma eps`` the model predicts the flow ``eps - x0``. The schedule is a table of
``num_steps`` entries,

    s_i = 1 - i / num_steps,   sigma_i = shift s_i / (1 + (shift - 1) s_i),
    timestep_i = num_train_timesteps sigma_i,

and any timestep means its nearest entry (the first of two equally near). Timestep 0 is therefore the last
entry, whose sigma is small but not 0. Tables are float32, whatever the data: a published float64 run uses the
float32 numbers too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import expect


class FlowMatchScheduler:
    """Flow-matching schedule with a timestep shift.

    Args:
        shift: how far the schedule leans towards noise; 1 is linear.
        num_train_timesteps: timestep of pure noise.
        num_steps: table entries.
        sigma_min, sigma_max: ends of the unshifted schedule.
        extra_one_step: the table ends one step before ``sigma_min`` (published setting) instead of on it.

    Timesteps ``t`` are tensors whose shape is a prefix of the data's: ``[B]`` with ``[B, ...]``,
    ``[B, F]`` (or ``[B, 1]``) with ``[B, F, C, H, W]``. Nothing here reads a device value back to the host.
    """

    def __init__(
        self,
        shift: float = 5.0,
        *,
        num_train_timesteps: int = 1000,
        num_steps: int = 1000,
        sigma_min: float = 0.0,
        sigma_max: float = 1.0,
        extra_one_step: bool = True,
    ):
        expect(0 < shift < math.inf, "FlowMatchScheduler", "shift", "a positive finite number", shift)
        expect(num_steps >= 2, "FlowMatchScheduler", "num_steps", "at least 2", num_steps)
        self.shift, self.num_train_timesteps, self.num_steps = shift, num_train_timesteps, num_steps
        # In float32 from the start, as published: another rounding of sigma would show in float64 runs, which
        # use these numbers.
        s = torch.linspace(
            sigma_max, sigma_min, num_steps + int(extra_one_step), dtype=torch.float32, device="cpu"
        )[:num_steps]
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = self.sigmas * num_train_timesteps
        bell = torch.exp(-2 * ((self.timesteps - num_steps / 2) / num_steps) ** 2)
        bell = bell - bell.min()
        self.training_weights = bell * (num_steps / bell.sum())

    def to(self, device: torch.device | str) -> FlowMatchScheduler:
        """Move the tables (in place); lookups then need no copy."""
        self.sigmas, self.timesteps = self.sigmas.to(device), self.timesteps.to(device)
        self.training_weights = self.training_weights.to(device)
        return self

    def index(self, t: Tensor) -> Tensor:
        """Table entry nearest to each timestep, int64 of ``t``'s shape; the first (noisier) one on ties."""
        distance = (self.timesteps.to(t.device) - t.unsqueeze(-1)).abs()
        return distance.argmin(dim=-1)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of each timestep, float32 of ``t``'s shape."""
        return self.sigmas.to(t.device)[self.index(t)]

    def training_weight(self, t: Tensor) -> Tensor:
        """Weight of each timestep in a flow-matching training loss, float32 of ``t``'s shape."""
        return self.training_weights.to(t.device)[self.index(t)]

    def warp(self, nominal: Sequence[int]) -> list[float]:
        """Timesteps of the shifted schedule for nominal steps n in [0, num_train_timesteps]: entry
        ``num_train_timesteps - n``, 0 for n = 0.

        Host numbers: they are known before a stream starts.
        """
        table = [*self.timesteps.tolist(), 0.0]
        for n in nominal:
            inside = 0 <= self.num_train_timesteps - n < len(table)
            expect(inside, "FlowMatchScheduler.warp", "nominal", f"steps in 0..{self.num_train_timesteps}", n)
        return [table[self.num_train_timesteps - n] for n in nominal]

    def _sigma_like(self, t: Tensor, data: Tensor) -> Tensor:
        prefix = t.dim() <= data.dim() and all(a in (b, 1) for a, b in zip(t.shape, data.shape, strict=False))
        expect(prefix, "FlowMatchScheduler", "t", f"a shape that leads {tuple(data.shape)}", tuple(t.shape))
        return self.sigma(t).reshape(t.shape + (1,) * (data.dim() - t.dim()))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = (1 - sigma) x0 + sigma noise`` in ``noise``'s dtype; sigma and 1 - sigma are float32,
        products at least float32.
        """
        sigma = self._sigma_like(t, noise)
        return ((1 - sigma) * x0 + sigma * noise).to(noise.dtype)

    def x0_from_flow(self, flow: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``x0 = x_t - sigma flow``, computed in float64, returned in ``flow``'s dtype."""
        sigma = self._sigma_like(t, x_t).double()
        return (x_t.double() - sigma * flow.double()).to(flow.dtype)

    def flow_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``flow = (x_t - x0) / sigma``, computed in float64, returned in ``x0``'s dtype."""
        sigma = self._sigma_like(t, x_t).double()
        return ((x_t.double() - x0.double()) / sigma).to(x0.dtype)

    @staticmethod
    def training_target(x0: Tensor, noise: Tensor) -> Tensor:
        """What the flow prediction is trained on: ``noise - x0``."""
        return noise - x0

    def step(self, flow: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One Euler step, ``x_t + flow (sigma_next - sigma)``, to the next table entry.

        As published, sigma_next is 0 for *all* samples as soon as *any* of them is on the last entry: step
        samples that end at different times in separate calls.
        """
        index = self.index(t)
        last = index == self.num_steps - 1
        sigmas = self.sigmas.to(t.device)
        following = torch.where(last.any(), 0.0, sigmas[(index + 1).clamp(max=self.num_steps - 1)])
        delta = (following - sigmas[index]).reshape(t.shape + (1,) * (x_t.dim() - t.dim()))
        return x_t + flow * delta
