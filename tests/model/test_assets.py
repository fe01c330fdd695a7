"""The shipped checkpoints of the embedded world: each does what its stage was trained for. Random weights
fail every one of these."""

import json

import pytest
import torch

from reward_forcing import evaluate, world
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline

pytest.importorskip("cv2")
STUDENTS = ("causal", "ode", "distill")


def student(stage):
    return evaluate.load_student(evaluate.shipped(stage)[0])


def judged(latents, prompts):
    video = world.PatchCodec.fit().decode(latents)
    return {key: v.nanmean().item() for key, v in evaluate.measures(video, prompts).items()}


def streamed(model, stream, prompts, frames=24):
    pipeline = StreamingPipeline(model, evaluate.with_sink(stream, "static"))
    chunks = evaluate.stream_clips(pipeline, prompts, frames=frames, seed=0)
    return judged(torch.cat([chunk.latents for chunk in chunks], dim=1), prompts)


def in_bounds(found):
    """Bounds that every stage's evaluation (docs/training.md) clears by several of its intervals."""
    return found["alive"] > 0.6 and found["right colour"] > 0.8 and 30 < found["mass"] < 250


@pytest.mark.heavy
@pytest.mark.parametrize("stage", STUDENTS)
def test_a_students_object_is_alive_and_of_the_colour_that_was_asked_for(stage):
    prompts = evaluate.some_prompts(8)
    assert in_bounds(streamed(*student(stage), prompts))


@pytest.mark.heavy
def test_the_teachers_object_is_alive_and_of_the_colour_that_was_asked_for():
    prompts = evaluate.some_prompts(8)
    assert in_bounds(judged(evaluate.teacher_clips(*evaluate.load_teacher(), prompts, 0, 0.0), prompts))


def test_random_weights_are_out_of_bounds():
    _, config = evaluate.shipped("distill")
    torch.manual_seed(0)
    model = CausalWanModel(config.model).requires_grad_(False)
    assert not in_bounds(streamed(model, config.stream, evaluate.some_prompts(8), frames=12))


def test_the_checkpoints_are_small_and_each_has_its_log_and_configuration():
    paths = [evaluate.shipped(stage)[0] for stage in ("teacher", *STUDENTS)]
    assert sum(path.stat().st_size for path in paths) <= 8 * 1024**2
    for path in paths:
        lines = [json.loads(line) for line in path.with_suffix(".jsonl").open()]
        config = evaluate.shipped(path.stem)[1]
        assert lines[-1]["step"] == config.steps and config.stage == path.stem
        name = "teacher_loss" if path.stem == "teacher" else "generator_loss"
        if path.stem != "distill":  # the gradient of DMD is what matters, not its loss
            assert lines[-1][name] < 0.8 * lines[0][name]
    assert (paths[0].parent / "curves.png").read_bytes().startswith(b"\x89PNG")
