"""What one micro-step of each stage computes. A stage owns no optimizer: it returns losses and leaves
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import rf_kernels as rf

from .. import losses, rewards
from .._check import expect
from ..models import BidirectionalWanModel
from ..scheduler import FlowMatchScheduler
from .config import TrainConfig
from .data import Source
from .draws import Draws
from .rollout import Rollout, Tape
from .teacher_forcing import TeacherForcedWan


@torch.no_grad()
def sample_teacher(
    model: BidirectionalWanModel,
    noise: Tensor,
    context: Tensor,
    uncond: Tensor,
    *,
    shift: float,
    steps: int,
    guidance: float,
) -> tuple[Tensor, Tensor]:
    """Whole clips by Euler steps on the teacher's flow, with guidance ``c + s (c - u)``.

    Returns:
        states ``[steps + 1, B, F, C, H, W]`` from the noise to the clip, and their sigmas ``[steps + 1]``,
        from 1 to 0.
    """
    s = torch.linspace(1, 0, steps + 1)
    sigmas = shift * s / (1 + (shift - 1) * s)
    states = [noise]
    for here, there in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x, t = states[-1], torch.full((noise.shape[0],), 1000 * here, device=noise.device)
        flow = predict_flow(model, x, t, context)
        if guidance:
            flow = flow + guidance * (flow - predict_flow(model, x, t, uncond))
        states.append(x + (there - here) * flow)
    return torch.stack(states), sigmas


def predict_flow(model: BidirectionalWanModel, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Flow of whole clips ``[B, F, C, H, W]`` for text features ``[B, n, text_dim]``."""
    return model(x_t.transpose(1, 2), t, context).transpose(1, 2)


