"""Few-step rollouts of the published path: inference (README section 5) and training (section 9).

A clip ``[B, F, C, H, W]`` is made chunk by chunk. All forwards of a chunk see the same ``current_start``; the
last one pushes the finished chunk through, only to write the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .model import CausalWanModel, RolloutCaches
from .scheduler import FlowMatchScheduler

#: ``draw(like) -> noise`` of the same shape and dtype: ``torch.randn_like``, or saved draws.
Draw = Callable[[torch.Tensor], torch.Tensor]

#: Newest latent frames of a training rollout that carry gradient.
GRADIENT_FRAMES = 21


class GeneratorCall(NamedTuple):
    """One forward of the generator, as appended to ``trace``."""

    timestep: torch.Tensor  #: ``[B, F]``, or ``[B, 1]`` in the calls of a given prefix
    noisy: torch.Tensor  #: input, ``[B, F, C, H, W]``
    flow: torch.Tensor  #: flow prediction
    x0: torch.Tensor  #: x0 prediction
    current_start: int  #: tokens before the chunk
    grad_enabled: bool


class TrainingRollout(NamedTuple):
    """Result of ``training_rollout``."""

    latents: torch.Tensor  #: ``[B, F, C, H, W]``
    denoised_timestep_from: int  #: the exit step as a nominal step
    denoised_timestep_to: int  #: the step after it as a nominal step, 0 after the last


class Generator:
    """A causal model with its scheduler and caches: ``flow, x0 = generator(noisy, timestep,
    current_frame)``."""

    def __init__(
        self,
        model: CausalWanModel,
        scheduler: FlowMatchScheduler,
        caches: RolloutCaches,
        text: torch.Tensor,
        trace: list[GeneratorCall] | None = None,
    ):
        self.model, self.scheduler, self.caches, self.text, self.trace = (
            model,
            scheduler,
            caches,
            text,
            trace,
        )

    def __call__(
        self, noisy: torch.Tensor, timestep: torch.Tensor, current_frame: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow and x0 predictions ``[B, F, C, H, W]`` for a chunk that starts at ``current_frame``; writes
        the caches."""
        latent = noisy.transpose(1, 2)
        _, rows, columns = self.model.grid(latent)
        current_start = current_frame * rows * columns
        flow = self.model(latent, timestep, self.text, self.caches, current_start).transpose(1, 2)
        per_frame = timestep.expand(noisy.shape[:2]).flatten()
        x0 = self.scheduler.x0_from_flow(flow.flatten(0, 1), noisy.flatten(0, 1), per_frame).unflatten(
            0, noisy.shape[:2]
        )
        if self.trace is not None:
            self.trace.append(
                GeneratorCall(timestep, noisy, flow, x0, current_start, torch.is_grad_enabled())
            )
        return flow, x0

    def renoise(self, x0: torch.Tensor, timestep: torch.Tensor, draw: Draw) -> torch.Tensor:
        """``add_noise`` of a chunk at one timestep; the draw is ``[B*F, C, H, W]``, batch-major."""
        flat = x0.flatten(0, 1)
        return self.scheduler.add_noise(flat, draw(flat), timestep.expand(flat.shape[0])).unflatten(
            0, x0.shape[:2]
        )


def denoising_steps(scheduler: FlowMatchScheduler, steps: list[int], warp: bool = True) -> torch.Tensor:
    """Timesteps of a nominal list, float32: the list itself, or with ``warp`` the table entries (1000, 937.5,
    833.33, 625 for 1000, 750, 500, 250 at shift 5)."""
    return scheduler.nominal_steps(steps) if warp else scheduler.timesteps.new_tensor(steps)


