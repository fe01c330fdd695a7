"""The losses of published systems: each against its formula in float64, written from the paper or from what
the system's own code computes, and one training step of every objective."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rf_kernels as rf
from helpers.training import DISTILL
from reward_forcing import FlowMatchScheduler, losses, rewards
from reward_forcing.trainer import DistillConfig, loop, train
from reward_forcing.trainer.config import RewardConfig, build, changed
from reward_forcing.trainer.data import WorldSource
from reward_forcing.trainer.draws import Draws

SHAPE = (2, 4, 3, 2, 2)
T, S = torch.tensor([900.0, 600.0]), torch.tensor([400.0, 400.0])
GUIDANCE = 2.0


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


REWARDS = torch.tensor([0.3, -0.5])
SALIENCY = noise(9, (2, 4, 2, 2)).abs()


# ---- DMD's gradient under other names ----------------------------------------------------------------------
def batch(leaf, **more):
    given = {"x": leaf, "noise": noise(1), "t": T, "scheduler": SCHEDULER, "exit_t": 900.0}
    given |= {"next_t": 400.0}
    given |= {"entered": noise(5), "entered_t": torch.full((SHAPE[1],), 900.0), "prompts": ["a", "b"]}
    given |= {"draw": lambda name: noise(len(name)), "timesteps": lambda name, low=0.0, high=1000.0: T}
    given |= {"clips": lambda: noise(6), "real_guidance": GUIDANCE, "beta": 2.0, "clean": noise(0)}
    given |= {"uniform": lambda name: 0.6, "rewards": lambda: REWARDS, "saliency": lambda: SALIENCY}
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


# ---- f-distill: its released code --------------------------------------------------------------------------
H = {
    "rkl": lambda r: 1.0,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "sh": math.sqrt,
    "jf": lambda r: 1 + r,
}


@pytest.mark.parametrize("divergence", sorted(losses.DIVERGENCES))
def test_weights_of_an_f_divergence(divergence):
    """Sample by sample, two bins of three in use, ratios beyond both limits, an average kept."""
    logits, t = torch.tensor([-50.0, 0.3, 1.2, 50.0]), torch.tensor([10.0, 400.0, 600.0, 999.0])
    bins = torch.tensor([2.0, 7.0, 0.5])
    found = losses.f_weight(logits, t, bins, divergence=divergence, lower=0.2, upper=9.0, ema=0.75)
    r = [0.2, math.exp(0.3), math.exp(1.2), 9.0]
    kept = [0.75 * 2 + 0.25 * r[0], 0.75 * 7 + 0.25 * (r[1] + r[2]) / 2, 0.75 * 0.5 + 0.25 * r[3]]
    h = [H[divergence](value / kept[bin]) for value, bin in zip(r, (0, 1, 1, 2), strict=True)]
    close(bins, torch.tensor(kept), 1e-5)
    close(found, torch.tensor(h) / (sum(h) / 4), 1e-5)
    bins = torch.ones(3)  # a bin without samples keeps what it has
    losses.f_weight(logits[:1], t[:1], bins, divergence=divergence)
    assert bins[1:].eq(1).all() and bins[0] != 1


def test_f_distill_is_weighted_dmd_and_a_gan():
    """The discriminator's logits are log p_real / p_fake at its optimum: the loss has no slope there."""
    leaf, plain = x(), x()
    torch.manual_seed(0)
    d = losses.Discriminator(SHAPE[2], width=4).double()
    loss = losses.FDistill(divergence="kl", gan_weight=0.5).generator_loss(batch(leaf, discriminator=d))
    x_t = noised(plain, noise(1), T)
    logits = d(x_t, T)
    h = losses.f_weight(logits, T, torch.ones(10), divergence="kl").double().view(2, 1, 1, 1, 1)
    fake, _, _, guided = scored(x_t.detach(), T)
    g = (fake - guided) / (mean_abs(noise(0) - guided) + 1e-6)
    target = (plain - g).detach()
    expected = (
        0.5 * (h * (plain - target).square()).mean() - 0.5 * torch.nn.functional.logsigmoid(logits).mean()
    )
    close(loss, expected.detach(), 1e-5)
    close(of(loss, leaf)[0], of(expected, plain)[0], 1e-5)
    real, fake = 0.8, 0.3  # the densities at one point
    at = torch.tensor(math.log(real / fake), requires_grad=True)
    balance = real * losses.discriminator_loss(at, at - 1e9) + fake * losses.discriminator_loss(at + 1e9, at)
    assert abs(float(of(balance, at)[0])) < 1e-6


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


