"""What students of the embedded world do: streams of many prompts, one table of measures, and confidence
intervals. ``make demo`` draws the same measures over time.

A measure is read from pixels (``reward_forcing.world.measure``), so it knows nothing of the student.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import rewards, world
from ._check import expect
from .checkpoint import load_bidirectional_model, load_causal_model
from .config import StreamConfig
from .models import BidirectionalWanModel, CausalWanModel
from .pipeline import Chunk, StreamingPipeline
from .trainer import TrainConfig, load
from .trainer.draws import Draws
from .trainer.stages import sample_teacher

CONFIGS = Path(world.__file__).parent / "configs"
ASSETS = Path(__file__).parent / "assets"
ALIVE = 25.0  # pixels: a quarter of a disc
SINKS = ("none", "static", "ema:0.99", "ema:0.9")


# ---- what is evaluated -------------------------------------------------------------------------------------
def shipped(stage: str) -> tuple[Path, TrainConfig]:
    """The trained checkpoint of a stage of the embedded world, and the configuration that trained it.

    Raises:
        rf_kernels.ArgumentError: they are in the repository, not in the wheel.
    """
    path, config = ASSETS / f"{stage}.safetensors", CONFIGS / f"{stage}.yaml"
    there = path.is_file() and config.is_file()
    expect(there, "shipped", "stage", "a checkpoint in python/reward_forcing/assets (a clone)", str(path))
    return path, load(config)


def load_student(path: Path | str | None = None) -> tuple[CausalWanModel, StreamConfig]:
    """A causal student of the embedded world in float32, and the stream it was trained for."""
    found, config = shipped("distill")
    model = load_causal_model(path or found, config.model, dtype=torch.float32)
    return model.requires_grad_(False).eval(), config.stream


def load_teacher(path: Path | str | None = None) -> tuple[BidirectionalWanModel, TrainConfig]:
    """The bidirectional teacher of the embedded world in float32, and its configuration."""
    found, config = shipped("teacher")
    model = load_bidirectional_model(path or found, config.model, dtype=torch.float32)
    return model.requires_grad_(False).eval(), config


def with_sink(stream: StreamConfig, policy: str) -> StreamConfig:
    """A stream with another sink of as many attended frames, as ``policies.parse`` reads it. "NAME@S" has S
    sink frames; otherwise those of the stream, and none with "none"."""
    text, _, frames = policy.partition("@")
    expect(not frames or frames.isdigit(), "with_sink", "policy", "a number of frames behind @", repr(policy))
    count = int(frames) if frames else 0 if text == "none" else stream.sink_frames
    return dataclasses.replace(stream, sink_policy=text, sink_frames=count)


def some_prompts(count: int) -> list[world.Prompt]:
    """The prompts of the world in a fixed mixed order; after all of them the order begins anew."""
    order = torch.randperm(len(world.PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
    return [world.PROMPTS[order[i % len(order)]] for i in range(count)]


# ---- clips -------------------------------------------------------------------------------------------------
def stream_clips(
    pipeline: StreamingPipeline, prompts: Sequence[world.Prompt], *, frames: int, seed: int, cache=None
) -> Iterator[Chunk]:
    """Chunks ``[B, F, C, h, w]`` of one stream per prompt, into a cache of the pipeline's if one is given.
    The noise is a function of seed, prompt's index and frame, the same for every student and sink."""
    draws, samples, side = Draws(seed), range(len(prompts)), world.SIZE // world.PATCH
    step, channels = pipeline.config.chunk_frames, pipeline.model.config.in_dim
    expect(frames % step == 0 < frames, "stream_clips", "frames", f"a multiple of {step}", frames)
    # (chunk, how often it was noised again) of the newest chunks
    newest: deque[list[int]] = deque(maxlen=len(pipeline.config.denoising_step_list))

    def noise_chunks() -> Iterator[Tensor]:
        for index in range(frames // step):
            newest.append([index, 0])
            yield draws.normal("evaluation noise", index, samples, (step, channels, side, side))

    def renoise(like: Tensor) -> Tensor:
        parts = []
        for chunk in list(newest)[-(like.shape[1] // step) :]:
            chunk[1] += 1
            shape = (step, *like.shape[2:])
            parts.append(draws.normal(f"evaluation step {chunk[1]}", chunk[0], samples, shape))
        return torch.cat(parts, dim=1)

    text = world.embed(list(prompts))
    yield from pipeline.stream(noise_chunks(), text, noise_source=renoise, cache=cache)


def teacher_clips(
    model: BidirectionalWanModel, config: TrainConfig, prompts: Sequence[world.Prompt], seed: int, guidance
) -> Tensor:
    """Latents ``[B, F, C, h, w]`` of the teacher's clips, of the length it was trained on."""
    side, samples = world.SIZE // world.PATCH, range(len(prompts))
    shape = (config.frames, config.model.in_dim, side, side)
    states, _ = sample_teacher(
        model,
        Draws(seed).normal("teacher noise", 0, samples, shape),
        world.embed(list(prompts)),
        world.no_text(len(prompts)),
        shift=config.stream.shift,
        steps=config.teacher_steps,
        guidance=guidance,
    )
    return states[-1]


# ---- measures ----------------------------------------------------------------------------------------------
def curves(
    video: Tensor, prompts: Sequence[world.Prompt], reading: world.Reading, *, window: int = 15
) -> dict[str, Tensor]:
    """Measures of a clip ``[B, F, 3, H, W]`` over time, each ``[B, F]`` (speed: without ``window + 2``).
    ``reading`` is that of ``world.measure``."""
    saturation = reading.colour.amax(dim=-1) - reading.colour.amin(dim=-1)
    alive = reading.mass > ALIVE
    return {
        "speed": world.steady_speed(reading, window),
        "similarity to the first frame": world.similarity_to_first(video),
        "mass": reading.mass,
        "objects": reading.count.float(),
        "right colour": world.colour_right(reading, list(prompts)),
        "saturation": saturation.where(alive, torch.nan),
        "background": reading.background,
        "sharpness": reading.sharpness,
    }


def measures(
    video: Tensor, prompts: Sequence[world.Prompt], reading: world.Reading | None = None
) -> dict[str, Tensor]:
    """One number a clip for each measure, ``[B]``; NaN where there is nothing to measure.

    ``first`` and ``last`` are the first chunk's worth of frames and the last third of the clip. Drift is the
    distance between the two.
    """
    reading, prompts = reading or world.measure(video), list(prompts)
    first, last = slice(0, 3), slice(-(video.shape[1] // 3), None)
    alive = reading.mass > ALIVE
    seen = alive.float()

    def drift(values: Tensor) -> Tensor:
        return (values[:, last].mean(dim=1) - values[:, first].mean(dim=1)).abs()

    def colour(part: slice) -> Tensor:
        weight = seen[:, part, None]
        return (reading.colour[:, part] * weight).sum(dim=1) / weight.sum(dim=1)  # NaN: nothing alive

    right = world.colour_right(reading, prompts)
    return {
        "alive": seen.mean(dim=1),
        "right colour": (right * seen).sum(dim=1) / seen.sum(dim=1),
        "objects": reading.count.float().mean(dim=1),
        "mass": reading.mass.mean(dim=1),
        "speed": world.steady_speed(reading),
        "optical flow": rewards.OpticalFlowDynamics()(video, [str(p) for p in prompts]),
        "similarity to the first frame": world.similarity_to_first(video)[:, last].mean(dim=1),
        "drift of the background": drift(reading.background),
        "drift of the colour": (colour(last) - colour(first)).norm(dim=-1),
        "drift of the sharpness": drift(reading.sharpness.clamp_min(1e-6).log2()),
    }


def interval(values: Tensor) -> dict[str, float | int]:
    """Mean and half width of its 95% confidence interval, from ``[seeds, prompts]``. Prompts are the sample:
    seeds of one prompt are averaged first. NaN is left out."""
    per_prompt = values.double().nanmean(dim=0)
    per_prompt = per_prompt[~per_prompt.isnan()]
    n = len(per_prompt)
    if n == 0:
        return {"mean": math.nan, "ci95": math.nan, "n": 0}
    # Student's t at 97.5%, to 1% from 15 degrees of freedom on.
    half = (1.96 + 2.4 / (n - 1)) * float(per_prompt.std()) / math.sqrt(n) if n > 1 else math.inf
    return {"mean": float(per_prompt.mean()), "ci95": half, "n": n}


def by_speed(values: Tensor, prompts: Sequence[world.Prompt]) -> dict[str, dict]:
    """``interval`` of ``[seeds, prompts]`` for the prompts of each word of speed, and of none ("open")."""
    words = [p.speed or "open" for p in prompts]
    picks = {w: [i for i, word in enumerate(words) if word == w] for w in (*world.SPEEDS, "open")}
    return {word: interval(values[:, pick]) for word, pick in picks.items() if pick}


# ---- the tables --------------------------------------------------------------------------------------------
class Table:
    """Rows of measures, and the paired differences between rows (same prompts, same noise)."""

    def __init__(self, prompts: Sequence[world.Prompt]):
        self.prompts, self._values = list(prompts), {}

    def add(self, name: tuple[str, str], clips: Sequence[Tensor]) -> None:
        """Measure the videos of every seed, each ``[prompts, F, 3, H, W]``, as the row (checkpoint, sink)."""
        found = [measures(video, self.prompts) for video in clips]
        self._values[name] = {key: torch.stack([f[key] for f in found]) for key in found[0]}

    def rows(self) -> list[dict]:
        return [
            {
                "checkpoint": name[0],
                "sink": name[1],
                "measures": {key: interval(v) for key, v in values.items()},
                "speed by word": by_speed(values["speed"], self.prompts),
            }
            for name, values in self._values.items()
        ]

    def differences(self, row: tuple[str, str], base: tuple[str, str]) -> dict[str, dict]:
        """``row - base``, paired; ``beyond noise`` where the interval leaves 0 out."""
        found = {}
        for key, values in self._values[row].items():
            found[key] = interval(values - self._values[base][key])
            found[key]["beyond noise"] = abs(found[key]["mean"]) > found[key]["ci95"]
        return found

    def __contains__(self, name) -> bool:
        return name in self._values


def times_over_base(
    pipelines: Mapping[tuple[str, str], StreamingPipeline],
    base: tuple[str, str],
    prompts: Sequence[world.Prompt],
    frames: int,
) -> dict[tuple[str, str], float]:
    """Time of a chunk over that of ``base``, for streams that take turns chunk by chunk: the median over the
    second half of the chunks, when every window is full."""
    streams = {name: stream_clips(p, prompts, frames=frames, seed=0) for name, p in pipelines.items()}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in streams}
    step = pipelines[base].config.chunk_frames
    for _ in range(frames // step):
        for name, stream in streams.items():
            begun = time.perf_counter()
            next(stream)
            seconds[name].append(time.perf_counter() - begun)
    half = frames // step // 2
    return {
        name: statistics.median(a / b for a, b in zip(taken[half:], seconds[base][half:], strict=True))
        for name, taken in seconds.items()
    }


def evaluate(
    students: Mapping[str, Path | str],
    *,
    policies: Sequence[str] = SINKS,
    prompts: int = 64,
    seeds: int = 3,
    frames: int = 60,
    teacher: Path | str | None = None,
    guidance: float = 1.0,
    stream: Mapping | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Tables for students x sink policies, beside rendered clips and the teacher's; all numbers, for JSON.

    The first student and the sink "static" (else the first) are what the others are subtracted from. Streams
    have their cost too: the bytes of their cache, and ``times_over_base`` with 8 prompts and 90 frames.
    """
    for name, value in (("prompts", prompts), ("seeds", seeds)):
        expect(value >= 1, "evaluate", name, "at least 1", value)
    expect(
        len(students) >= 1 and len(policies) >= 1, "evaluate", "students, policies", "at least one each", 0
    )
    chosen, codec = some_prompts(prompts), world.PatchCodec.fit()
    streams = {name: load_student(path) for name, path in students.items()}  # all are read before any runs
    streams = {
        (name, policy): StreamingPipeline(
            model, with_sink(dataclasses.replace(trained, **(stream or {})), policy)
        )
        for name, (model, trained) in streams.items()
        for policy in policies
    }
    teacher_model, config = load_teacher(teacher)
    table, begun, side = Table(chosen), time.perf_counter(), world.SIZE // world.PATCH
    costs: dict[tuple[str, str], dict] = {}
    base_sink = "static" if "static" in policies else policies[0]
    base_student = next(iter(students))
    times = times_over_base(streams, (base_student, base_sink), chosen[:8], min(frames, 90))
    progress(f"times of a chunk: {time.perf_counter() - begun:.0f} s")

    def add(name: tuple[str, str], clip: Callable[[int], Tensor]) -> None:
        table.add(name, [clip(seed) for seed in range(seeds)])
        progress(f"{name[0]}, {name[1]}: {time.perf_counter() - begun:.0f} s")

    def real(seed: int) -> Tensor:
        return world.render(chosen, frames, generator=torch.Generator().manual_seed(seed))[0]

    add(("real", ""), real)
    for scale in dict.fromkeys((0.0, guidance)):
        add(
            ("teacher", f"guidance {scale:g}"),
            lambda s, g=scale: codec.decode(teacher_clips(teacher_model, config, chosen, s, g)),
        )
    for name, pipeline in streams.items():

        def clip(seed, name=name, pipeline=pipeline) -> Tensor:
            cache = pipeline.new_cache(len(chosen), side, side)
            costs[name] = {"chunk time": times[name], "cache bytes": cache.nbytes}
            chunks = stream_clips(pipeline, chosen, frames=frames, seed=seed, cache=cache)
            return codec.decode(torch.cat([chunk.latents for chunk in chunks], dim=1))

        add(name, clip)
    pairs = [(row, (row[0], base_sink)) for row in streams if row[1] != base_sink]
    pairs += [(row, (base_student, row[1])) for row in streams if row[0] != base_student]
    return {
        "settings": {
            "prompts": prompts,
            "seeds": seeds,
            "frames": frames,
            "teacher frames": config.frames,
            "students": {name: str(path) for name, path in students.items()},
            "stream": dict(stream or {}),
        },
        "seconds": time.perf_counter() - begun,
        "rows": [row | costs.get((row["checkpoint"], row["sink"]), {}) for row in table.rows()],
        "differences": [
            {"row": list(row), "minus": list(base), "measures": table.differences(row, base)}
            for row, base in pairs
        ],
    }


def as_text(report: dict) -> str:
    """The table of a report, for a terminal."""
    keys = list(report["rows"][0]["measures"])
    width = max(len(f"{r['checkpoint']} {r['sink']}") for r in report["rows"])
    lines = []
    for row in report["rows"]:
        lines.append(f"{row['checkpoint']} {row['sink']}".ljust(width))
        cells = {key: row["measures"][key] for key in keys}
        cells |= {f"speed, {word}": cell for word, cell in row["speed by word"].items()}
        lines += [f"    {key:32}{cell['mean']:8.3f} +- {cell['ci95']:.3f}" for key, cell in cells.items()]
    return "\n".join(lines)


def write(report: dict, path: Path) -> None:
    """As JSON; what is not a number is null."""

    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clean(report), indent=1) + "\n")
