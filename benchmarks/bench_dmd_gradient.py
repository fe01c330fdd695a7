"""dmd_gradient beside the published formulation and the best plain PyTorch, on the same tensors.

    python benchmarks/bench_dmd_gradient.py                     one line a shape, candidates in turn (rf_kernels.bench)
    pytest benchmarks/bench_dmd_gradient.py --benchmark-only    the same candidates under pytest-benchmark

Candidates, all of them ending with loss, logged norm and dx in hand, from a conditional fake and a guided real prediction:
- dmd_loss: one launch and the multiplication of backward.
- published: gradient in the dtype of the predictions, mean squared error in float64, backward through it.
- float64: the same with every step in float64.
- eager: no float64 and no autograd: the gradient by formula in the dtype of the predictions, the loss from it.
No number without agreement: candidates are compared before they are timed.
"""

import argparse

import pytest
import torch

import rf_kernels as rf
from rf_kernels import bench
from rf_kernels.reference.published import losses
from rf_kernels.testing import relative_l2

SHAPES = {
    "Wan 480x832, 21 frames": (1, 21, 16, 60, 104),
    "Wan 480x832, one chunk": (1, 3, 16, 60, 104),
    "batch of 4": (4, 21, 16, 60, 104),
}
DTYPES = [torch.float32, torch.bfloat16]
GUIDANCE, BETA = 3.0, 2.0


def cost(shape, dtype) -> dict[str, int]:
    """FLOPs and floor of bytes: x and three predictions read once, dx written once."""
    return rf.dmd_gradient.cost(shape, dtype, real_uncond=True, weight_elements=shape[0])


def candidates(shape, dtype, device) -> dict:
    """name -> a call that returns (loss, norm, dx)."""
    generator = torch.Generator(device).manual_seed(0)
    x, fake, real, uncond = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))
    reward = torch.full((1,), 0.3, device=device)
    x.requires_grad_()

    def ours():
        x.grad = None
        weight = rf.reward_weight(reward, BETA).expand(shape[0])
        loss, aux = rf.dmd_loss(
            x, fake=fake, real=real, real_uncond=uncond, real_guidance=GUIDANCE, weight=weight, return_aux=True
        )
        loss.backward()
        return loss, aux.gradient_norm.mean(), x.grad

    def published(wide=False):
        x.grad = None
        cast = (lambda t: t.double()) if wide else (lambda t: t)
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
        loss = torch.linalg.vector_norm(gradient, dtype=torch.float32).square() * (weight / (2 * gradient.numel()))
        return loss, norm, gradient.mul_(weight.to(dtype) / gradient.numel())

    return {"dmd_loss": ours, "published": published, "float64": lambda: published(True), "eager": eager}


def check(calls) -> None:
    """Candidates agree with the float64 one: a gross error stops the benchmark (PyTorch's float32 norms alone err by 1e-4 here)."""
    loss, norm, dx = (t.clone() for t in calls["float64"]())
    bound = max(1e-3, 8 * torch.finfo(dx.dtype).eps)
    for name, call in calls.items():
        for label, got, want in zip(("loss", "norm", "dx"), call(), (loss, norm, dx), strict=True):
            error = relative_l2(got.detach().reshape(want.shape), want.detach())
            assert error <= bound, f"{name}: {label} differs by {error:.1e}, allowed {bound:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dmd_loss", "published", "float64", "eager"])
def test_bench_dmd_gradient(benchmark, name, dtype):
    shape = SHAPES["Wan 480x832, 21 frames"]
    calls = candidates(shape, dtype, "cpu")
    check(calls)
    benchmark.group = f"dmd_gradient {list(shape)} {dtype}"
    benchmark.extra_info.update(cost(shape, dtype))
    benchmark(calls[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per candidate")
    arguments = parser.parse_args()
    print(bench.environment())
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            calls = candidates(shape, dtype, arguments.device)
            check(calls)
            timings = bench.measure(calls, device=arguments.device, seconds=arguments.seconds)
            counts = cost(shape, dtype)
            result = bench.row("dmd_gradient", f"{name} {list(shape)}", dtype, timings, nbytes=counts["bytes"])
            print(bench.line(result))


if __name__ == "__main__":
    main()
