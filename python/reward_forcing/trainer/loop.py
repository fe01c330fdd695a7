"""A training run: build the stage, resume, step, log, save."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from .. import rewards
from .._check import expect
from ..checkpoint import CheckpointError, check_state, read_checkpoint
from ..config import ModelConfig
from ..losses import Discriminator
from ..models import BidirectionalWanModel, CausalWanModel
from ..models.blocks import WanTransformer
from ..models.head_parallel import parallelize_heads
from ..pipeline import StreamingPipeline
from . import checkpoint
from .average import WeightAverage
from .config import OptimizerConfig, TrainConfig
from .data import Source, WorldSource, read_prompts
from .distributed import (
    ElsewhereError,
    fill,
    full,
    heads_mesh,
    on_gpus,
    process_group,
    rank,
    shard,
    together,
    world_size,
)
from .draws import Draws
from .rollout import Rollout
from .samples import write_sample
from .stages import Distillation, FlowMatching, TeacherForcing, TrajectoryRegression
from .step import Stepper, StepReport
from .teacher_forcing import TeacherForcedWan

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Trained:
    """One network that trains: its optimizer and, if it is kept, the average of its weights."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, average: float | None = None):
        self.model, self.stepper = model, Stepper(model, config, steps)
        self.average = None if average is None else WeightAverage(model, average)

    def step(self, micro_steps) -> StepReport:
        report = self.stepper(micro_steps)
        if self.average is not None and report.applied:
            self.average.update(self.model)
        return report

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.stepper.optimizer, options=_FLAT)
        average = {} if self.average is None else self.average.state_dict()
        return {"model": model, "optimizer": optimizer, "average": average, "counts": self.stepper.counts()}

    def restore(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.stepper.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_FLAT,
        )
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.stepper.restore(state["counts"])


class Stage(Protocol):
    """A stage as the loop sees it."""

    networks: dict[str, Trained]

    def step(self, step: int) -> dict[str, float]: ...


class RegressionStage:
    """A stage of one network and one loss: flow matching of the teacher, teacher forcing or ODE regression of
    the student.
    """

    def __init__(self, config: TrainConfig, source: Source, draws: Draws):
        self.config = config
        self.name = "teacher" if config.stage == "teacher" else "generator"
        if config.stage == "teacher":
            model = _network(BidirectionalWanModel, config.teacher, config)
            self.work = FlowMatching(config, model, source, draws)
        else:
            model = _network(TeacherForcedWan, config.generator or config.teacher, config)
            self.work = TeacherForcing(config, model, source, draws)
        if config.stage == "ode":
            teacher = _teacher(config)
            self.work = TrajectoryRegression(config, model, teacher, source, draws)
        self.networks = {self.name: Trained(model, config.optimizer, config.steps, config.ema)}

    def step(self, step: int) -> dict[str, float]:
        micro = _micro_steps(self.config, lambda samples: self.work.loss(step, samples), True)
        return _figures(self.name, self.networks[self.name].step(micro))


