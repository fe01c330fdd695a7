"""`reward-forcing evaluate`: measures of rendered clips are the truth, intervals are intervals, and the table
tells a student from noise."""

import json
import math

import pytest
import torch

import rf_kernels as rf
from reward_forcing import cli, evaluate, world

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def real():
    prompts = evaluate.some_prompts(24)
    return world.render(prompts, 24, generator=torch.Generator().manual_seed(0))[0], prompts


def test_measures_of_rendered_clips(real):
    found = {key: values.nanmean().item() for key, values in evaluate.measures(*real).items()}
    assert found["alive"] == 1 and found["right colour"] > 0.99 and abs(found["objects"] - 1) < 0.02
    assert 70 < found["mass"] < 130  # the area of a disc of radius 6 is 113
    for name in ("background", "colour", "sharpness"):
        assert found[f"drift of the {name}"] < 0.08


def test_speed_is_read_per_word_and_flicker_is_not_motion(real):
    video, prompts = real
    speed = world.steady_speed(world.measure(video))
    for word, (low, high) in world.SPEEDS.items():
        mean = speed[[p.speed == word for p in prompts]].mean().item()
        assert low - 0.05 <= mean <= high + 0.05, word
    still, _ = world.render(
        [world.Prompt("red", "disc", "still")] * 16, 40, generator=torch.Generator().manual_seed(1)
    )
    tremble = torch.randint(-1, 2, (16, 40, 2), generator=torch.Generator().manual_seed(2))
    shaken = torch.stack(
        [
            torch.stack([f.roll(tuple(d), (-2, -1)) for f, d in zip(c, ds.tolist(), strict=True)])
            for c, ds in zip(still, tremble, strict=True)
        ]
    )
    reading = world.measure(shaken)
    assert reading.speed.mean() > 1.2  # raw speed is fooled
    assert world.steady_speed(reading).mean() < 0.25
    assert world.steady_speed(reading, 15).shape == (16, 40 - 17)


def test_what_is_not_there_is_not_measured(real):
    video, prompts = real
    grey = video.mean(dim=2, keepdim=True).expand_as(video)
    found = evaluate.measures(grey, prompts)
    assert found["alive"].max() == 0 and found["right colour"].isnan().all()
    assert evaluate.interval(found["right colour"][None])["n"] == 0


def test_intervals_cover_the_mean_19_times_in_20():
    draws = torch.randn(400, 3, 64, generator=torch.Generator().manual_seed(0)) + 1
    inside = [abs(i["mean"] - 1) <= i["ci95"] for i in map(evaluate.interval, draws)]
    assert 0.92 <= sum(inside) / 400 <= 0.98
    holed = draws[0].clone()
    holed[:, 5] = math.nan
    assert evaluate.interval(holed)["n"] == 63


def test_the_same_noise_for_every_sink_and_a_static_sink_is_an_average_that_absorbs_nothing():
    """alpha = 1 is the static sink: equal to rounding of the average's own state."""
    from reward_forcing.models import CausalWanModel
    from reward_forcing.pipeline import StreamingPipeline

    torch.manual_seed(0)
    _, config = evaluate.shipped("distill")
    model = CausalWanModel(config.model).double().requires_grad_(False)
    prompts, found = evaluate.some_prompts(2), {}
    for sink in ("static", "ema:1", "ema:0.9", "none"):
        pipeline = StreamingPipeline(model, evaluate.with_sink(config.stream, sink))
        chunks = evaluate.stream_clips(_Double(pipeline), prompts, frames=18, seed=0)
        found[sink] = torch.cat([chunk.latents for chunk in chunks], dim=1)
    assert (found["static"] - found["ema:1"]).abs().max() < 1e-9
    assert (found["static"] - found["ema:0.9"]).abs().max() > 1e-4
    assert torch.equal(found["none"][:, :9], found["none"][:, :9]) and len(found["none"][0]) == 18


class _Double:
    """A pipeline fed in float64."""

    def __init__(self, pipeline):
        self.config, self.model, self._pipeline = pipeline.config, pipeline.model, pipeline

    def stream(self, chunks, text, *, noise_source, cache):
        return self._pipeline.stream(
            (c.double() for c in chunks),
            text.double(),
            noise_source=lambda like: noise_source(like).double(),
            cache=cache,
        )


def test_the_command_writes_the_tables(tmp_path, capsys):
    path, _ = evaluate.shipped("distill")
    options = ["--student", f"a={path}", "--student", f"b={path}", "--sinks", "none", "static", "two-rates@2"]
    small = ["--prompts", "2", "--seeds", "2", "--frames", "12", "--guidance", "0"]
    assert cli.main(["evaluate", "--out", str(tmp_path / "e.json"), *options, *small]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    names = [(row["checkpoint"], row["sink"]) for row in report["rows"]]
    assert names[:2] == [("real", ""), ("teacher", "guidance 0")]
    assert names[2:] == [(n, s) for n in "ab" for s in ("none", "static", "two-rates@2")]
    streams = [row for row in report["rows"] if "cache bytes" in row]
    assert len(streams) == 6 and streams[1]["chunk time"] == 1  # the first student's static sink is the unit
    assert all(row["chunk time"] > 0.1 for row in streams)
    pairs = {(*d["row"], *d["minus"]): d["measures"] for d in report["differences"]}
    null = pairs["b", "none", "a", "none"]  # the same weights: paired differences are exactly 0
    assert all(d["mean"] in (0, None) and not d["beyond noise"] for d in null.values())
    assert "right colour" in capsys.readouterr().out


@pytest.mark.parametrize("way", [["--rolling", "--window", "15"], ["--restart", "9", "3"]], ids=" ".join)
def test_other_ways_of_streaming_are_judged_too(way, tmp_path):
    path, _ = evaluate.shipped("distill")
    small = ["--prompts", "2", "--seeds", "1", "--frames", "12", "--guidance", "0", "--sinks", "static"]
    whole = ["--student", f"a={path}", *small, *way, "--out", str(tmp_path / "e.json")]
    assert cli.main(["evaluate", *whole]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["settings"]["stream"]["rolling"] == ("--rolling" in way)
    alive = report["rows"][-1]["measures"]["alive"]["mean"]
    assert alive is not None and 0 <= alive <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--student", "a"], "NAME=PATH"),
        (["--student", "a=/nowhere.safetensors"], "nowhere"),
        (["--sinks", "ema:fast"], "`alpha`: expected a number"),
        (["--sinks", "oracle"], "one of none, static, ema, steady"),
        (["--prompts", "0"], "--prompts"),
        (["--rolling"], "`local_attn_size`: expected at least 15, with rolling"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", "--out", str(tmp_path / "e.json"), "--frames", "6", *arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_frames_that_are_no_chunks_are_refused():
    with pytest.raises(rf.ArgumentError, match="frames"):
        next(
            evaluate.stream_clips(evaluate.StreamingPipeline(*evaluate.load_student()), [], frames=7, seed=0)
        )
