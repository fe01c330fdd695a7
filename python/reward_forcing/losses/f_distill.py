"""f-distill: distribution matching for any f-divergence (arXiv 2502.15681; NVlabs/FastGen,
fastgen/methods/distribution_matching/f_distill.py).

The gradient of DMD is weighted by h(r), ``r = p_teacher / p_student`` at x_t, which a discriminator's logits
estimate. The discriminator is trained on real clips beside the critic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rf_kernels as rf

from .._check import expect
from .dmd import dmd_loss
from .objective import Batch, Objective, in_range

#: h of a divergence: reverse and forward Kullback-Leibler, Jensen-Shannon, softened forward, Neyman's chi^2,
#: squared Hellinger, Jeffreys.
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r.clamp(min=1e-8),
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
}


def _summed(t: Tensor) -> Tensor:
    """The sum over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def binned(ratio: Tensor, t: Tensor, bins: Tensor, *, ema: float = 0.0, last: float = 1000.0) -> Tensor:
    """Ratios ``[B]`` over the mean ratio of their bin of timesteps, of all ranks.

    ``bins`` ``[n]`` split [0, last]; it is changed in place: ``ema bin + (1 - ema) mean``, where a sample is.
    """
    index = (t.double() / last * len(bins)).long().clamp(0, len(bins) - 1)
    sums = torch.zeros(2, len(bins), dtype=torch.float64, device=ratio.device)
    sums = _summed(sums.index_add(1, index, torch.stack([torch.ones_like(ratio), ratio]).double()))
    mean = (sums[1] / (sums[0] + 1e-6)).to(bins.dtype)
    bins.copy_(torch.where(sums[0] > 0, ema * bins + (1 - ema) * mean, bins))
    return ratio / (bins[index] + 1e-6)


def f_weight(
    logits: Tensor,
    t: Tensor,
    bins: Tensor,
    *,
    divergence: str = "js",
    lower: float = 0.1,
    upper: float = 20.0,
    ema: float = 0.0,
) -> Tensor:
    """Weights h ``[B]`` of mean 1 over all ranks, without gradient.

    ``r = clamp(exp(clamp(logits, -10, 10)), lower, upper)``, divided by its bin's mean (``binned``); h of it,
    divided by the mean of h.
    """
    ratio = logits.detach().float().clamp(-10, 10).exp().clamp(lower, upper)
    h = DIVERGENCES[divergence](binned(ratio, t, bins, ema=ema))
    total = _summed(torch.stack([h.sum(), h.new_tensor(float(len(h)))]))
    return h / (total[0] / total[1] + 1e-6)


def f_distill_loss(x: Tensor, *, weight: Tensor, **arguments) -> Tensor:
    """``dmd_loss`` with the weights of ``f_weight`` and 1e-6 added to the normaliser, as in FastGen."""
    return dmd_loss(x, weight=weight, options=rf.DMDOptions(eps=1e-6), **arguments)


class Discriminator(nn.Module):
    """Logits ``[B]`` of noised clips ``[B, F, C, H, W]`` at timesteps ``[B]``: two convolutions and a mean.
    (FastGen's reads features of the teacher.) It holds the ratios' bins."""

    def __init__(self, channels: int, width: int = 32, bins: int = 10):
        super().__init__()
        first = nn.Conv3d(channels + 1, width, 3, padding=1)
        second = nn.Conv3d(width, width, 3, stride=(1, 2, 2), padding=1)
        self.blocks, self.head = nn.ModuleList([first, second]), nn.Linear(width, 1)
        self.register_buffer("bins", torch.ones(bins))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        h = x_t.transpose(1, 2)
        level = (t / 1000).to(h.dtype).reshape(-1, 1, 1, 1, 1).expand(-1, 1, *h.shape[2:])
        h = torch.cat([h, level], dim=1)
        for block in self.blocks:
            h = F.silu(block(h))
        return self.head(h.mean(dim=(2, 3, 4)))[:, 0]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean softplus(fake) + mean softplus(-real)``: what makes the logits ``log p_real / p_fake``."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


@dataclass(frozen=True)
class FDistill(Objective):
    """f-distill, with the generator's part of the GAN, ``gan_weight mean softplus(-logits)``.

    Args:
        divergence: a name of ``DIVERGENCES``.
        lower, upper: of the ratio. ema: of its bins.
        gan_weight: of the GAN loss.
    """

    divergence: str = "js"
    lower: float = 0.1
    upper: float = 20.0
    ema: float = 0.0
    gan_weight: float = 1e-3
    needs_discriminator = True

    def __post_init__(self):
        known = self.divergence in DIVERGENCES
        expect(known, "FDistill", "divergence", f"one of {list(DIVERGENCES)}", repr(self.divergence))
        in_range(self, "lower", 0, self.upper)
        in_range(self, "ema", 0, 1)
        in_range(self, "gan_weight", 0)

    def generator_loss(self, batch: Batch) -> Tensor:
        logits = batch.discriminator(batch.scheduler.add_noise(batch.x, batch.noise, batch.t), batch.t)
        options = {"divergence": self.divergence, "lower": self.lower, "upper": self.upper, "ema": self.ema}
        weight = f_weight(logits, batch.t, batch.discriminator.bins, **options)
        loss = f_distill_loss(batch.x, weight=weight, **batch.arguments)
        return loss + self.gan_weight * F.softplus(-logits).mean()
