"""The published file trains Wan: small random weights in the real formats, from the text to the reward."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import rf_kernels as rf
from helpers import qwen_case
from helpers.training import DISTILL, PUBLISHED
from helpers.wan_case import wan_folder
from reward_forcing.checkpoint import CheckpointError, read_checkpoint
from reward_forcing.cli import main
from reward_forcing.models import BidirectionalWanModel
from reward_forcing.trainer import train
from reward_forcing.trainer.config import WanConfig, load
from reward_forcing.trainer.draws import Draws

for package in ("diffusers", "transformers", "yaml", "tqdm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
from reward_forcing.trainer.wan_data import WanSource  # noqa: E402

SMALL = ["dim=32", "ffn_dim=64", "num_heads=2", "num_layers=1", "text_dim=16", "text_len=8"]
CHANGES = [f"model.{size}" for size in SMALL] + [f"teacher_model.{size}" for size in SMALL]
CHANGES += ["teacher_model.dim=48", "teacher_model.num_layers=2"]
CHANGES += ["frames=2", "batch=2", "accumulate=1", "steps=1", "wan.latent=[4, 4]", "stream.chunk_frames=1"]


def sharded(folder, model):
    """Weights in two files and an index, as Wan2.1-T2V-14B has them in six."""
    folder.mkdir()
    names = {}
    tensors = model.state_dict()
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        names |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published file, and the folders that it names."""
    folder = tmp_path_factory.mktemp("published")
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    (folder / "prompts.txt").write_text("a cat walks\n\ncat a\na walks a cat a cat\n")
    text = PUBLISHED.replace("checkpoints", str(checkpoints))
    path = folder / "reward_forcing.yaml"
    path.write_text(text.replace("prompts/vidprom_filtered_extended.txt", str(folder / "prompts.txt")))
    config = load(path, CHANGES)
    torch.manual_seed(0)
    sharded(checkpoints / "Wan2.1-T2V-14B", BidirectionalWanModel(config.teacher_model))
    (checkpoints / "Wan2.1-T2V-1.3B").mkdir()
    student = BidirectionalWanModel(config.model).state_dict()
    save_file(student, checkpoints / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors")
    torch.save(
        {"generator": {f"model.{name}": t for name, t in student.items()}}, checkpoints / "ode_init.pt"
    )
    wan_folder(checkpoints / "Wan2.1-T2V-1.3B-Diffusers", config.model)
    base = qwen_case.base(checkpoints / "Qwen2-VL-2B-Instruct")
    qwen_case.checkpoint(checkpoints / "VideoReward", base)
    return path


def test_a_step_of_the_published_file(published, tmp_path, monkeypatch):
    """In bfloat16, through the command line: generator and critic, text encoder, VAE and VideoAlign."""
    from reward_forcing.rewards import videoalign

    seen, score = [], videoalign.VideoAlign.__call__

    def watched(self, frames, prompts):
        seen.append((frames, list(prompts), score(self, frames, prompts)))
        return seen[-1][2]

    monkeypatch.setattr(videoalign.VideoAlign, "__call__", watched)
    features = tmp_path / "features"
    settings = [f"--set={change}" for change in [*CHANGES, f"wan.features={features}"]]
    out = tmp_path / "out"
    assert main(["train", "--config", str(published), "--out", str(out), *settings]) == 0
    (line,) = [json.loads(text) for text in (out / "log.jsonl").open()]
    names = ("generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm")
    assert all(line[name] is not None and math.isfinite(line[name]) and line[name] > 0 for name in names)
    assert not any(name.endswith("skipped") for name in line)
    assert (out / "generator.safetensors").exists() and (out / "step-00000001").exists()
    ((frames, prompts, scores),) = seen
    assert frames.shape == (2, 1 + 4, 3, 16, 16) and -1 <= frames.min() < frames.max() <= 1
    assert {*prompts} <= {"a cat walks", "cat a", "a walks a cat a cat"} and scores.isfinite().all()
    assert 1 < len(list(features.glob("*.safetensors"))) <= 4  # prompts, and the negative one


@pytest.fixture
def config(published, tmp_path):
    return load(published, [*CHANGES, "compute=float32", f"wan.features={tmp_path / 'features'}"])


def test_what_the_source_gives(config, monkeypatch):
    from reward_forcing import generate

    source = WanSource(config, Draws(3))
    assert source.prompts(5, [0, 1, 2, 3]) == source.prompts(5, [0, 1]) + source.prompts(5, [2, 3])
    encoder = generate.TextEncoder(config.wan.folder, 8, dtype=torch.float32, device="cpu")
    texts = ["cat a", "a walks a cat a cat", "cat a"]
    embedded = source.embed(texts)
    for text, row in zip(texts, embedded, strict=True):
        alone = encoder(text)[0]
        assert torch.equal(row[: len(alone)], alone) and not row[len(alone) :].any()
    assert embedded.shape[1] == 6 and torch.equal(source.no_text(2), encoder("静态").expand(2, -1, -1))

    latents = torch.randn(2, 3, 16, 4, 4)
    frames = source.decode(latents)
    decoder = generate.StreamingDecoder.from_pretrained(config.wan.folder, dtype=torch.float32, device="cpu")
    assert torch.equal(frames[1:], 2 * decoder.decode(latents[1:]) - 1) and frames.shape[1] == 9
    assert torch.equal(frames, source.decode(latents))  # one clip leaves nothing behind for the next

    def gone(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("reward_forcing.trainer.wan_data.TextEncoder", gone)
    assert torch.equal(WanSource(config, Draws(3)).embed(texts), embedded)  # from the folder of features
    with pytest.raises(AssertionError, match="loaded"):
        WanSource(config, Draws(3)).embed(["walks"])


def test_refusals(config, tmp_path):
    draws, wan = Draws(0), config.wan

    def refused(text, change=(), act=lambda source: None, **values):
        with pytest.raises(rf.ArgumentError, match=text):
            act(WanSource(replace(config, **values, wan=replace(wan, **dict(change))), draws))

    refused("the stage distill or ode, found teacher", stage="teacher")
    refused("prompts.*a text file", prompts="")
    refused(r"multiples of \(2, 2\), found \(3, 4\)", {"latent": (3, 4)})
    elsewhere = {"folder": str(tmp_path), "features": ""}
    refused("a folder with tokenizer/", elsewhere, lambda source: source.embed(["a"]))
    refused("a folder with vae/", elsewhere, lambda source: source.decode(torch.zeros(1, 1, 16, 4, 4)))
    wide = replace(config.model, text_dim=32, in_dim=8)
    refused(
        r"text features \[at most 8, 32\].*\(1, 16\)", {"features": ""}, lambda s: s.embed(["a"]), model=wide
    )
    refused("a VAE of 8 channels, found 16", (), lambda s: s.decode(torch.zeros(1, 1, 16, 4, 4)), model=wide)
    other = tmp_path / "features"
    WanSource(config, draws).embed(["a"])
    (file,) = other.iterdir()
    save_file({"context": torch.zeros(3, 5)}, file)
    refused(r"text features.*\(3, 5\) of .*features", (), lambda source: source.embed(["a"]))


def test_a_reward_that_cannot_be_loaded_ends_the_run_before_it(tmp_path):
    videoalign = {"name": "videoalign", "checkpoint": str(tmp_path), "base": str(tmp_path)}
    config = replace(DISTILL, reward=replace(DISTILL.reward, **videoalign))
    with pytest.raises(rf.ArgumentError, match="VideoAlign: argument `checkpoint`.*model_config.json"):
        train(config, tmp_path / "out")
    with pytest.raises(rf.ArgumentError, match="prompts"):
        train(replace(DISTILL, wan=WanConfig(str(tmp_path))), tmp_path / "out")


def test_a_folder_of_weights(tmp_path):
    model = BidirectionalWanModel(DISTILL.model)
    sharded(tmp_path / "wan", model)
    state = read_checkpoint(tmp_path / "wan")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "wan" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing: diffusion_pytorch_model-00002"):
        read_checkpoint(tmp_path / "wan")
    (tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a list of weights"):
        read_checkpoint(tmp_path / "wan")
    with pytest.raises(FileNotFoundError, match="no diffusion_pytorch_model"):
        read_checkpoint(tmp_path)
