"""Distillation losses of the published path (golden kinds ``re_dmd``, ``vanilla_dmd``, ``critic_flow``,
``sid``; README section 7).

Latents and predictions are ``[B, F, C, H, W]``, timesteps ``[B, F]``. Predictions are x0 estimates of the
score networks at ``x_t = noisy_latent(x, noise, t)``. Every step is taken in the dtype of the predictions
unless said otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .scheduler import FlowMatchScheduler


def noisy_latent(
    scheduler: FlowMatchScheduler, x: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """``(1 - sigma(t)) x + sigma(t) noise`` per frame. Differentiable in ``x``: DMD detaches it, SiD does
    not."""
    xt = scheduler.add_noise(x.flatten(0, 1), noise.flatten(0, 1), timestep.flatten(0, 1))
    return xt.unflatten(0, x.shape[:2])


def guide(cond: torch.Tensor, uncond: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Classifier-free guidance ``cond + (cond - uncond) * scale``; ``cond`` itself without an unconditional
    prediction."""
    return cond if uncond is None else cond + (cond - uncond) * scale


def _normalizer(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``mean |x - real|`` per sample over all elements, masked or not: ``[B, 1, 1, 1, 1]``."""
    return (x - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)


@torch.no_grad()
def dmd_gradient(
    x: torch.Tensor, fake: torch.Tensor, real: torch.Tensor, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nan_to_num((fake - real) / mean|x - real|)``, and the logged ``mean |grad|`` (0-dim).

    Published quirk: NaN becomes 0 and infinities the largest finite number of the dtype, so a sample whose
    normaliser is exactly 0 gets gradients of that size.
    """
    grad = fake - real
    if normalize:
        grad = grad / _normalizer(x, real)
    grad = torch.nan_to_num(grad)
    return grad, grad.abs().mean()


def dmd_loss(x: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``0.5 mean((x - stop(x - grad))^2)`` in float64 over all elements, or over those where ``mask`` is
    nonzero: 0-dim float64.

    Its gradient on ``x`` is ``grad / n_selected`` on selected elements and 0 elsewhere.
    """
    wide = x.double()
    target = (wide - grad.double()).detach()
    if mask is not None:
        selected = mask.bool()
        wide, target = wide[selected], target[selected]
    return 0.5 * F.mse_loss(wide, target)


def re_dmd_loss(
    x: torch.Tensor, grad: torch.Tensor, reward: torch.Tensor, beta: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Reward-weighted DMD: ``exp(beta * reward) * dmd_loss(x, grad, mask)``.

    ``reward`` is ``[1]``, the standardised motion quality of sample 0, and is not differentiated. Published
    quirks: it weights the whole batch; and since it has a dimension while the DMD loss is 0-dim, the product
    has shape ``[1]`` and the dtype of ``reward``, so weight and loss are rounded to it (bfloat16 in a
    mixed-precision run).
    """
    return torch.exp(beta * reward.detach()) * dmd_loss(x, grad, mask)


def critic_flow_loss(
    scheduler: FlowMatchScheduler,
    pred_fake: torch.Tensor,
    generated: torch.Tensor,
    noise: torch.Tensor,
    xt: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """``mean((flow - (noise - generated))^2)`` with the flow ``(xt - pred_fake) / sigma(t)`` of the fake
    score network."""
    flow = scheduler.flow_from_x0(pred_fake.flatten(0, 1), xt.flatten(0, 1), timestep.flatten(0, 1))
    target = scheduler.training_target(generated.flatten(0, 1), noise.flatten(0, 1))
    return ((flow - target) ** 2).mean()


def sid_loss(x: torch.Tensor, fake: torch.Tensor, real: torch.Tensor, sid_alpha: float = 1.0) -> torch.Tensor:
    """Score identity distillation: ``mean(nan_to_num(d * ((real - x) - sid_alpha d) / mean|x - real|))``, ``d
    = real - fake``.

    Products in float64, the normaliser per sample, in the dtype of ``x`` and without gradient; no mask.
    Differentiate through ``x``, ``fake`` and ``real``: the predictions come from an ``x_t`` that is not
    detached.
    """
    x64, fake64, real64 = x.double(), fake.double(), real.double()
    d = real64 - fake64
    elements = d * ((real64 - x64) - sid_alpha * d) / _normalizer(x, real).detach()
    return torch.nan_to_num(elements).mean()
