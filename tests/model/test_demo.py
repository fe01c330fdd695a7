"""`make demo`: a stream beside the published path, and what it leaves behind."""

import json
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.demo import traffic
from benchmarks.demo.__main__ import main
from benchmarks.demo.preview import latent_colours
from benchmarks.demo.run import flatness

GOLDEN = Path(__file__).parents[1] / "golden/model_weights.safetensors"
SMALL = ["--height", "4", "--width", "6", "--measure-seconds", "0.01"]
SMALL += ["--checkpoint", str(GOLDEN), "--heads", "2", "--alpha", "0.999", "--shift", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["--frames", "18", "--dtype", "float64", *SMALL, "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_the_demo_leaves_latents_preview_and_report(finished):
    folder, report = finished
    latents = load_file(folder / "latents.safetensors")["latents"]
    assert latents.shape == (18, 16, 4, 6) and latents.isfinite().all() and latents.std() > 0.1
    for name, start in (
        ("preview.gif", b"GIF8"),
        ("preview.png", b"\x89PNG"),
        ("report.html", b"<!doctype html>"),
    ):
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
    assert len(report["chunks"]) == 6 and [c["first_frame"] for c in report["chunks"]] == list(
        range(0, 18, 3)
    )


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


@pytest.mark.heavy
def test_the_film_of_the_trained_student(tmp_path):
    """What a newcomer sees: every sink side by side, in colour, and measures that tell them apart."""
    pytest.importorskip("cv2")
    options = ["--frames", "24", "--measure-seconds", "0.01", "--sinks", "none", "ema:0.9"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    world = report["world"]
    assert list(world["measures"]) == ["real", "none", "ema:0.9"]
    for sink in ("none", "ema:0.9"):
        assert world["measures"][sink]["alive"]["mean"] > 0.6
        assert len(world["curves"][sink]["mass"]) == 8 and world["sinks"][sink]["cache_bytes"] > 0
    # the two streams are one until the window is full, and differ after it
    first, second = (world["curves"][sink]["mass"] for sink in ("none", "ema:0.9"))
    assert first[:3] == second[:3] and first != second
    assert report["agreement"]["largest_relative_l2"] < 1e-11
    film, small = iio.imread(tmp_path / "film.mp4"), iio.imread(tmp_path / "film.gif")
    assert len(film) == 24 and len(small) == 12
    assert (film.max(axis=-1).astype(int) - film.min(axis=-1)).max() > 100  # saturated: there is an object
    page = (tmp_path / "report.html").read_text()
    assert "The trained student under 2 sinks" in page and "data:image/gif" in page


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


def test_without_a_published_path_beside_it(tmp_path):
    (tmp_path / "latents.safetensors").write_text("of an earlier demo")
    arguments = [
        "--frames",
        "8",
        "--chunk-frames",
        "2",
        "--sink-frames",
        "1",
        "--window",
        "5",
        "--sink-policy",
        "static",
    ]
    assert main([*arguments, *SMALL, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["chunks"]) == 4 and "agreement" not in report  # the published path has no static sink
    assert load_file(tmp_path / "latents.safetensors")["latents"].shape[0] == 8


def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*SMALL, "--frames", "20", "--out", str(tmp_path)])
    assert capsys.readouterr().err.count("\n") == 1


def test_flatness_compares_the_ends_of_the_steady_part():
    assert flatness([9.0] * 4 + [1.0] * 6 + [2.0] * 6, 4)["ratio"] == 2.0
    assert flatness([5.0], 4)["ratio"] == 1.0


def test_colours_follow_the_latents():
    latents = torch.zeros(2, 4, 8, 8)
    latents[:, 0, :, 4:] = 1
    latents += 0.01 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    colours = latent_colours(latents)
    assert colours.shape == (2, 8, 8, 3)
    left, right = colours[:, :, :4, 0].mean(), colours[:, :, 4:, 0].mean()
    assert abs(float(left) - float(right)) > 150  # the first principal direction is the first colour
