"""`make train-smoke`: every stage of the embedded world from its shipped configuration, a few steps each."""

import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

from reward_forcing import world
from reward_forcing.checkpoint import load_causal_model
from reward_forcing.pipeline import StreamingPipeline
from reward_forcing.trainer import load, train

CONFIGS = Path(world.__file__).parent / "configs"
STEPS = {"teacher": 6, "causal": 3, "ode": 2, "distill": 2}


@pytest.mark.heavy
def test_every_stage_runs_from_what_the_one_before_it_left(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)  # the configurations name each other's results by relative paths
    for stage, steps in STEPS.items():
        config = load(CONFIGS / f"{stage}.yaml")
        weights = train(
            replace(config, steps=steps, batch=4, save_every=0, sample_every=steps), Path("out/world") / stage
        )
        lines = [json.loads(line) for line in (weights.parent / "log.jsonl").open()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        (clip,) = (weights.parent / "samples").glob("*.mp4")
        frames = iio.imread(clip)
        assert len(frames) == (15 if stage == "teacher" else 30) and frames.std() > 1
        assert not any(name.endswith("skipped") for line in lines for name in line)

    model = load_causal_model(weights, config.model, dtype=torch.float32)
    pipeline = StreamingPipeline(model, config.stream)
    noise = torch.randn(1, 12, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipeline.rollout(noise, world.embed([world.Prompt.parse("slow red disc")]))
    video = world.PatchCodec.fit().decode(latents)
    assert video.shape == (1, 12, 3, world.SIZE, world.SIZE) and torch.isfinite(video).all()
