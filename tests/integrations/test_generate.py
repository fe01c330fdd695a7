"""`reward-forcing generate`: encoders and VAE from folders in their real formats, small and random; what they
decode chunk by chunk is what they decode at once."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.wan_case import wan_folder

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests/golden/model_weights.safetensors"
for package in ("diffusers", "transformers", "cv2", "tqdm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    from reward_forcing.checkpoint import infer_config, read_checkpoint

    return wan_folder(tmp_path_factory.mktemp("wan"), infer_config(read_checkpoint(CHECKPOINT), num_heads=2))


def test_chunks_decode_to_what_the_whole_decodes_to(wan):
    from reward_forcing.generate import StreamingDecoder

    decoder = StreamingDecoder.from_pretrained(wan, dtype=torch.float32, device="cpu")
    torch.manual_seed(1)
    latents = torch.randn(1, 6, decoder.vae.config.z_dim, 4, 6)
    with torch.no_grad():
        chunks = [decoder.decode(latents[:, i : i + 2]) for i in (0, 2, 4)]
        whole = decoder.vae.decode(latents.transpose(1, 2) * 1.5 + 0.1).sample.transpose(1, 2)
    assert torch.equal(torch.cat(chunks, 1), (whole * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_prompt_becomes_a_video(wan, tmp_path, capsys, kind):
    import cv2

    from reward_forcing.cli import main

    checkpoint = CHECKPOINT
    if kind == "pt":
        checkpoint = tmp_path / "model.pt"
        torch.save({"generator_ema": load_file(CHECKPOINT)}, checkpoint)
    out = tmp_path / "video.mp4"
    sizes = ["--heads", "2", "--height", "4", "--width", "6", "--frames", "6", "--dtype", "float32"]
    more = ["--device", "cpu", "--steps", "1000", "--wan", str(wan), "--out", str(out)]
    assert main(["generate", "--prompt", "a cat walks", "--checkpoint", str(checkpoint), *sizes, *more]) == 0
    assert str(out) in capsys.readouterr().out
    video = cv2.VideoCapture(str(out))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 1 + 5 * 4
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".mp4"] == ["video.mp4"]


def test_refusals(wan, tmp_path, capsys):
    from reward_forcing.cli import main

    sizes = ["--heads", "2", "--height", "4", "--width", "6", "--frames", "6", "--dtype", "float32"]
    start = ["generate", "--checkpoint", str(CHECKPOINT), "--device", "cpu", *sizes]
    for more, words in (
        (["--prompt", " "], "--prompt"),
        (["--prompt", "a", "--out", str(tmp_path / "v.avi")], ".mp4"),
        (["--prompt", "a", "--wan", str(tmp_path), "--out", str(tmp_path / "v.mp4")], "--wan"),
        (["--prompt", "a", "--context", "x"], "--context"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*start, *more])
        assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