# ---- weights -----------------------------------------------------------------------------------------------
def weighted(objective, expected, **more):
    """The gradient is DMD's, times the weight."""
    leaf, fake_guided = x(), scored(noised(noise(0), noise(1), T), T)
    fake, _, _, guided = fake_guided
    d = (fake - guided) / mean_abs(noise(0) - guided)
    loss = objective.generator_loss(batch(leaf, **more))
    close(loss, (expected * d.square()).mean() / 2)
    close(of(loss, leaf)[0], expected * d / d.numel())


def test_adastate_weighs_frames_on_a_line():
    line = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    weighted(losses.AdaState(ratio=4.0), (line / line.mean()).view(1, 4, 1, 1, 1).expand(SHAPE))


def test_stream_r1_weighs_rollouts_and_elements():
    """Frame by frame and clip by clip, as its method says: minmax, strength, floor, mean 1."""
    strength, floor, t_strength, t_floor = 0.8, 0.4, 0.6, 0.5
    expected = torch.empty(2, 4, 1, 2, 2, dtype=torch.float64)
    for b in range(2):
        profile = [float(SALIENCY[b, f].mean()) for f in range(4)]
        low, high = min(profile), max(profile)
        frames = [max(1 - t_strength + t_strength * (p - low) / (high - low), t_floor) for p in profile]
        for f in range(4):
            s = SALIENCY[b, f]
            w = (1 - strength + strength * (s - s.min()) / (s.max() - s.min())).clamp(min=floor)
            expected[b, f, 0] = frames[f] / (sum(frames) / 4) * w / w.mean()
        expected[b] = expected[b] / expected[b].mean() * math.exp(2.0 * REWARDS[b])
    weighted(losses.StreamR1(strength, floor, t_strength, t_floor), expected)
    flat = losses.saliency_weight(torch.ones(1, 2, 3, 3))
    assert flat.eq(1).all()


def test_stream_r1_mixes_and_balances_rewards():
    maps, scores = torch.stack([noise(1, (2, 2)), noise(2, (2, 2))]), torch.tensor([0.0, math.log(3)])
    close(losses.mixed_saliency(maps, scores), 0.75 * maps[0] + 0.25 * maps[1])
    balanced = losses.BalancedReward(penalty=0.5, window=6, warmup=4)
    history = [torch.tensor([float(i), 0.0, -2.0 * i]) for i in range(9)]
    found = [float(balanced(scores)) for scores in history]
    assert found[:3] == [float(scores.mean()) for scores in history[:3]]
    # Among calls 3..8 the second half is 3 steps behind the first: gains of 3, 0 and -6.
    spread = torch.tensor([3.0, 0.0, -6.0]).std()
    assert found[8] == pytest.approx(float(history[8].mean() - 0.5 * spread))


