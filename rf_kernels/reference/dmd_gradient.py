"""Oracle of ``dmd_gradient`` and ``dmd_loss``: the definition in plain PyTorch, in any floating dtype
(float64 for tests)."""

from typing import NamedTuple

import torch


class Result(NamedTuple):
    gradient: torch.Tensor  # like x
    loss: torch.Tensor  # []
    per_sample_loss: torch.Tensor  # [B]
    gradient_norm: torch.Tensor  # [B]
    normalizer: torch.Tensor  # [B]
    dropped: torch.Tensor  # [] int64


def expand(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B], [B, F] or as many dimensions as x -> the shape of x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)).expand(x.shape)


def dmd_gradient(
    x,
    *,
    fake,
    real,
    fake_uncond=None,
    real_uncond=None,
    fake_guidance=0.0,
    real_guidance=0.0,
    weight=None,
    mask=None,
    normalize=True,
    eps=0.0,
    floor=0.0,
    nan="sample",
    x_t=None,
    sigma=None,
    reduction="mean",
    limit=None,
) -> Result:
    """As ``rf_kernels.dmd_gradient`` with guidance in the form c + g (c - u), computed in the dtype of the
    arguments.

    ``limit``: largest finite number of the predictions' dtype, when the arguments are a float64 copy of
    narrower ones.
    """

    def guided(cond, uncond, g):
        return cond if uncond is None or g == 0 else cond + g * (cond - uncond)

    limit = torch.finfo(fake.dtype).max if limit is None else limit
    fake, real = guided(fake, fake_uncond, fake_guidance), guided(real, real_uncond, real_guidance)
    difference = fake - real
    if x_t is not None:  # flow: x0 = x_t - sigma v, and x_t cancels in the difference
        noise_level = expand(sigma.to(real.dtype), x)
        difference = noise_level * (real - fake)
        real = x_t - noise_level * real

    rows = (x.shape[0], -1) if x.numel() else (x.shape[0], 0)
    elements = max(x[0].numel() if x.shape[0] else 0, 1)
    if normalize:
        normalizer = (x - real).abs().reshape(rows).sum(1) / elements + eps
        normalizer = torch.where(normalizer < floor, floor, normalizer)
    else:
        normalizer = x.new_ones(x.shape[0])
    d = difference / expand(normalizer, x)

    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else expand(mask, x)
    weight = torch.ones_like(x) if weight is None else expand(weight.to(x.dtype), x)
    dropped = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if nan == "published":
        d = torch.nan_to_num(d, nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)
    else:
        zero = normalizer == 0
        d = torch.where(expand(zero, x), torch.where(difference.isfinite(), 0.0, difference), d)
        bad = ~d.isfinite() | (d.abs() > limit) | ~expand(normalizer, x).isfinite() | ~weight.isfinite()
        dropped = bad.reshape(rows).any(1)
        if nan == "raise" and dropped.any():
            raise ValueError(
                f"{int(dropped.sum())} of {len(dropped)} samples with a gradient that is not finite"
            )
        d = torch.where(expand(dropped, x), torch.zeros_like(d), d)
        weight = torch.where(expand(dropped, x), torch.zeros_like(weight), weight)

    divisor = int(mask.sum()) if reduction == "mean" else 1
    scale = 1.0 / divisor if divisor else 0.0
    gradient = torch.where(mask, weight * scale * d, torch.zeros_like(d))
    per_sample_loss = torch.where(mask, weight * d * d, torch.zeros_like(d)).reshape(rows).sum(1) * (
        scale / 2
    )
    gradient_norm = d.abs().reshape(rows).sum(1) / elements
    return Result(gradient, per_sample_loss.sum(), per_sample_loss, gradient_norm, normalizer, dropped.sum())


def surrogate_loss(x, *, target, weight=None, mask=None, reduction="mean"):
    """sum(w m (x - target)^2) / (2 N) with a constant target: the loss whose value and gradient ``dmd_loss``
    has at target = x - d."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else expand(mask, x)
    weight = torch.ones_like(x) if weight is None else expand(weight.to(x.dtype), x)
    divisor = int(mask.sum()) if reduction == "mean" else 1
    total = torch.where(mask, weight * (x - target.detach()) ** 2, torch.zeros_like(x)).sum()
    return total / (2 * divisor) if divisor else total * 0.0
