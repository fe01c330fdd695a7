"""What a training run is: frozen dataclasses, read from YAML. Unknown keys are refused with the nearest known
one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import losses
from .._check import expect
from ..config import ModelConfig, StreamConfig

STAGES = ("teacher", "causal", "ode", "distill")
COMPUTE = ("float32", "bfloat16")
REWARDS = ("optical_flow", "videoalign", "frame_difference")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate.
        betas, weight_decay: of AdamW.
        warmup: steps of linear warm-up.
        schedule: "constant", or "cosine" down to 3% of ``lr`` at the last step.
        clip: largest norm of all gradients together; 0 does not clip.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: str = "constant"
    clip: float = 1.0

    def __post_init__(self):
        expect(self.lr > 0, "OptimizerConfig", "lr", "above 0", self.lr)
        inside = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        expect(inside, "OptimizerConfig", "betas", "two numbers in [0, 1)", self.betas)
        known = self.schedule in ("constant", "cosine")
        expect(known, "OptimizerConfig", "schedule", "'constant' or 'cosine'", self.schedule)
        for name in ("weight_decay", "warmup", "clip"):
            expect(getattr(self, name) >= 0, "OptimizerConfig", name, "at least 0", getattr(self, name))


@dataclass(frozen=True)
class DistillConfig:
    """Distribution matching.

    Args:
        objective: a name of ``losses.OBJECTIVES`` (docs/losses.md).
        options: the objective's own fields.
        beta: of weights exp(beta reward) (arXiv 2512.04678 eq. 11).
        shuffle_rewards: a control of such weights: every sample takes the reward of another sample of its
            micro-step.
        real_guidance, fake_guidance: scale s of ``c + s (c - u)``; 0 is none.
        critic: the critic's optimizer.
        critic_steps: critic steps per generator step.
        shift: of the timesteps that scores are taken at.
        min_step, max_step: ends that those timesteps are clamped to.
        same_exit: every chunk of a clip leaves at the same step, as published; False draws one per chunk.
        grad_chunks: how many chunks, counted from the last, get gradient; 0 is all of them.
    """

    objective: str = "re_dmd"
    options: dict = field(default_factory=dict)
    beta: float = 2.0
    shuffle_rewards: bool = False
    real_guidance: float = 3.0
    fake_guidance: float = 0.0
    critic: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_steps: int = 5
    shift: float = 5.0
    min_step: float = 20.0
    max_step: float = 980.0
    same_exit: bool = True
    grad_chunks: int = 0

    def __post_init__(self):
        known = list(losses.OBJECTIVES)
        near = difflib.get_close_matches(self.objective, known, n=1, cutoff=0.0)
        wanted = f"one of {known} (nearest: {near[0]})"
        expect(self.objective in known, "DistillConfig", "objective", wanted, repr(self.objective))
        objective = self.build_objective()
        fits = self.same_exit or not objective.needs_same_exit
        expect(fits, "DistillConfig", "same_exit", f"True for the objective {self.objective}", self.same_exit)
        expect(self.critic_steps >= 1, "DistillConfig", "critic_steps", "at least 1", self.critic_steps)
        expect(self.grad_chunks >= 0, "DistillConfig", "grad_chunks", "at least 0", self.grad_chunks)
        ordered = 0 <= self.min_step < self.max_step
        expect(ordered, "DistillConfig", "min_step", f"in [0, max_step = {self.max_step})", self.min_step)

    def build_objective(self) -> losses.Objective:
        """The objective, with its options."""
        return build(losses.OBJECTIVES[self.objective], self.options, "distill.options.")


@dataclass(frozen=True)
class RewardConfig:
    """What Re-DMD rewards.

    Args:
        name: "optical_flow" (``rewards.OpticalFlowDynamics``), "videoalign" (motion quality,
            ``rewards.videoalign.VideoAlign``) or "frame_difference" (``rewards.FrameDifference``).
        checkpoint: of videoalign: folder of VideoReward.
        base: of videoalign: folder of Qwen2-VL-2B-Instruct.
        sampling, video_fps: of videoalign: "every_frame", or "by_rate" from clips of so many frames a second.
    """

    name: str = "optical_flow"
    checkpoint: str = ""
    base: str = ""
    sampling: str = "every_frame"
    video_fps: float = 16.0

    def __post_init__(self):
        expect(self.name in REWARDS, "RewardConfig", "name", f"one of {REWARDS}", repr(self.name))
        for name in ("checkpoint", "base"):
            given = self.name != "videoalign" or bool(getattr(self, name))
            expect(given, "RewardConfig", name, "a folder, with name: videoalign", "none")


@dataclass(frozen=True)
class WanConfig:
    """Prompts from a text file, their features by UMT5, and frames by the Wan VAE.

    Args:
        folder: with ``tokenizer/``, ``text_encoder/`` and ``vae/``, as diffusers keeps them.
        latent: rows and columns of a latent.
        negative_prompt: what guidance leads away from.
        features: folder where the features of prompts are kept once they are computed, and read from; ""
            computes them anew in every run.
    """

    folder: str
    latent: tuple[int, int] = (60, 104)
    negative_prompt: str = ""
    features: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    Args:
        stage: "teacher" (flow matching of the bidirectional model), "causal" (teacher forcing of the
            student), "ode" (regression of the student on the teacher's trajectories) or "distill"
            (distribution matching).
        model: sizes of the network that trains, and of the critic.
        teacher_model: sizes of the teacher; None: as ``model``.
        compute: "float32", or "bfloat16": matrix products and the cache in bfloat16, parameters, gradients
            and optimizers in float32.
        frames: latent frames of a training clip.
        batch: clips per micro-step, over all ranks.
        accumulate: micro-steps per optimizer step; their gradients are averaged and clipped once.
        steps: optimizer steps (of the generator, when distilling).
        seed: of every draw.
        optimizer: of the network that trains.
        ema: decay of the average of the weights, kept in float32 from the first step.
        text_dropout: share of samples trained without text, for guidance.
        context_jitter: standard deviation of the noise on the clean frames of teacher forcing.
        teacher_steps: Euler steps of a teacher's trajectory ("ode").
        stream: how the student streams, in training as in inference.
        distill: distribution matching.
        reward: of objectives that weigh clips by one ("re_dmd").
        wan: data of Wan ("distill" and "ode"); None: the embedded world.
        teacher, generator, critic: checkpoints to start from, or folders of Wan's; "" starts from random
            weights (a critic: from the teacher, if that has its size).
        head_parallel: ranks that share a sample, by tokens and, in self-attention, by heads ("teacher" and
            "distill").
        checkpointing: keep a block's input alone for backward, and compute the block again there.
        prompts: text file, one prompt a line; of the world, "" is all of its prompts.
        save_every: steps between checkpoints; 0 saves at the end alone.
        sample_every: steps between sample clips (``samples/*.mp4``, made on rank 0 from a whole copy of the
            averaged weights); 0 makes none.
    """

    stage: str
    model: ModelConfig
    teacher_model: ModelConfig | None = None
    compute: str = "float32"
    frames: int = 15
    batch: int = 16
    accumulate: int = 1
    steps: int = 1000
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: float = 0.995
    text_dropout: float = 0.12
    context_jitter: float = 0.05
    teacher_steps: int = 20
    stream: StreamConfig = field(default_factory=StreamConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    wan: WanConfig | None = None
    teacher: str = ""
    generator: str = ""
    critic: str = ""
    head_parallel: int = 1
    checkpointing: bool = False
    prompts: str = ""
    save_every: int = 0
    sample_every: int = 0

    def __post_init__(self):
        expect(self.stage in STAGES, "TrainConfig", "stage", f"one of {STAGES}", repr(self.stage))
        known = self.compute in COMPUTE
        expect(known, "TrainConfig", "compute", f"one of {COMPUTE}", repr(self.compute))
        whole = self.head_parallel == 1 or self.stage in ("teacher", "distill")
        expect(whole, "TrainConfig", "head_parallel", f"1 in the stage {self.stage}", self.head_parallel)
        for name in ("head_parallel", "frames", "batch", "accumulate", "steps", "teacher_steps"):
            expect(getattr(self, name) >= 1, "TrainConfig", name, "at least 1", getattr(self, name))
        for name in ("ema", "text_dropout"):
            expect(0 <= getattr(self, name) < 1, "TrainConfig", name, "in [0, 1)", getattr(self, name))
        for name in ("save_every", "sample_every", "context_jitter"):
            expect(getattr(self, name) >= 0, "TrainConfig", name, "at least 0", getattr(self, name))
        stream = self.stream
        plain = stream.clean_forward and not (stream.cuts or stream.rolling or stream.restart)
        expected = "clean forwards, and no cuts, rolling or restart"
        expect(plain, "TrainConfig", "stream", expected, stream)
        chunked = self.stage == "teacher" or self.frames % self.stream.chunk_frames == 0
        expect(chunked, "TrainConfig", "frames", f"a multiple of {self.stream.chunk_frames}", self.frames)


def load(path: str | Path, changes: Iterable[str] = ()) -> TrainConfig:
    """Read a YAML file: of ours, or the published one (``published.py`` says what its keys do).

    Args:
        changes: ``key=value`` or ``key.key=value``, laid over what the file says, the value as YAML.

    Raises:
        rf_kernels.ArgumentError: not YAML, an unknown key (the nearest known one is named), or a wrong value.
    """
    import yaml

    from . import published

    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        expect(False, "TrainConfig", "path", "a YAML file", f"{path}: {str(error).splitlines()[0]}")
    if published.is_published(values):
        config = published.from_published(values)
    else:
        config = build(TrainConfig, values, "")
    return changed(config, changes)


def changed(config: TrainConfig, changes: Iterable[str]) -> TrainConfig:
    """A configuration with ``key.key=value`` laid over it."""
    import yaml

    changes = list(changes)
    if not changes:
        return config
    values = dataclasses.asdict(config)
    for change in changes:
        key, given, value = change.partition("=")
        expect(bool(given), "TrainConfig", "changes", "key=value", repr(change))
        *path, last = key.split(".")
        node = values
        for part in path:
            if node.get(part) is None:  # not there, or a group that is left out
                node[part] = {}
            node = node[part]
            expect(isinstance(node, dict), "TrainConfig", key, "a key of a group", f"{part} is none")
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            expect(False, "TrainConfig", key, "a value in YAML", repr(value))
    return build(TrainConfig, values, "")


def refuse_unknown(who: str, values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raise for a key that is not among ``names``, with the nearest that is."""
    names = list(names)
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            expected = f"a known key (nearest: {near[0]})" if near else "no key: there is none"
            expect(False, who, f"{where}{key}", expected, repr(key))


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping, its fields coerced to their types (YAML reads 1e-4 as text)."""
    at = where or "the file"
    expect(isinstance(values, Mapping), cls.__name__, at, "a mapping", type(values).__name__)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    refuse_unknown(cls.__name__, values, names, where)
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    expect(not missing, cls.__name__, f"{where}{missing[0] if missing else ''}", "a value", "none")
    return cls(
        **{key: _coerce(hints[key], value, cls.__name__, f"{where}{key}") for key, value in values.items()}
    )


def _coerce(kind: Any, value: Any, who: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        expect(isinstance(value, list | tuple), who, name, "a list", repr(value))
        kinds = typing.get_args(kind)
        kinds = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
        expect(len(kinds) == len(value), who, name, f"{len(kinds)} values", repr(value))
        return tuple(_coerce(k, v, who, name) for k, v in zip(kinds, value, strict=True))
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
        return _coerce(kind, value, who, name)
    right = type(value) is kind or (kind is float and type(value) is int)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    expect(right, who, name, f"a value of type {kind.__name__}", repr(value))
    return kind(value)