def test_hallo_live_weighs_by_all_its_rewards():
    one, two = torch.tensor([0.1, 0.4]), torch.tensor([0.2, -0.3])
    expected = torch.exp(2 * one) * torch.exp(2 * two)
    close(losses.product_weight([one, two], 2.0), expected)
    close(losses.standardized(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([-2.0, -1, 3]) / (14 / 3) ** 0.5)
    assert losses.standardized(torch.ones(3)).eq(0).all()
    weight = torch.exp(2.0 * REWARDS).view(2, 1, 1, 1, 1)
    weighted(losses.HalloLive(), weight)
    leaf, plain = x(), x()
    (found,) = of(losses.HalloLive(decoupled=True).generator_loss(batch(leaf)), leaf)
    (expected,) = of(losses.DMD().generator_loss(batch(plain)), plain)
    close(found, weight * expected)  # one noise, and here one level


def test_a_student_of_several_learns_from_its_own_prompts():
    prompts = ["a red disc", "a slow disc", "still", "a blue square"]
    parts = losses.partition_of(prompts, 2)
    assert set(parts.tolist()) == {0, 1} and torch.equal(parts, losses.partition_of(prompts, 2))
    pair = [prompts[parts.tolist().index(k)] for k in (0, 1)]
    for student in (0, 1):
        mine = torch.tensor([student == 0, student == 1])
        leaf, whole = x(), x()
        objective = losses.MultiStudent(students=2, student=student)
        (found,) = of(objective.generator_loss(batch(leaf, prompts=pair)), leaf)
        (expected,) = of(losses.DMD().generator_loss(batch(whole)), whole)
        close(found, 2 * expected * mine.view(2, 1, 1, 1, 1))  # N: the elements of one sample of two
        x_t = noised(noise(0), noise(1), T)
        error = (x_t - Scores().predict("fake", x_t, T)) / sigma(T) - (noise(1) - noise(0))
        close(
            objective.critic_loss(batch(noise(0), prompts=pair)),
            error.square().flatten(1).mean(1)[mine].sum(),
        )
    none = losses.MultiStudent(students=2, student=1).critic_loss(batch(noise(0), prompts=[pair[0]] * 2))
    assert none == 0


# ---- Self-Forcing++: plain DMD on the window ---------------------------------------------------------------
def test_a_window_of_a_long_rollout():
    objective, leaf = losses.SelfForcingPP(window=2), x()
    (found,) = of(objective.generator_loss(batch(leaf)), leaf)
    part = noise(0)[:, 1:3].requires_grad_()  # 0.6 of three starts
    given = {"noise": noise(1)[:, 1:3], "t": T, "scheduler": SCHEDULER}
    (expected,) = of(losses.dmd_loss(part, **given, **Scores().arguments(*NAMES)), part)
    close(found[:, 1:3], expected, 1e-12)
    assert found[:, [0, 3]].eq(0).all()
    close(
        objective.critic_loss(batch(noise(0))),
        losses.critic_flow_loss(Scores()["fake"], noise(0)[:, 1:3], **given),
    )
    with pytest.raises(rf.ArgumentError, match="window.*rollout's 4"):
        losses.SelfForcingPP(window=5).generator_loss(batch(x()))


# ---- Diagonal Distillation: its released loss --------------------------------------------------------------
def test_diagonal_distillation():
    leaf, plain = x(), x()
    given = {"noise": noise(1), "t": T, "scheduler": SCHEDULER}
    loss = losses.diagonal_loss(leaf, **given, motion=0.2, **Scores().arguments(*NAMES))
    fake, _, _, real = scored(noised(noise(0), noise(1), T), T)
    d = (fake - real) / mean_abs(noise(0) - real)

    def delta(v):
        return v[:, 1:] - v[:, :-1]

    m = (delta(fake) - delta(real)) / mean_abs(delta(noise(0)) - delta(real))
    errors = ((m - noise(0)[:, 1:]) ** 2).mean(dim=(2, 3, 4))
    dynamic = 1 + torch.cumsum(errors, 1) / errors.sum(1, keepdim=True)
    grown = torch.tensor([1.0, 1.2, 1.44]).double()
    w = (0.7 * dynamic + 0.3 * grown / grown.mean()).view(2, 3, 1, 1, 1)
    spatial = 0.5 * ((plain - (noise(0) - d)) ** 2).mean()
    temporal = (w * (delta(plain) - (delta(noise(0)) - m)) ** 2).mean()
    close(loss, (spatial + 0.2 * temporal).detach())
    close(of(loss, leaf)[0], of(spatial + 0.2 * temporal, plain)[0])


# ---- flow losses with weights from outside -----------------------------------------------------------------
@pytest.mark.parametrize("advantage", [[1.5, -0.7], [9.0, -9.0]])
@pytest.mark.parametrize("old", [None, (0.0, 0.0), (-3.0, -0.1)])
def test_awm(advantage, old):
    """On policy, and with ratios on both sides of the clip range."""
    flow, plain, target = x(), x(), 0.5 * noise(1)
    factor, advantage = torch.tensor([0.9, 0.4]).double(), torch.tensor(advantage).double()
    log_prob = -factor * (plain - target).square().flatten(1).mean(1)
    before = log_prob.detach() if old is None else torch.tensor(old).double()
    ratio = torch.exp(log_prob - before)
    a = advantage.clamp(-5, 5)
    expected = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
    found = losses.awm_loss(
        flow, target, advantage, factor=factor, old_log_prob=None if old is None else before, clip_range=0.2
    )
    close(found, expected.detach())
    expected = of(expected, plain)[0]
    torch.testing.assert_close(of(found, flow)[0], expected, rtol=1e-9, atol=1e-15)


def test_awm_of_a_batch_weighs_its_clips_by_their_rewards():
    leaf, plain = x(), x()
    s = float(sigma(T[:1]))
    (found,) = of(losses.AWM(weighting="t2").generator_loss(batch(leaf, clean=noise(3))), leaf)
    v, target = (noise(5) - plain) / s, (noise(5) - noise(3)) / s
    spread = (REWARDS - REWARDS.mean()).double()
    a = spread / spread.square().mean().sqrt()
    expected = (a * s**2 * (v - target).square().flatten(1).mean(1)).mean()
    close(found, of(expected, plain)[0])


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_diffusion_opd(scale):
    """The divergence of two normal transitions of one state, a mean over the elements."""
    leaf, plain = x(), x()
    loss = losses.DiffusionOPD(scale=scale).generator_loss(batch(leaf))
    t = T[:1].expand(2)
    here, there = sigma(t), sigma(S)
    teacher = (noise(5) - scored(noise(5), t)[3]) / here
    student = (noise(5) - plain) / here
    means = [noise(5) + (there - here) * v for v in (student, teacher)]
    expected = 0.5 * (means[0] - means[1]).square().mean() / (scale**2 if scale else 1)
    close(loss, expected.detach())
    close(of(loss, leaf)[0], of(expected, plain)[0])


# ---- one launch --------------------------------------------------------------------------------------------
class Launches(TorchDispatchMode):
    """Counts the calls of the op."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.rf_kernels.dmd_gradient.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("objective", sorted(losses.OBJECTIVES))
def test_a_loss_is_one_launch(objective):
    """Two for Diagonal Distillation, of frames and of their differences; none for SiD as published."""
    with Launches() as launches:
        assert gradient_in(torch.float64, objective).ne(0).any()
    assert launches.count == {"diagonal": 2, "sid": 0}.get(objective, 1)


def gradient_in(dtype, objective):
    """The gradient on x of an objective, all tensors and predictions in a dtype."""
    needed = {"adastate": {"ratio": 2.0}, "self_forcing_pp": {"window": 2}, "multi_student": {"students": 1}}
    kind = losses.OBJECTIVES[objective](**needed.get(objective, {}))
    leaf, scores = noise(0).to(dtype).requires_grad_(), Scores()
    names = ("fake", "real", "fake_uncond", "real_uncond")
    given = {n: (lambda x_t, t, n=n: scores.predict(n, x_t, t).to(x_t.dtype)) for n in names}
    given |= {n: noise(i).to(dtype) for n, i in (("noise", 1), ("clean", 3), ("entered", 5))}
    torch.manual_seed(0)
    given["discriminator"] = losses.Discriminator(SHAPE[2], width=4).to(dtype)
    kind.generator_loss(batch(leaf, **given, draw=lambda name: noise(len(name)).to(dtype))).backward()
    assert leaf.grad.dtype == dtype
    return leaf.grad.double()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("objective", sorted(losses.OBJECTIVES))
def test_a_loss_in_the_dtypes_of_training(objective, dtype, error):
    exact = gradient_in(torch.float64, objective)
    assert (gradient_in(dtype, objective) - exact).norm() <= error * exact.norm()


# ---- configuration -----------------------------------------------------------------------------------------
OPTIONS = {
    "dmd2": {"guidance_scale": 1.5},
    "anyflow": {"dmd_weight": 2.0},
    "tmd": {"eps": 1e-3},
    "phased_dmd": {"normalize": False},
    "tdm": {"huber": 0.0, "largest": 0.01},
    "adastate": {"ratio": 5.0},
    "awm": {"weighting": "t2", "clip_advantage": 0.5},
    "diagonal": {"motion": 0.2},
    "f_distill": {"divergence": "kl", "gan_weight": 0.1},
    "diffusion_opd": {"scale": 0.3},
    "hallo_live": {"standardize": True, "decoupled": True},
    "multi_student": {"student": 1},
    "self_forcing_pp": {"window": 5},
    "stream_r1": {"floor": 0.9, "temporal_floor": 0.9},
    "sid": {"alpha": 1.2},
    "sid_lsg": {"alpha": 1.2},
}


#: Options without which an objective is not complete, or does not fit six frames.
NEEDED = {"adastate": {"ratio": 2.0}, "self_forcing_pp": {"window": 3}}


@pytest.fixture(scope="module")
def stage():
    """A run's networks, of a flow that is not 0: one for all objectives, its weights put back each time."""
    draws = Draws(3)
    distill = replace(DISTILL.distill, critic_steps=1, objective="f_distill")  # with every network there is
    config = replace(DISTILL, distill=distill)
    stage = loop.DistillStage(config, WorldSource(draws), draws, reward=rewards.FrameDifference())
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
    figures = stage(objective, NEEDED.get(objective, {}))
    for name, value in OPTIONS.get(objective, {}).items():  # each option is used
        assert stage(objective, {name: value}) != figures


def test_options_are_set_on_the_command_line():
    given = changed(DISTILL, ["distill.objective=tdm", "distill.options.huber=0.5"])
    assert given.distill.build_objective() == losses.TDM(huber=0.5)


def test_saliency_asks_for_a_reward_with_a_gradient(tmp_path):
    """By the keys of a file: one reward has a gradient, the other none."""
    pytest.importorskip("cv2")
    distill = replace(DISTILL.distill, objective="stream_r1", critic_steps=1)
    config = replace(DISTILL, steps=1, distill=distill)
    with pytest.raises(rf.ArgumentError, match="OpticalFlowDynamics.*gradient"):
        train(config, tmp_path / "flow")
    train(replace(config, reward=RewardConfig("frame_difference")), tmp_path / "difference")


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
        ({"objective": "adastate"}, r"options\.ratio.*a value"),
        ({"objective": "awm", "options": {"weighting": "snr"}}, "AWM.*weighting.*uniform"),
        ({"objective": "multi_student", "options": {"student": 2}}, "student.*students"),
    ],
)
def test_a_wrong_objective_is_refused_by_key(values, text):
    with pytest.raises(rf.ArgumentError, match=text):
        build(DistillConfig, values, "distill.")
