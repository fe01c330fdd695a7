"""Clips of a network in training: what the numbers look like."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..film import tile, write_mp4
from ..models import BidirectionalWanModel, CausalWanModel
from ..pipeline import StreamingPipeline
from .config import TrainConfig
from .data import Source
from .draws import Draws
from .stages import sample_teacher

_COUNT = 4  # clips in one file


@torch.no_grad()
def write_sample(config: TrainConfig, weights: dict[str, Tensor], source: Source, path: Path) -> None:
    """Write four clips side by side: the teacher's by 20 steps of its flow, a student's streamed, twice as
    long as it trains on. Prompts and noise are the same at every step of the run."""
    samples, teacher = range(_COUNT), config.stage == "teacher"
    prompts = source.prompts(0, samples)
    frames = config.frames if teacher else 2 * config.frames
    noise = Draws(config.seed).normal("sample noise", 0, samples, (frames, *source.latent_shape))
    context = source.embed(prompts).cpu()  # one network of a run on GPUs, averaged and gathered on the host
    model = (BidirectionalWanModel if teacher else CausalWanModel)(config.model).requires_grad_(False)
    model.load_state_dict(weights)
    if teacher:
        uncond = source.no_text(_COUNT).cpu()
        options = {"shift": config.stream.shift, "steps": config.teacher_steps, "guidance": 0.0}
        latents = sample_teacher(model, noise, context, uncond, **options)[0][-1]
    else:
        generator = Draws(config.seed).generator("sample steps", 0)
        latents = StreamingPipeline(model, config.stream).rollout(
            noise, context, noise_source=lambda like: torch.randn(like.shape, generator=generator)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = source.decode(latents)
    write_mp4(tile(frames[None], zoom=4 if frames.shape[-1] < 128 else 1), path)
