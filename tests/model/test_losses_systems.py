"""The losses of published systems: each against its formula in float64, written from the paper or from what
the system's own code computes, and one training step of every objective."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import rf_kernels as rf
from helpers.training import DISTILL
from reward_forcing import FlowMatchScheduler, losses
from reward_forcing.trainer import DistillConfig, loop
from reward_forcing.trainer.config import build
from reward_forcing.trainer.data import WorldSource
from reward_forcing.trainer.draws import Draws

SHAPE = (2, 4, 3, 2, 2)
T, S = torch.tensor([900.0, 600.0]), torch.tensor([400.0, 400.0])
GUIDANCE = 2.0


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class FrameDifference:
    """A reward that has a gradient: how much changes from frame to frame."""

    def __call__(self, frames, prompts):
        return 10 * frames.diff(dim=1).square().mean(dim=(1, 2, 3, 4))


class Scores:
    """Four scorers, affine in x_t and different at every noise level, that count their calls."""

    def __init__(self):
        self.calls = 0
        self.maps = {"fake": 0.6, "real": 0.3, "fake_uncond": 0.5, "real_uncond": 0.1}

    def predict(self, which, x_t, t):
        self.calls += 1
        level = (t / 1000).double().view(-1, *[1] * (x_t.dim() - 1))
        return self.maps[which] * x_t + level * noise(len(which), SHAPE)[: len(x_t), : x_t.shape[1]]

    def __getitem__(self, which):
        return lambda x_t, t: self.predict(which, x_t, t)

    def arguments(self, *names, real_guidance=GUIDANCE):
        return {name: self[name] for name in names} | {"real_guidance": real_guidance}


SCHEDULER = FlowMatchScheduler(5.0)
NAMES = ("fake", "real", "real_uncond")


def sigma(t, like=SHAPE):
    return SCHEDULER.sigma(t).double().view(-1, *[1] * (len(like) - 1))


def noised(x, eps, t):
    return (1 - SCHEDULER.sigma(t)).double().view(-1, 1, 1, 1, 1) * x + sigma(t) * eps


def scored(x_t, t, guidance=GUIDANCE):
    """fake, real, unconditional and guided real: ``u + alpha (c - u)``, alpha = guidance + 1."""
    fake, real, uncond = (Scores().predict(name, x_t, t) for name in NAMES)
    return fake, real, uncond, uncond + (guidance + 1) * (real - uncond)


def mean_abs(t):
    return t.abs().mean(dim=(1, 2, 3, 4), keepdim=True)


def of(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def close(found, expected, rtol=1e-6):
    """To the schedule's float32 noise levels: 1 - sigma is rounded in float32."""
    scale = expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(scale))


def x():
    return noise(0).requires_grad_()


# ---- DMD's gradient under other names ----------------------------------------------------------------------
def batch(leaf, **more):
    given = {"x": leaf, "noise": noise(1), "t": T, "scheduler": SCHEDULER, "next_t": 400.0}
    given |= {"entered": noise(5), "entered_t": torch.full((SHAPE[1],), 900.0), "prompts": ["a", "b"]}
    given |= {"draw": lambda name: noise(len(name)), "timesteps": lambda name, low=0.0: T}
    given |= {"clips": lambda: noise(6), "real_guidance": GUIDANCE, "beta": 2.0}
    scores = Scores()
    names = ("fake", "real", "fake_uncond", "real_uncond")
    return losses.Batch(**given | {name: scores[name] for name in names} | more)


