"""Flow-matching scheduler of the published path (golden kind ``scheduler``, README section 6).

``x_t = (1 - sigma) x0 + sigma eps``, flow ``v = eps - x0``, ``timestep = 1000 sigma``, and the table is
warped by ``shift``: ``sigma_i = shift s_i / (1 + (shift - 1) s_i)``, ``s_i`` from 1 down in equal steps.
"""

from __future__ import annotations

import torch


class FlowMatchScheduler:
    """Tables ``sigmas``, ``timesteps`` and ``training_weights``, float32 ``[num_steps]`` in every run, and
    what is computed from them.

    A timestep is looked up as the nearest entry, the first one on ties. Published quirk: timestep 0 is
    therefore the last entry (sigma 0.004980 at shift 5), not sigma 0.

    Samples are ``[N, ...]`` with one timestep each, ``[N]``.
    """

    def __init__(
        self,
        shift: float = 5.0,
        num_steps: int = 1000,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.0,
        sigma_max: float = 1.0,
        extra_one_step: bool = True,
        device: torch.device | None = None,
    ):
        self.num_train_timesteps = num_train_timesteps
        if extra_one_step:
            sigmas = torch.linspace(sigma_max, sigma_min, num_steps + 1, device=device)[:-1]
        else:
            sigmas = torch.linspace(sigma_max, sigma_min, num_steps, device=device)
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = self.sigmas * num_train_timesteps
        bell = torch.exp(-2 * ((self.timesteps - num_steps / 2) / num_steps) ** 2)
        self.training_weights = (bell - bell.min()) * (num_steps / (bell - bell.min()).sum())

    def index(self, timestep: torch.Tensor) -> torch.Tensor:
        """Table entry nearest to each timestep ``[N]``, the first one on ties: int64 ``[N]``."""
        return (self.timesteps.unsqueeze(0) - timestep.unsqueeze(1)).abs().argmin(dim=1)

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sigma of each timestep, float32 ``[N]``."""
        return self.sigmas[self.index(timestep)]

    def training_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """Training weight of each timestep, float32 ``[N]``."""
        return self.training_weights[self.index(timestep)]

    def nominal_steps(self, steps: list[int]) -> torch.Tensor:
        """Timesteps of nominal steps ``n``: entry ``num_train_timesteps - n`` of ``timesteps ++ [0]``."""
        table = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return table[self.num_train_timesteps - torch.tensor(steps, device=table.device)]

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """``(1 - sigma) x0 + sigma noise``, sigma and ``1 - sigma`` in float32, the result in the dtype of
        ``noise``."""
        sigma = _per_sample(self.sigma(timestep), x0)
        return ((1 - sigma) * x0 + sigma * noise).to(noise.dtype)

    def x0_from_flow(self, flow: torch.Tensor, xt: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """``xt - sigma flow`` in float64, rounded to the dtype of ``flow``."""
        sigma = _per_sample(self.sigma(timestep.double()), xt).double()
        return (xt.double() - sigma * flow.double()).to(flow.dtype)

    def flow_from_x0(self, x0: torch.Tensor, xt: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """``(xt - x0) / sigma`` in float64, rounded to the dtype of ``x0``."""
        sigma = _per_sample(self.sigma(timestep.double()), xt).double()
        return ((xt.double() - x0.double()) / sigma).to(x0.dtype)

    @staticmethod
    def training_target(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The flow that the model learns: ``noise - x0``."""
        return noise - x0

    def step(self, flow: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Euler step to the next table entry, ``sample + flow (sigma_next - sigma)``.

        Published quirk: if any sample of the batch sits on the last entry, ``sigma_next`` is 0 for all of
        them.
        """
        index = self.index(timestep)
        if (index + 1 >= len(self.timesteps)).any():
            next_sigma = torch.zeros_like(self.sigmas[index])
        else:
            next_sigma = self.sigmas[index + 1]
        return sample + flow * _per_sample(next_sigma - self.sigmas[index], sample)


def score_timestep(
    index: torch.Tensor,
    shift: float = 5.0,
    min_step: float = 20,
    max_step: float = 980,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    """Timestep at which the score networks look, from a uniform integer ``n`` in ``[0,
    num_train_timesteps)``.

    ``shift s / (1 + (shift - 1) s) * num_train_timesteps`` with ``s = n / num_train_timesteps``, in float32,
    clamped to ``[min_step, max_step]`` (README section 7).
    """
    s = index / num_train_timesteps
    return (shift * s / (1 + (shift - 1) * s) * num_train_timesteps).clamp(min_step, max_step)


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[N] -> [N, 1, ...]`` to broadcast over a sample of ``like``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
