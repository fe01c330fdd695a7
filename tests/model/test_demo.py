"""The main job: `reward-forcing demo` and `stream` on a checkpoint in the published format, with what they leave behind."""

import json

import pytest
import torch
from reward_forcing.cli import main
from reward_forcing.demo import job, traffic
from reward_forcing.demo.preview import latent_colours
from safetensors.torch import load_file, save_file

SMALL = ["--height", "4", "--width", "6", "--measure-seconds", "0.01"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--frames", "18", "--dtype", "float64", *SMALL, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_the_demo_leaves_latents_preview_and_report(finished):
    folder, report = finished
    latents = load_file(folder / "latents.safetensors")["latents"]
    assert latents.shape == (18, 16, 4, 6) and latents.isfinite().all() and latents.std() > 0.1
    for name, start in (("preview.gif", b"GIF8"), ("preview.png", b"\x89PNG"), ("report.html", b"<!doctype html>")):
        assert (folder / name).read_bytes().startswith(start)
    page = (folder / "report.html").read_text()
    for section in (
        "Preview",
        "Agreement with the published path",
        "Time and memory",
        "Time of each phase",
        "Each op",
        "Bytes moved",
    ):
        assert section in page
    assert len(report["chunks"]) == 6 and [c["first_frame"] for c in report["chunks"]] == list(range(0, 18, 3))


def test_the_stream_agrees_with_the_published_path(finished):
    _, report = finished
    assert report["agreement"]["largest_relative_l2"] < 1e-11  # float64, evictions included
    assert report["chunks"][-1]["relative_l2"] > 0  # it was compared, not copied
    assert all(c["phases"].keys() == {"denoise", "renoise", "context"} for c in report["chunks"])
    assert {op["op"].split()[0] for op in report["ops"]} == {
        "rope_append",
        "sink_window_attention",
        "first",
        "dmd_gradient",
    }


def test_bytes_of_the_cache_path(finished):
    counts = finished[1]["bytes_per_chunk"]
    assert (
        counts["floor"] <= counts["ours"] <= 1.2 * counts["floor"]
    )  # 24 tokens a chunk: the plan and the weights weigh in
    assert counts["published"] > 5 * counts["ours"]


def test_the_byte_counter_counts_kernels_not_views():
    x = torch.zeros(4, 8)
    with traffic.ByteCounter() as counter:
        y = x[:2].t().reshape(2, 8) + 1  # a view, a copy of 16 floats (read, written), a sum (read, written)
        y.fill_(3)  # written
    assert counter.bytes == 4 * 16 * (2 + 2 + 1)


def test_stream_reads_its_own_context_and_other_steps(tmp_path):
    save_file({"context": torch.randn(11, 64)}, str(tmp_path / "text.safetensors"))
    arguments = ["stream", "--checkpoint", "tests/golden/model_weights.safetensors", "--heads", "2", "--frames", "8",
                 "--chunk-frames", "2", "--sink-frames", "1", "--window", "5", "--steps", "1000", "500", "--sink-policy", "static",
                 "--context", str(tmp_path / "text.safetensors"), "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert main([*arguments, *SMALL, "--out", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert len(report["chunks"]) == 4 and "agreement" not in report  # the published path has no static sink
    assert main([*arguments, *SMALL, "--seed", "1", "--out", str(tmp_path / "b")]) == 0
    a, b = (load_file(tmp_path / name / "latents.safetensors")["latents"] for name in "ab")
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "change,words",
    [
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--frames", "20"], "frames"),
        (["--height", "5"], "height"),
        (["--sink-frames", "12"], "local_attn_size"),
    ],
)
def test_a_wrong_call_says_so_and_exits_with_2(tmp_path, capsys, change, words):
    assert main(["demo", *SMALL, "--frames", "6", "--out", str(tmp_path), *change]) == 2
    assert words in capsys.readouterr().err


def test_flatness_compares_the_ends_of_the_steady_part():
    assert job._flatness([9.0] * 4 + [1.0] * 6 + [2.0] * 6, 4)["ratio"] == 2.0
    assert job._flatness([5.0], 4)["ratio"] == 1.0


def test_colours_follow_the_latents():
    latents = torch.zeros(2, 4, 8, 8)
    latents[:, 0, :, 4:] = 1
    latents += 0.01 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    colours = latent_colours(latents)
    assert colours.shape == (2, 8, 8, 3)
    left, right = colours[:, :, :4, 0].mean(), colours[:, :, 4:, 0].mean()
    assert abs(float(left) - float(right)) > 150  # the first principal direction is the first colour