def chunk_sizes(frames: int, chunk_frames: int, independent_first_frame: bool) -> list[int]:
    """Frames of each chunk; with ``independent_first_frame`` the first chunk has a single frame."""
    first = [1] if independent_first_frame else []
    rest = frames - len(first)
    if rest % chunk_frames:
        raise ValueError(
            f"chunk_sizes: frames is {frames}, expected {len(first)} + a multiple of {chunk_frames}"
        )
    return first + [chunk_frames] * (rest // chunk_frames)


def inference_chunk(
    generator: Generator,
    noisy: torch.Tensor,
    steps: torch.Tensor,
    frame: int,
    *,
    context_noise: float = 0,
    draw: Draw = torch.randn_like,
) -> torch.Tensor:
    """One chunk of ``inference_rollout``, from its noise ``[B, F, C, H, W]``; ``frame``: its first frame in
    the stream."""
    shape = noisy.shape[:2]
    for index, step in enumerate(steps):
        _, x0 = generator(noisy, step.expand(shape), frame)
        if index + 1 < len(steps):
            noisy = generator.renoise(x0, steps[index + 1], draw)
    generator(x0, steps.new_full(shape, context_noise), frame)
    return x0


def inference_rollout(
    model: CausalWanModel,
    scheduler: FlowMatchScheduler,
    noise: torch.Tensor,
    text: torch.Tensor,
    caches: RolloutCaches,
    steps: torch.Tensor,
    *,
    chunk_frames: int,
    initial_latent: torch.Tensor | None = None,
    independent_first_frame: bool = False,
    context_noise: float = 0,
    draw: Draw = torch.randn_like,
    trace: list[GeneratorCall] | None = None,
) -> torch.Tensor:
    """Few-step autoregressive generation.

    Per chunk, from ``z = noise``: ``x0 = z - sigma(t) v`` for each step ``t``; between steps ``z = (1 -
    sigma(t')) x0 + sigma(t') eps`` with the next step ``t'`` and a fresh draw. Then one forward on the last
    ``x0`` at timestep ``context_noise`` to write the caches. Published quirk: no noise is added for that
    forward (the training rollout adds it).

    Args:
        noise: ``[B, F, C, H, W]``.
        text: ``[B, n, text_dim]``.
        caches: ``model.new_caches(...)``; mutated.
        steps: ``denoising_steps(...)``.
        initial_latent: clean prefix ``[B, F0, C, H, W]``, pushed through chunk by chunk at one timestep 0 for
            all frames.
        independent_first_frame: the first chunk, of the prefix if there is one, has a single frame.
        draw: called once per re-noising.
        trace: gets a ``GeneratorCall`` per forward.

    Returns:
        Latents ``[B, F0 + F, C, H, W]``.
    """
    generator = Generator(model, scheduler, caches, text, trace)
    outputs, frame = [], 0
    if initial_latent is not None:
        for size in chunk_sizes(initial_latent.shape[1], chunk_frames, independent_first_frame):
            chunk = initial_latent[:, frame : frame + size]
            generator(chunk, steps.new_zeros(chunk.shape[0], 1), frame)
            outputs.append(chunk)
            frame += size

    sizes = chunk_sizes(noise.shape[1], chunk_frames, independent_first_frame and initial_latent is None)
    for chunk_noise in noise.split(sizes, dim=1):
        outputs.append(
            inference_chunk(generator, chunk_noise, steps, frame, context_noise=context_noise, draw=draw)
        )
        frame += chunk_noise.shape[1]
    return torch.cat(outputs, dim=1)


def training_rollout(
    model: CausalWanModel,
    scheduler: FlowMatchScheduler,
    noise: torch.Tensor,
    text: torch.Tensor,
    caches: RolloutCaches,
    steps: torch.Tensor,
    *,
    chunk_frames: int,
    exit_index: int,
    independent_first_frame: bool = False,
    context_noise: float = 0,
    detach_cache: bool = False,
    gradient_frames: int = GRADIENT_FRAMES,
    draw: Draw = torch.randn_like,
    trace: list[GeneratorCall] | None = None,
) -> TrainingRollout:
    """Self-forcing rollout: every chunk leaves the denoising loop at step ``exit_index``, the only forward
    with gradient.

    Its x0 is the output of the chunk. For the caches, that x0 is re-noised, ``add_noise(x0, eps,
    context_noise)``, and pushed through at timestep ``context_noise`` without gradient. Published quirk:
    timestep 0 is looked up as the last table entry, so noise of sigma 0.004980 (shift 5) is added, which
    inference does not add.

    Published quirk, gradient leak: the no-grad forward overwrites the numbers of the cache slots, but not
    their autograd history, which is that of the exit step. A later chunk that reads the slots sends gradient
    into the keys and values of the earlier chunk's exit forward. ``detach_cache`` cuts the caches from the
    graph after each call: the clean semantics.

    The cache capacity is the number of training frames, so nothing is evicted and the sink is never averaged.

    Args:
        exit_index: into ``steps``, the same for all chunks; the published trainer draws it at random.
        gradient_frames: chunks that start before the newest ``gradient_frames`` frames run without gradient
            altogether.
        draw: per chunk called once for each step before the exit, then once for the context.

    The other arguments are those of ``inference_rollout``.
    """
    generator = Generator(model, scheduler, caches, text, trace)

    def call(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        _, x0 = generator(noisy, timestep, frame)
        if detach_cache:
            caches.detach_()
        return x0

    outputs, frame = [], 0
    for noisy in noise.split(chunk_sizes(noise.shape[1], chunk_frames, independent_first_frame), dim=1):
        shape = noisy.shape[:2]
        with torch.no_grad():
            for index in range(exit_index):
                x0 = call(noisy, steps[index].expand(shape))
                noisy = generator.renoise(x0, steps[index + 1], draw)
        with torch.set_grad_enabled(torch.is_grad_enabled() and frame >= noise.shape[1] - gradient_frames):
            x0 = call(noisy, steps[exit_index].expand(shape))
        outputs.append(x0)
        with torch.no_grad():
            context = steps.new_full((), context_noise)
            call(generator.renoise(x0, context, draw), context.expand(shape))
        frame += shape[1]

    nominal = scheduler.num_train_timesteps - scheduler.index(steps)
    after = nominal[exit_index + 1].item() if exit_index + 1 < len(steps) else 0
    return TrainingRollout(torch.cat(outputs, dim=1), nominal[exit_index].item(), after)
