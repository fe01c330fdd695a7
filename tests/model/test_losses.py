"""Losses and noise schedule on numbers: what no model is needed for (tests/model/test_model.py has them with
models, tests/golden/test_golden.py against the published code)."""

import pytest
import torch

from reward_forcing import FlowMatchScheduler
from reward_forcing.losses import critic_flow_loss, dmd_loss, draw_timesteps, sid_loss, warp_timesteps
from rf_kernels.testing import assert_equal_bits

SHAPE = (2, 3, 4, 2, 2)
T = torch.tensor([700.0, 300.0])


def noise(seed, dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def never(x_t, t):
    raise AssertionError("a scorer that is not needed was called")


def common():
    return {"noise": noise(1), "t": T, "scheduler": FlowMatchScheduler(5.0)}


def test_every_integer_is_drawn():
    """From 0 on, and below the number of training timesteps."""
    draws = draw_timesteps(
        500,
        shift=1.0,
        min_step=0,
        num_train_timesteps=4,
        max_step=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert sorted(set(draws.tolist())) == [0.0, 1.0, 2.0, 3.0]
    t = warp_timesteps(torch.tensor([0, 250, 500, 999]), shift=5.0)
    torch.testing.assert_close(t, torch.tensor([20.0, 625.0, 5 / 6 * 1000, 980.0]))


@pytest.mark.parametrize("which", ["fake", "real"])
def test_an_unconditional_scorer_is_called_only_where_its_guidance_is_not_0(which):
    scores = {"fake": lambda x_t, t: 0.5 * x_t, "real": lambda x_t, t: 0.25 * x_t}
    guidance = {"real_guidance": 0.0, "fake_guidance": 0.0}
    plain = dmd_loss(noise(0), **scores, **common(), **guidance)
    idle = dmd_loss(noise(0), **scores, fake_uncond=never, real_uncond=never, **common(), **guidance)
    assert_equal_bits(plain, idle)
    calls = []

    def uncond(x_t, t):
        calls.append(t)
        return 0.1 * x_t

    guidance[f"{which}_guidance"] = 2.0
    other = "real" if which == "fake" else "fake"
    guided = dmd_loss(
        noise(0), **scores, **{f"{which}_uncond": uncond, f"{other}_uncond": never}, **common(), **guidance
    )
    assert len(calls) == 1 and not torch.equal(guided, plain)
    if which == "real":
        sid_loss(noise(0), **scores, real_uncond=never, **common(), real_guidance=0.0)


def test_a_nan_leaves_the_score_identity_loss():
    """Element by element: the others keep their part. (The normaliser is the sample's: the NaN is in the fake
    score.)"""
    x, real = noise(0), noise(2)
    poison = torch.zeros(SHAPE, dtype=torch.float64)
    poison[0, 0, 0, 0, 0] = float("nan")
    scores = {"real": lambda x_t, t: real, "fake": lambda x_t, t: 0.5 * x_t}
    options = common() | {"real_guidance": 0.0}
    clean, poisoned = (
        sid_loss(x, **scores, **options),
        sid_loss(x, **scores | {"fake": lambda x_t, t: 0.5 * x_t + poison}, **options),
    )
    x_t = options["scheduler"].add_noise(x, options["noise"], T)
    d = (real - 0.5 * x_t)[0, 0, 0, 0, 0]
    element = d * ((real - x)[0, 0, 0, 0, 0] - d) / (x - real)[0].abs().mean()
    torch.testing.assert_close(poisoned, clean - element / x.numel(), rtol=1e-12, atol=0)


def test_the_critic_is_trained_on_a_mean():
    x, options = noise(0).requires_grad_(), common()
    loss = critic_flow_loss(lambda x_t, t: torch.zeros_like(x_t), x, **options)
    sigma = options["scheduler"].sigma(T).double().view(2, 1, 1, 1, 1)
    x_t = (1 - sigma.float()) * x.detach() + sigma * options["noise"]
    torch.testing.assert_close(
        loss, (x_t / sigma - (options["noise"] - x.detach())).square().mean(), rtol=1e-12, atol=0
    )
    assert not loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversions_are_computed_in_float64_and_rounded_once(dtype):
    scheduler, x_t, other = FlowMatchScheduler(5.0), noise(0, dtype), noise(1, dtype)
    sigma = scheduler.sigma(T).double().view(2, 1, 1, 1, 1)
    assert_equal_bits(
        scheduler.x0_from_flow(other, x_t, T), (x_t.double() - sigma * other.double()).to(dtype)
    )
    assert_equal_bits(
        scheduler.flow_from_x0(other, x_t, T), ((x_t.double() - other.double()) / sigma).to(dtype)
    )


def test_timestep_draws():
    t = draw_timesteps(4000, shift=5.0, generator=torch.Generator().manual_seed(0))
    assert t.min() == 20 and t.max() == 980 and t.dtype == torch.float32
    linear = draw_timesteps(
        4000, shift=1.0, min_step=0, max_step=1000, generator=torch.Generator().manual_seed(0)
    )
    assert linear.mean().item() == pytest.approx(499.5, abs=4 * 1000 / 12**0.5 / 4000**0.5)