class DistillStage:
    """Distillation: ``critic_steps`` of the critic (and of a discriminator), then one of the generator."""

    def __init__(
        self, config: TrainConfig, source: Source, draws: Draws, reward: rewards.Reward | None = None
    ):
        self.config = config
        teacher = _teacher(config)
        start = config.critic or ("" if config.teacher_model else config.teacher)
        critic = _network(BidirectionalWanModel, start, config)
        generator = _network(CausalWanModel, config.generator, config)
        if config.distill.build_objective().needs_reward and reward is None:
            reward = _reward(config, draws)
        # Sharded parameters are float32 whatever the blocks compute in.
        heads = config.model.num_heads // config.head_parallel
        cache = {"dtype": getattr(torch, config.compute), "heads": heads}
        rollout = Rollout(StreamingPipeline(generator, config.stream), cache=cache)
        distill, discriminator = config.distill, None
        if distill.build_objective().needs_discriminator:
            torch.manual_seed(config.seed)
            discriminator = shard(Discriminator(config.model.out_dim))
        self.distillation = Distillation(
            config, rollout, teacher, critic, source, draws, reward, discriminator
        )
        self.networks = {
            "generator": Trained(generator, config.optimizer, config.steps, config.ema),
            "critic": Trained(critic, distill.critic, config.steps * distill.critic_steps),
        }
        if discriminator is not None:
            steps = config.steps * distill.critic_steps
            self.networks["discriminator"] = Trained(discriminator, distill.critic, steps)

    def step(self, step: int) -> dict[str, float]:
        work, figures = self.distillation, {}
        for turn in range(self.config.distill.critic_steps):
            micro = _micro_steps(self.config, lambda s, turn=turn: work.critic_loss(step, s, turn), True)
            figures |= _figures("critic", self.networks["critic"].step(micro))
            if work.objective.needs_discriminator:
                micro = _micro_steps(
                    self.config, lambda s, turn=turn: work.discriminator_loss(step, s, turn), True
                )
                figures |= _figures("discriminator", self.networks["discriminator"].step(micro))
        micro = _micro_steps(self.config, lambda s: work.generator_loss(step, s), False)
        return figures | _figures("generator", self.networks["generator"].step(micro))


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    source: Source | None = None,
    on_step: Callable[[int, dict], None] | None = None,
) -> Path:
    """Run a stage to its end, resuming from the newest checkpoint under ``out``.

    Writes ``config.json``, one JSON line a step to ``log.jsonl``, checkpoints, and at the end the averaged
    weights as ``<network>.safetensors`` in bfloat16, under published names.

    Returns:
        the path of those weights.
    Raises:
        StoppedOnNonFinite: three steps in a row were not finite; the state before them is saved.
    """
    grouped = config.compute == "float32" or dist.is_initialized()
    expect(grouped, "train", "config.compute", "'float32' without a process group", repr(config.compute))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    draws = Draws(config.seed, "cuda" if on_gpus() else "cpu")
    build = DistillStage if config.stage == "distill" else RegressionStage
    source = source or _source(config, draws)
    stage = build(config, source, draws)
    first = _resume(stage, out)
    if rank() == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    with _log(out / "log.jsonl", first) as log, _board(out / "tensorboard") as board:
        for step in range(first, config.steps):
            begun = time.perf_counter()
            try:
                figures = stage.step(step)
            except ArithmeticError as stopped:
                _write(log, {"step": step + 1, "stopped": str(stopped)})
                _save(stage, out, step)
                raise
            line = {"step": step + 1, "seconds": time.perf_counter() - begun} | figures
            _write(log, line)
            board(step + 1, figures)
            if on_step is not None:
                on_step(step, line)
            if config.sample_every and (step + 1) % config.sample_every == 0:
                weights = averaged(stage)  # collective: every rank gathers
                if rank() == 0:
                    write_sample(config, weights, source, out / "samples" / f"{step + 1:08d}.mp4")
            if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < config.steps:
                _save(stage, out, step + 1)
    _save(stage, out, config.steps)
    return _export(stage, out)


def run(config: TrainConfig, out: str | Path) -> Path:
    """``train`` as the command line does: in the process group of a ``torchrun`` launch, with a progress bar
    on rank 0.
    """
    from tqdm import tqdm

    with process_group(alone=config.compute != "float32" or torch.cuda.is_available()):
        with tqdm(total=config.steps, unit="step", disable=rank() != 0 or None) as bar:

            def show(step: int, line: dict) -> None:
                bar.n = step + 1
                bar.set_postfix({k: f"{v:.4g}" for k, v in line.items() if k.endswith("loss")})

            return train(config, out, on_step=show)


