"""Cases of ``dmd_loss`` (the launch of ``dmd_gradient`` and one multiplication in backward). All candidates
end with loss, logged norm and dx in hand, from a conditional fake and a guided real prediction.

- dmd_loss: ours.
- published: gradient in the dtype of the predictions, mean squared error in float64, backward through it.
- float64: the same with every step in float64.
- eager: the best of plain PyTorch: no float64 and no autograd, the gradient by formula in the dtype of the
  predictions, in place.
"""

from functools import partial

import torch

from rf_kernels.ops.dmd_gradient import dmd_loss, reward_weight

from . import floors
from .case import Case, agree
from .published import losses

NAMES = ("dmd_loss", "published", "float64", "eager")
GUIDANCE, BETA = 3.0, 2.0


def build(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict:
    x, fake, real, uncond = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    reward = torch.full((1,), 0.3, device=device)
    x.requires_grad_()

    def ours():
        x.grad = None
        weight = reward_weight(reward, BETA).expand(shape[0])
        loss, aux = dmd_loss(
            x,
            fake=fake,
            real=real,
            real_uncond=uncond,
            real_guidance=GUIDANCE,
            weight=weight,
            return_aux=True,
        )
        loss.backward()
        return loss, aux.gradient_norm.mean(), x.grad

    def published(cast=lambda t: t):
        x.grad = None
        with torch.no_grad():
            target = losses.guide(cast(real), cast(uncond), GUIDANCE)
        gradient, norm = losses.dmd_gradient(cast(x), cast(fake), target)
        loss = losses.re_dmd_loss(x, gradient, reward.double(), BETA)
        loss.sum().backward()
        return loss, norm, x.grad

    @torch.no_grad()
    def eager():
        guided = torch.lerp(uncond, real, 1 + GUIDANCE)
        axes = tuple(range(1, x.dim()))
        gradient = fake - guided
        gradient /= guided.sub_(x).abs_().mean(dim=axes, keepdim=True)
        norm = torch.linalg.vector_norm(gradient, 1, dtype=torch.float32) / gradient.numel()
        weight = torch.exp(BETA * reward)
        loss = torch.linalg.vector_norm(gradient, dtype=torch.float32).square() * (
            weight / (2 * gradient.numel())
        )
        return loss, norm, gradient.mul_(weight.to(dtype) / gradient.numel())

    calls = {
        "dmd_loss": ours,
        "published": published,
        "float64": partial(published, torch.Tensor.double),
        "eager": eager,
    }
    # PyTorch's float32 norms err by 1e-4 at this length: a gross error is what must stop the benchmark.
    agree(calls, ulps=8, floor=1e-3, truth="float64")
    return calls


def cases() -> list[Case]:
    shapes = [
        ("Wan 480x832, 21 frames", (1, 21, 16, 60, 104), True),
        ("Wan 480x832, one chunk", (1, 3, 16, 60, 104), False),
        ("Wan 480x832, batch of 4", (4, 21, 16, 60, 104), False),
    ]
    return [
        Case(
            "dmd_gradient",
            f"{name} {list(shape)}",
            dtype,
            NAMES,
            partial(build, shape, dtype),
            floors.dmd_gradient(shape, dtype, real_uncond=True, weight_elements=shape[0]),
            quick=quick,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for name, shape, quick in shapes
    ]