@pytest.mark.parametrize(
    ("objective", "factor", "eps", "scale"),
    [
        (losses.DMD2(), 1, 0, GUIDANCE),
        (losses.DMD2(guidance_scale=1.5), 1, 0, 0.5),
        (losses.TMD(eps=0.1), 1, 0.1, GUIDANCE),
        (losses.AnyFlow(dmd_weight=0.7), 1.4, 0, GUIDANCE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, losses.Objective) else "",
)
def test_distribution_matching_under_its_other_names(objective, factor, eps, scale):
    leaf = x()
    x_t = noised(noise(0), noise(1), T)
    fake, _, _, guided = scored(x_t, T, scale)
    d = (fake - guided) / (mean_abs(noise(0) - guided) + eps)
    loss = objective.generator_loss(batch(leaf))
    close(loss, factor * d.square().mean() / 2)
    close(of(loss, leaf)[0], factor * d / d.numel())


# ---- Decoupled DMD: eq. 6 of arXiv 2511.22677, in x0 -------------------------------------------------------
@pytest.mark.parametrize("normalize", [False, True])
def test_decoupled_dmd(normalize):
    leaf, scores, t_ca = x(), Scores(), torch.tensor([950.0, 700.0])
    loss = losses.decoupled_dmd_loss(
        leaf,
        **scores.arguments(*NAMES),
        noise=noise(1),
        t=T,
        noise_ca=noise(2),
        t_ca=t_ca,
        scheduler=SCHEDULER,
        options=rf.DMDOptions(normalize=normalize),
    )
    fake, real, _, guided = scored(noised(noise(0), noise(1), T), T)
    _, real_ca, uncond_ca, _ = scored(noised(noise(0), noise(2), t_ca), t_ca)
    alpha = GUIDANCE + 1
    g = -((real - fake) + (alpha - 1) * (real_ca - uncond_ca))
    g = g / mean_abs(noise(0) - guided) if normalize else g
    close(of(loss, leaf)[0], g / g.numel())
    assert scores.calls == 5


def test_decoupled_dmd_with_one_draw_is_dmd():
    given = Scores().arguments(*NAMES) | {"noise": noise(1), "t": T, "scheduler": SCHEDULER}
    one, two = x(), x()
    (found,) = of(losses.decoupled_dmd_loss(one, **given, noise_ca=noise(1), t_ca=T), one)
    close(found, of(losses.dmd_loss(two, **given), two)[0], 1e-12)


# ---- Phased DMD: arXiv 2510.27684 --------------------------------------------------------------------------
@pytest.mark.parametrize("s", [0.0, 400.0])
def test_the_phased_target_is_unbiased(s):
    """For normal data of variance v the flow of the marginal at t is known: ``(sigma_t - a_t v) / (a_t^2 v +
    sigma_t^2) x_t``. It minimises eq. 13, whatever s is."""
    v, n = 2.0, 200_000
    t = torch.tensor([700.0])
    a_s, s_s = (
        (1.0, 0.0) if s == 0 else (1 - float(sigma(torch.tensor([s]))), float(sigma(torch.tensor([s]))))
    )
    s_t = float(sigma(t))
    x_s = ((1 - s_s) ** 2 * v + s_s**2) ** 0.5 * noise(3, (1, n, 1, 1, 1))
    eps = noise(4, x_s.shape)
    slope = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

    def fake(x_t, _):  # the flow slope * x_t, as an x0 prediction
        return x_t - s_t * slope * x_t

    given = {"s": torch.tensor([s]), "noise": eps, "t": t, "scheduler": SCHEDULER}
    (at_0,) = of(losses.phased_critic_loss(fake, x_s, **given), slope)
    with torch.no_grad():
        slope += 1.0
    (at_1,) = of(losses.phased_critic_loss(fake, x_s, **given), slope)
    found = float(-at_0 / (at_1 - at_0))  # the loss is a parabola in the slope
    expected = (s_t - (1 - s_t) * v) / ((1 - s_t) ** 2 * v + s_t**2)
    assert found == pytest.approx(expected, abs=4 * 2 / n**0.5)


def test_the_phased_critic_is_eq_13_with_its_clamp():
    """Levels on both sides of the clamp: sigma_ts^2 below and above 1 / 10."""
    t = torch.tensor([980.0, 430.0])
    x_s, eps = noise(0), noise(1)
    a_t, s_t, a_s, s_s = 1 - sigma(t), sigma(t), 1 - sigma(S), sigma(S)
    variance = s_t**2 - (a_t / a_s) ** 2 * s_s**2
    assert variance.min() < 0.1 < variance.max()
    x_t = a_t / a_s * x_s + variance.sqrt() * eps
    psi = (x_t - Scores().predict("fake", x_t, t)) / s_t
    coefficient = (a_s**2 * s_t + a_t * s_s**2) / a_s**2
    error = variance.sqrt() * psi - (coefficient * eps - variance.sqrt() / a_s * x_s)
    expected = ((1 / variance).clamp(0, 10) * error.square()).mean()
    given = {"s": S, "noise": eps, "t": t, "scheduler": SCHEDULER}
    close(losses.phased_critic_loss(Scores()["fake"], x_s, **given), expected, 1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_phased_generator(normalize):
    """``w (T - F) dG`` with T, F the flows of teacher and critic and G the output at s."""
    leaf = x()
    x_s = (1 - sigma(S)) * noise(0) + sigma(S) * noise(2)
    ratio = (1 - sigma(T)) / (1 - sigma(S))
    x_t = ratio * x_s + (sigma(T) ** 2 - ratio**2 * sigma(S) ** 2).sqrt() * noise(1)
    fake, _, _, guided = scored(x_t, T)
    teacher, critic = (x_t - guided) / sigma(T), (x_t - fake) / sigma(T)
    a_t, s_t = 1 - sigma(T), sigma(T)
    w = a_t * ratio / (a_t * s_t + s_t**2)
    expected = w * (teacher - critic) * (1 - sigma(S))
    if normalize:
        expected = (fake - guided) / mean_abs(noise(0) - guided)
    given = {"noise_s": noise(2), "s": S, "noise": noise(1), "t": T, "scheduler": SCHEDULER}
    loss = losses.phased_dmd_loss(leaf, **given, normalize=normalize, **Scores().arguments(*NAMES))
    close(of(loss, leaf)[0], expected / expected.numel(), 1e-5)


# ---- TDM: arXiv 2503.06674 and its released training script ------------------------------------------------
@pytest.mark.parametrize("huber", [0.0, 1e-3, 0.5])
def test_tdm(huber):
    leaf = noise(0).requires_grad_()
    loss = losses.tdm_loss(
        leaf, noise=noise(1), t=T, scheduler=SCHEDULER, huber=huber, **Scores().arguments(*NAMES)
    )
    plain = noise(0).requires_grad_()
    fake, real, uncond, guided = scored(noised(noise(0), noise(1), T), T)
    target = noise(0) + (real - fake) + (GUIDANCE + 1 - 1) * (real - uncond)
    error = plain - target
    rho = (error.square() + huber**2).sqrt() - huber if huber else error.square()
    expected = (rho / mean_abs(noise(0) - guided)).mean()
    close(loss, expected.detach())
    close(of(loss, leaf)[0], of(expected, plain)[0])


def test_the_noise_and_the_critic_of_tdm():
    """m is a unit normal's noise for x_t: ``a_t x + sigma_t m`` is x taken to s with the student's noise, and
    on to t with the fresh one."""
    own, fresh = noise(1), noise(2)
    mixed = losses.mixed_noise(own, fresh, s=S, t=T, scheduler=SCHEDULER)
    x_s = (1 - sigma(S)) * noise(0) + sigma(S) * own
    ratio = (1 - sigma(T)) / (1 - sigma(S))
    x_t = ratio * x_s + (sigma(T) ** 2 - ratio**2 * sigma(S) ** 2).sqrt() * fresh
    close(noised(noise(0), mixed, T), x_t)
    close(losses.mixed_noise(own, fresh, s=0 * S, t=T, scheduler=SCHEDULER), fresh)
    snr = ((1 - sigma(T)) / sigma(T)).square().flatten()
    importance = torch.exp(-0.5 * mixed.square().flatten(1).mean(1)) / torch.exp(
        -0.5 * fresh.square().flatten(1).mean(1)
    )
    error = (Scores().predict("fake", x_t, T) - noise(0)).square().flatten(1).mean(1)
    largest = float(snr.mean())
    assert snr.min() < largest < snr.max()
    found = losses.tdm_critic_loss(
        Scores()["fake"], noise(0), noise=mixed, t=T, scheduler=SCHEDULER, fresh=fresh, largest=largest
    )
    close(found, (snr.clamp(max=largest) * importance * error).mean())


# ---- SiD with guidance on both scores: its released training loop ------------------------------------------
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_lsg(alpha):
    """The gradients through x and through both networks: here the scorers' own parameters."""
    guidance = {"real_guidance": GUIDANCE, "fake_guidance": 0.5}

    def run(loss):
        parameters = {n: torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for n in ("fake", "real")}
        scores = Scores()
        scorers = {n: (lambda x_t, t, n=n: parameters[n] * scores.predict(n, x_t, t)) for n in parameters}
        scorers |= {n: scores[n] for n in ("fake_uncond", "real_uncond")}
        leaf = x()
        value = loss(leaf, scorers)
        return value.detach(), *of(value, leaf, *parameters.values())

    def ours(leaf, scorers):
        given = {"noise": noise(1), "t": T, "scheduler": SCHEDULER, "alpha": alpha}
        return losses.sid_lsg_loss(leaf, **scorers, **given, **guidance)

    def published(leaf, scorers):
        x_t = SCHEDULER.add_noise(leaf, noise(1), T)
        y = {n: scorers[n](x_t, T) for n in scorers}
        y_real, y_fake = (
            y[n] + s * (y[n] - y[f"{n}_uncond"]) for n, s in (("real", GUIDANCE), ("fake", 0.5))
        )
        weight = mean_abs(leaf - y_real).clamp(min=1e-5).detach()
        terms = (y_real - y_fake) * ((y_real - leaf) - alpha * (y_real - y_fake)) / weight
        return terms.sum() / len(leaf)

    for found, expected in zip(run(ours), run(published), strict=True):
        close(found, expected, 1e-12)


def test_sid_lsg_leaves_out_a_sample_that_is_not_finite():
    bad = noise(2)
    bad[1, 0, 0, 0, 0] = math.nan
    *gradients, normalizer = losses.sid_gradients(noise(0), bad, noise(3))
    assert (
        all(part[1].eq(0).all() and part[0].ne(0).all() for part in gradients) and normalizer[1] == math.inf
    )


# ---- configuration -----------------------------------------------------------------------------------------
OPTIONS = {
    "dmd2": {"guidance_scale": 1.5},
    "anyflow": {"dmd_weight": 2.0},
    "tmd": {"eps": 1e-3},
    "phased_dmd": {"normalize": False},
    "tdm": {"huber": 0.0, "largest": 0.01},
    "sid": {"alpha": 1.2},
    "sid_lsg": {"alpha": 1.2},
}


@pytest.fixture(scope="module")
def stage():
    """A run's networks, of a flow that is not 0: one for all objectives, its weights put back each time."""
    draws = Draws(3)
    config = replace(DISTILL, distill=replace(DISTILL.distill, critic_steps=1))
    stage = loop.DistillStage(config, WorldSource(draws), draws, reward=FrameDifference())
    work, seed = stage.distillation, torch.Generator().manual_seed(0)
    for model in (work.teacher, work.critic, work.rollout.model):
        torch.nn.init.normal_(model.head.head.weight, std=0.2, generator=seed)
    start = {name: copy.deepcopy(network.state()) for name, network in stage.networks.items()}

    def one_step(objective, options):
        distill = replace(config.distill, objective=objective, options=options)
        work.config = replace(config, distill=distill)
        work.objective = distill.build_objective()
        for name, network in stage.networks.items():
            network.restore(copy.deepcopy(start[name]))
        figures = stage.step(0)
        assert figures["generator_grad_norm"] > 0 and figures["critic_grad_norm"] > 0, figures
        assert math.isfinite(figures["generator_loss"]) and "generator_skipped" not in figures
        return figures

    return one_step


@pytest.mark.parametrize("objective", sorted(losses.OBJECTIVES))
def test_every_objective_trains_a_step(objective, stage):
    figures = stage(objective, {})
    for name, value in OPTIONS.get(objective, {}).items():  # each option is used
        assert stage(objective, {name: value}) != figures


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"objective": "phased"}, "objective.*nearest: phased_dmd"),
        ({"objective": "tdm", "options": {"hubert": 1.0}}, r"options\.hubert.*nearest: huber"),
        ({"objective": "tdm", "options": {"huber": "soft"}}, r"options\.huber.*float"),
        ({"objective": "tdm", "options": {"huber": -1.0}}, "TDM.*huber"),
        ({"objective": "tdm", "options": [1]}, "options.*dict"),
        ({"objective": "dmd", "options": {"beta": 1.0}}, r"options\.beta"),
        ({"objective": "phased_dmd", "same_exit": False}, "same_exit.*True"),
    ],
)
def test_a_wrong_objective_is_refused_by_key(values, text):
    with pytest.raises(rf.ArgumentError, match=text):
        build(DistillConfig, values, "distill.")