# ---- parts -------------------------------------------------------------------------------------------------
def _micro_steps(config: TrainConfig, loss: Callable[[list[int]], Tensor], backward: bool):
    """The micro-steps of one optimizer step: each takes its own part of the step's global sample indices."""
    shares = max(1, world_size() // config.head_parallel)
    expect(
        config.batch % shares == 0,
        "TrainConfig",
        "batch",
        f"a multiple of {shares}, the ranks by head_parallel",
        config.batch,
    )
    mine = config.batch // shares
    for micro in range(config.accumulate):
        first = micro * config.batch + rank() // config.head_parallel * mine
        samples = list(range(first, first + mine))

        def run(samples=samples):
            value = loss(samples)
            if backward:
                value.backward()
            return value

        yield run


def _figures(name: str, report: StepReport) -> dict:
    values = {f"{name}_loss": report.loss, f"{name}_grad_norm": report.grad_norm}
    return values if report.applied else values | {f"{name}_skipped": report.skipped}


def _network(
    kind: type[WanTransformer],
    path: str,
    config: TrainConfig,
    sizes: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> WanTransformer:
    """A network, from a checkpoint or from the run's seed, its parameters kept in ``dtype``. All kinds have
    the same parameters."""
    torch.manual_seed(config.seed)
    with torch.device("meta" if path else "cpu"):  # no memory for what a checkpoint replaces
        model = kind(sizes or config.model)
    model.checkpointing = config.checkpointing
    if path:
        state = _weights(model, path)
    else:  # the output starts at zero: a random flow would have to be unlearnt first
        nn.init.zeros_(model.head.head.weight)
        nn.init.zeros_(model.head.head.bias)
    if config.head_parallel > 1:
        parallelize_heads(model, heads_mesh(config.head_parallel))
    model = shard(model.to(dtype), getattr(torch, config.compute))
    if path:
        fill(model, state)
    return model


def _weights(model: WanTransformer, path: str) -> dict[str, Tensor]:
    """The weights of a checkpoint that fits the model, on rank 0; nothing on the other ranks."""
    state = {}

    def read():
        if rank() == 0:
            state.update(read_checkpoint(path))
            check_state(state, model, path)

    error = together(read)
    if isinstance(error, ElsewhereError):
        raise CheckpointError(f"{path}: rank 0 could not read it") from error
    if error is not None:
        raise error
    return state


def _source(config: TrainConfig, draws: Draws) -> Source:
    if config.wan is None:
        return WorldSource(draws, read_prompts(config.prompts))
    from .wan_data import WanSource  # needs an extra

    return WanSource(config, draws)


def _reward(config: TrainConfig, draws: Draws) -> rewards.Reward:
    reward = config.reward
    if reward.name == "optical_flow":
        return rewards.OpticalFlowDynamics()
    if reward.name == "frame_difference":
        return rewards.FrameDifference()
    from ..rewards.videoalign import VideoAlign  # needs an extra

    place = {"dtype": getattr(torch, config.compute), "device": draws.device}
    options = {"sampling": reward.sampling, "video_fps": reward.video_fps}
    return VideoAlign(reward.checkpoint, reward.base, **options, **place)


def _teacher(config: TrainConfig) -> BidirectionalWanModel:
    """It never trains, so it is kept in what it computes in."""
    dtype = getattr(torch, config.compute)
    return _network(BidirectionalWanModel, config.teacher, config, config.teacher_model, dtype)


def _state(stage: Stage) -> dict:
    return {name: network.state() for name, network in stage.networks.items()}


def _save(stage: Stage, out: Path, step: int) -> None:
    checkpoint.save({"step": step, "networks": _state(stage)}, out, step)


def _resume(stage: Stage, out: Path) -> int:
    path = checkpoint.newest(out)
    if path is None:
        return 0
    state = {"step": 0, "networks": _state(stage)}
    checkpoint.load(state, path)
    for name, network in stage.networks.items():
        network.restore(state["networks"][name])
    return state["step"]


def _log(path: Path, first: int):
    """The log, cut back to the step that is resumed from: a line stands once for every step."""
    if rank() != 0:
        return open(os.devnull, "w")
    kept = []
    if path.exists():
        whole = path.read_text().rpartition("\n")[0]  # a killed run may leave half a line
        kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= first]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


@contextmanager
def _board(path: Path):
    """``board(step, figures)`` for TensorBoard, if it is installed; else one that does nothing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    if SummaryWriter is None or rank() != 0:
        yield lambda step, figures: None
        return
    with SummaryWriter(str(path)) as writer:
        yield lambda step, figures: [writer.add_scalar(k, v, step) for k, v in figures.items()]


def _write(log, line: dict) -> None:
    """One line of strict JSON: what is not finite is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    try:
        log.write(json.dumps(finite) + "\n")
        log.flush()
    except OSError as error:
        raise OSError(f"{log.name}: {error}") from error


def averaged(stage: Stage) -> dict[str, Tensor]:
    """The whole averaged weights of the network that trains, in float32. A collective call."""
    network = next(iter(stage.networks.values()))
    return {key: full(t) for key, t in network.average.weights.items()}


def _export(stage: Stage, out: Path) -> Path:
    from safetensors.torch import save_file

    name = next(iter(stage.networks))
    weights = {key: t.to(torch.bfloat16).contiguous() for key, t in averaged(stage).items()}
    target = out / f"{name}.safetensors"
    if rank() != 0:
        return target
    try:
        save_file(weights, target.with_suffix(".unfinished"))
    except Exception as error:  # safetensors has an exception of its own for a full disk
        raise OSError(f"{target.name} was not written (the checkpoint was): {error}") from error
    target.with_suffix(".unfinished").rename(target)
    return target