class Scores:
    """A bidirectional model as the scorers of ``reward_forcing.losses``, for one batch of prompts."""

    def __init__(
        self, model: BidirectionalWanModel, scheduler: FlowMatchScheduler, context: Tensor, uncond: Tensor
    ):
        self.model, self.scheduler, self._features = model, scheduler, {"cond": context, "uncond": uncond}

    def _x0(self, kind: str, x_t: Tensor, t: Tensor) -> Tensor:
        flow = predict_flow(self.model, x_t, t, self._features[kind])
        return self.scheduler.x0_from_flow(flow, x_t, t)

    def cond(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._x0("cond", x_t, t)

    def uncond(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._x0("uncond", x_t, t)


def timesteps(
    draws: Draws,
    purpose: str,
    step: int,
    samples: Sequence[int],
    *,
    shift: float,
    low: float = 0.0,
    high: float = 1000.0,
    **options,
) -> Tensor:
    """One training timestep a sample, by counter, in [low, high): see ``losses.warp_timesteps``."""
    n = torch.tensor(draws.integers(purpose, step, 1000, samples), device=draws.device)
    first, end = (t / (shift - (shift - 1) * t / 1000) for t in (low, high))  # the shift takes them there
    return losses.warp_timesteps(first + (end - first) / 1000 * n, shift=shift, **options)


class _OnClips:
    """What the stages share that train by flow matching on whole clips."""

    def __init__(
        self,
        config: TrainConfig,
        model: BidirectionalWanModel | TeacherForcedWan,
        source: Source,
        draws: Draws,
    ):
        self.config, self.model, self.source, self.draws = config, model, source, draws
        self.scheduler = FlowMatchScheduler(config.stream.shift).to(draws.device)

    def clips(self, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clips, and the features of their prompts: zeros for a share of the samples."""
        x0, prompts = self.source.clips(step, samples, self.config.frames)
        keep = self.draws.uniform("text dropout", step, samples) >= self.config.text_dropout
        return x0, self.source.embed(prompts) * keep[:, None, None]


class FlowMatching(_OnClips):
    """Flow matching of the bidirectional teacher: ``mean |v(x_t, t, text) - (noise - x0)|^2``, t uniform and
    then warped by the stream's shift, text left out for a share of the samples."""

    def loss(self, step: int, samples: Sequence[int]) -> Tensor:
        config, draws = self.config, self.draws
        x0, context = self.clips(step, samples)
        t = timesteps(draws, "timestep", step, samples, shift=config.stream.shift, min_step=0, max_step=1000)
        noise = draws.normal("noise", step, samples, x0.shape[1:])
        x_t = self.scheduler.add_noise(x0, noise, t)
        flow = predict_flow(self.model, x_t, t, context)
        return (flow - self.scheduler.training_target(x0, noise)).square().mean()


class TeacherForcing(_OnClips):
    """Flow matching of the causal student on whole clips, each chunk at a noise level of its own, given the
    clean frames before it (with a little noise on them, so that it learns to bear its own mistakes)."""

    def loss(self, step: int, samples: Sequence[int]) -> Tensor:
        config, draws = self.config, self.draws
        x0, context = self.clips(step, samples)
        chunks = config.frames // config.stream.chunk_frames
        per_chunk = [
            timesteps(
                draws, f"timestep {c}", step, samples, shift=config.stream.shift, min_step=0, max_step=1000
            )
            for c in range(chunks)
        ]
        t = torch.stack(per_chunk, dim=1).repeat_interleave(config.stream.chunk_frames, dim=1)
        noise = draws.normal("noise", step, samples, x0.shape[1:])
        x_t = self.scheduler.add_noise(x0, noise, t)
        clean = x0 + config.context_jitter * draws.normal("context", step, samples, x0.shape[1:])
        flow = _forced_flow(self.model, clean, x_t, t, context, config)
        return (flow - self.scheduler.training_target(x0, noise)).square().mean()


class TrajectoryRegression:
    """ODE regression (CausVid, arXiv 2412.07772): the student maps a state of the teacher's sampling
    trajectory, at one of its own denoising steps, to the trajectory's end: ``mean |x0 - teacher's
    clip|^2``."""

    def __init__(
        self,
        config: TrainConfig,
        model: TeacherForcedWan,
        teacher: BidirectionalWanModel,
        source: Source,
        draws: Draws,
    ):
        self.config, self.model, self.teacher = config, model, teacher.requires_grad_(False)
        self.source, self.draws = source, draws
        self.scheduler = FlowMatchScheduler(config.stream.shift).to(draws.device)
        stream = config.stream
        steps = list(stream.denoising_step_list)
        self.timesteps = self.scheduler.warp(steps) if stream.warp else [float(t) for t in steps]

    def loss(self, step: int, samples: Sequence[int]) -> Tensor:
        config, draws, stream = self.config, self.draws, self.config.stream
        prompts = self.source.prompts(step, samples)
        context, uncond = self.source.embed(prompts), self.source.no_text(len(prompts))
        noise = draws.normal("noise", step, samples, (config.frames, *self.source.latent_shape))
        states, sigmas = sample_teacher(
            self.teacher,
            noise,
            context,
            uncond,
            shift=stream.shift,
            steps=config.teacher_steps,
            guidance=config.distill.real_guidance,
        )
        # The trajectory's state nearest to each denoising step, at the state's own noise level.
        sigmas = sigmas.to(noise.device)
        steps = torch.tensor(self.timesteps, device=noise.device)
        nearest = (sigmas[None] - steps[:, None] / 1000).abs().argmin(dim=1)
        chunks = config.frames // stream.chunk_frames
        drawn = [draws.integers(f"step {c}", step, len(self.timesteps), samples) for c in range(chunks)]
        picks = nearest[torch.tensor(drawn, device=noise.device).T]
        picks = picks.repeat_interleave(stream.chunk_frames, dim=1)  # [B, F]
        rows, frames = (torch.arange(n, device=noise.device) for n in (len(samples), config.frames))
        x_t = states[picks, rows[:, None], frames]
        sigma, clip = sigmas[picks], states[-1]
        flow = _forced_flow(self.model, clip, x_t, 1000 * sigma, context, config)
        x0 = x_t - sigma[..., None, None, None] * flow
        return (x0 - clip).square().mean()


def _forced_flow(
    model: TeacherForcedWan, clean: Tensor, x_t: Tensor, t: Tensor, context: Tensor, config: TrainConfig
) -> Tensor:
    at = float(config.stream.context_noise)
    return model(clean.transpose(1, 2), x_t.transpose(1, 2), t, context, config.stream, at).transpose(1, 2)


class Distillation:
    """Distribution matching of a streaming student against a frozen teacher, with a critic that follows the
    student's distribution, by an objective of ``losses.OBJECTIVES``.

    Args:
        rollout: of the student.
        teacher, critic: bidirectional models; the teacher is never trained.
        reward, discriminator: for the objectives that need one; None elsewhere.
    """

    def __init__(
        self,
        config: TrainConfig,
        rollout: Rollout,
        teacher: BidirectionalWanModel,
        critic: BidirectionalWanModel,
        source: Source,
        draws: Draws,
        reward: rewards.Reward | None = None,
        discriminator: losses.Discriminator | None = None,
    ):
        self.config, self.rollout, self.source, self.draws = config, rollout, source, draws
        self.teacher, self.critic, self.reward = teacher.requires_grad_(False), critic, reward
        self.objective = config.distill.build_objective()
        self.discriminator = discriminator
        self.scheduler = rollout.pipeline.scheduler

    def roll(self, step: int, samples: Sequence[int], purpose: str) -> tuple[Tape, list[str], Tensor]:
        """A rollout without gradient on the noise of a step, its prompts, and their features."""
        config, draws = self.config, self.draws
        prompts = self.source.prompts(step, samples)
        shape = (config.frames, *self.source.latent_shape)
        noise = draws.normal(f"{purpose} noise", step, samples, shape)

        def renoise(name: str, chunk: int, like: Tensor) -> Tensor:
            return draws.normal(f"{purpose} {name}, chunk {chunk}", step, samples, like.shape[1:])

        exits = self._exits(step, purpose)
        context = self.source.embed(prompts)
        return self.rollout.generate(noise, context, exits, renoise), prompts, context

    def _exits(self, step: int, purpose: str) -> list[int]:
        """Denoising steps at which the chunks leave: the same for all samples of the batch, on every rank."""
        config = self.config
        chunks, steps = config.frames // config.stream.chunk_frames, len(self.rollout.pipeline.timesteps)
        if config.distill.same_exit:
            return self.draws.integers(f"{purpose} exit", step, steps, [0]) * chunks
        return self.draws.integers(f"{purpose} exit", step, steps, range(chunks))

    def _options(self) -> dict:
        distill = self.config.distill
        return {"shift": distill.shift, "min_step": distill.min_step, "max_step": distill.max_step}

    def generator_loss(self, step: int, samples: Sequence[int]) -> Tensor:
        """One generator micro-step: rollout, gradient on x, replay. Gradients are added to the student's
        parameters.
        """
        tape, prompts, context = self.roll(step, samples, "generator")
        clean = tape.x
        if self.objective.revisits:
            noise = self.draws.normal("generator revisit noise", step, samples, clean.shape[1:])
            tape = self.rollout.revisit(tape, context, noise)
        x = tape.x.requires_grad_(True)
        self._finite = torch.isfinite(x.detach()).all()
        batch = self._batch(step, samples, "generator", x, tape, prompts, context, clean)
        loss = self.objective.generator_loss(batch)
        (gradient,) = torch.autograd.grad(loss, x)
        # The losses drop a sample that is not finite. In training the step must not pass for a good one; the
        # replay still runs, as the other ranks are in it too.
        loss = torch.where(self._finite, loss.detach(), float("nan"))
        last, count = self.config.distill.grad_chunks, len(tape.entries)
        chunks = None if last == 0 else range(max(0, count - last), count)
        self.rollout.replay(tape, context, gradient, chunks=chunks)
        return loss

    def _batch(
        self,
        step: int,
        samples: Sequence[int],
        purpose: str,
        x: Tensor,
        tape: Tape,
        prompts: list[str],
        context: Tensor,
        clean: Tensor,
    ) -> losses.Batch:
        """What the objective is given for x, the tape's, and ``clean``, the finished rollout."""
        config, draws, distill = self.config, self.draws, self.config.distill
        uncond = self.source.no_text(len(prompts))
        teacher = Scores(self.teacher, self.scheduler, context, uncond)
        critic = Scores(self.critic, self.scheduler, context, uncond)
        scores = {"fake": critic.cond, "fake_uncond": critic.uncond}
        if purpose == "generator":
            scores |= {"real": teacher.cond, "real_uncond": teacher.uncond}
            scores = {name: self._watched(scorer) for name, scorer in scores.items()}

        def draw(name: str) -> Tensor:
            return draws.normal(f"{purpose} {name} noise", step, samples, x.shape[1:])

        def times(name: str, low: float = 0.0, high: float = 1000.0) -> Tensor:
            ends = {"low": low, "high": high}
            return timesteps(draws, f"{purpose} {name}", step, samples, **ends, **self._options())

        exits = {entry.exit_step for entry in tape.entries}
        (left,) = exits if len(exits) == 1 else (None,)
        ladder = [*self.rollout.pipeline.timesteps, 0.0]
        entered_t = [ladder[entry.exit_step] for entry in tape.entries for _ in range(entry.z.shape[1])]
        return losses.Batch(
            x=x,
            noise=draw("score"),
            t=times("timestep"),
            scheduler=self.scheduler,
            entered=torch.cat([entry.z for entry in tape.entries], dim=1),
            entered_t=torch.tensor(entered_t, device=x.device),
            clean=clean,
            exit_t=None if left is None else ladder[left],
            next_t=None if left is None else ladder[left + 1],
            draw=draw,
            timesteps=times,
            uniform=lambda name: draws.integers(f"{purpose} {name}", step, 1 << 24, [0])[0] / (1 << 24),
            prompts=prompts,
            clips=lambda: self.source.clips(step, samples, config.frames)[0],
            real_guidance=distill.real_guidance,
            fake_guidance=distill.fake_guidance,
            beta=distill.beta,
            rewards=lambda: self._rewards(clean, prompts),
            saliency=lambda: self._saliency(clean, prompts),
            discriminator=self.discriminator,
            **scores,
        )

    def _rewards(self, x: Tensor, prompts: list[str]) -> Tensor:
        """The reward of finished clips, ``[B]``; its weight is counted into ``_finite``."""
        reward = rewards.scores(self.reward, self.source.decode(x), prompts).to(x.device)
        if self.config.distill.shuffle_rewards:
            expect(len(reward) > 1, "DistillConfig", "shuffle_rewards", "two samples a rank or more", 1)
            reward = reward.roll(1)
        weight = rf.reward_weight(reward, self.config.distill.beta)
        self._finite = self._finite & torch.isfinite(weight).all()
        return reward

    def _saliency(self, x: Tensor, prompts: list[str]) -> Tensor:
        """Norm of the reward's gradient on each decoded pixel, averaged on the grid of x."""
        with torch.enable_grad():
            frames = self.source.decode(x).detach().requires_grad_(True)
            total = self.reward(frames, prompts).sum()
            name = type(self.reward).__name__
            expect(total.requires_grad, name, "scores", "a reward that has a gradient", "one without")
            (gradient,) = torch.autograd.grad(total, frames)
        size = (x.shape[1], *x.shape[3:])
        return F.adaptive_avg_pool3d(gradient.norm(dim=2), size).to(x.device)

    def _watched(self, scorer: losses.Scorer) -> losses.Scorer:
        """The scorer, its predictions counted into ``_finite``."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            prediction = scorer(x_t, t)
            self._finite = self._finite & torch.isfinite(prediction.detach()).all()
            return prediction

        return predict

    def _rolled(self, step: int, samples: Sequence[int], purpose: str) -> losses.Batch:
        """What an objective is given for a rollout as it is."""
        tape, prompts, context = self.roll(step, samples, purpose)
        return self._batch(step, samples, purpose, tape.x, tape, prompts, context, tape.x)

    def critic_loss(self, step: int, samples: Sequence[int], turn: int) -> Tensor:
        """One critic micro-step: flow matching on the student's own clips. ``turn`` counts the critic's steps
        within the generator's step."""
        return self.objective.critic_loss(self._rolled(step, samples, f"critic {turn}"))

    def discriminator_loss(self, step: int, samples: Sequence[int], turn: int) -> Tensor:
        """One discriminator micro-step: real clips against the student's, at the critic's draws of the same
        turn."""
        batch = self._rolled(step, samples, f"critic {turn}")
        noised = [
            self.scheduler.add_noise(clips, noise, batch.t)
            for clips, noise in ((batch.clips(), batch.draw("real")), (batch.x, batch.noise))
        ]
        return losses.discriminator_loss(*(self.discriminator(x_t, batch.t) for x_t in noised))
