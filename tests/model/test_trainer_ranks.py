"""Two ranks train what one process trains: the gradient of every parameter, by name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.training import ENVIRONMENT, torchrun
from reward_forcing.models import BidirectionalWanModel
from reward_forcing.trainer import TrainConfig
from reward_forcing.trainer.config import build

MODEL = (
    "{dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 2, in_dim: 8, out_dim: 8, text_dim: 32, text_len: 3}"
)
TEACHER = f"""
stage: teacher
model: {MODEL}
frames: 4
batch: 4
steps: 1
optimizer: {{lr: 1e-3}}
"""
DISTILL = f"""
stage: distill
model: {MODEL}
frames: 12
batch: 2
accumulate: 2
steps: 1
optimizer: {{lr: 1e-3}}
stream: {{local_attn_size: 6, alpha: 0.9, shift: 2.0, denoising_step_list: [1000, 500]}}
distill: {{objective: dmd, critic_steps: 1, critic: {{lr: 1e-8}}, real_guidance: 1.0, shift: 2.0}}
"""


def launch(config: Path, out: Path, ranks: int) -> subprocess.CompletedProcess:
    program = ["-m", "reward_forcing.trainer", str(config), str(out)]
    command = [sys.executable, *program] if ranks == 1 else torchrun(*program, ranks=ranks)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


def start(path: Path, networks: tuple[str, ...]) -> str:
    """Weights to start from, and the lines that name them: a fresh model's zero head would hide the rest."""
    torch.manual_seed(0)
    model = BidirectionalWanModel(build(TrainConfig, yaml.safe_load(TEACHER), "").model)
    save_file(model.state_dict(), path)
    return "".join(f"{network}: {path}\n" for network in networks)


#: Weights that all samples of a step have a part in: ratios by bins, and standardised rewards.
F_DISTILL, AWM = (DISTILL.replace("objective: dmd", f"objective: {name}") for name in ("f_distill", "awm"))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("text", "heads"),
    [(TEACHER, 1), (DISTILL, 1), (DISTILL, 2), (F_DISTILL, 1), (AWM, 1)],
    ids=["teacher", "distill", "heads", "f_distill", "awm"],
)
def test_two_ranks_are_one_process(text, heads, tmp_path):
    """Two with activation checkpointing, one without. The two split the batch, or share samples by heads."""
    if text == AWM:
        pytest.importorskip("cv2")
    config = tmp_path / "run.yaml"
    text += start(tmp_path / "start.safetensors", ("teacher", "generator"))
    moments = {}
    for ranks in (1, 2):
        two = f"checkpointing: true\nhead_parallel: {heads}\n"
        config.write_text(text + (two if ranks == 2 else ""))
        done = launch(config, tmp_path / str(ranks), ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        moments[ranks] = first_moments(tmp_path / str(ranks) / "step-00000001", tmp_path / f"{ranks}.pt")
    # After one step AdamW's first moment is the clipped gradient times (1 - beta1).
    assert moments[1].keys() == moments[2].keys() and len(moments[1]) > 50
    for name, one in moments[1].items():
        assert (moments[2][name] - one).norm() <= 1e-5 * one.norm(), name
    norms = [moment.norm() for moment in moments[1].values()]
    assert sum(norm > 0 for norm in norms) > 0.9 * len(norms)


@pytest.mark.heavy
def test_another_number_of_ranks_goes_on(tmp_path):
    """What two ranks saved goes on in one process, and what one saved on two: weights, averages, both moments
    and counts after a second step are those of a run that no one stopped."""
    config, text = (
        tmp_path / "run.yaml",
        DISTILL + start(tmp_path / "start.safetensors", ("teacher", "generator")),
    )

    def run(out: str, ranks: int, steps: int) -> dict:
        config.write_text(text.replace("\nsteps: 1", f"\nsteps: {steps}"))
        done = launch(config, tmp_path / out, ranks)
        assert done.returncode == 0, done.stderr[-4000:]
        return whole(tmp_path / out / f"step-{steps:08d}", tmp_path / "whole.pt")

    wanted = run("alone", 1, 2)
    assert wanted["step"] == 2
    for out, (before, after) in {"fewer": (2, 1), "more": (1, 2)}.items():
        run(out, before, 1)
        found = run(out, after, 2)
        assert found.keys() == wanted.keys()
        kinds = {}  # AdamW divides by the second moment: one small gradient's rounding is not the run's
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor) and value.dim():
                kind = re.sub(r"(model|optimizer\.state|average)\..*?(exp_avg_sq|exp_avg|)$", r"\1 \2", name)
                pair = kinds.setdefault(kind, ([], []))
                pair[0].append(found[name].flatten())
                pair[1].append(value.flatten())
            else:
                assert found[name] == value, (out, name)
        assert len(kinds) == 7, kinds.keys()  # of the generator 4, of the critic 3
        for kind, (one, other) in kinds.items():
            one, other = torch.cat(one), torch.cat(other)
            assert (one - other).norm() <= 1e-5 * other.norm(), (out, kind)
        assert [json.loads(line)["step"] for line in (tmp_path / out / "log.jsonl").open()] == [1, 2]


def first_moments(checkpoint: Path, file: Path) -> dict[str, torch.Tensor]:
    """The optimizers' first moments of a sharded checkpoint, by network and parameter."""
    state = whole(checkpoint, file)
    return {name: value for name, value in state.items() if name.endswith(".exp_avg")}


def whole(checkpoint: Path, file: Path) -> dict:
    """All that a sharded checkpoint holds, by dotted name."""
    dcp_to_torch_save(checkpoint, file)

    def flat(values: dict, prefix: str) -> dict:
        pairs = ((f"{prefix}{key}", value) for key, value in values.items())
        nested = [flat(v, f"{name}.") if isinstance(v, dict) else {name: v} for name, v in pairs]
        return {name: value for part in nested for name, value in part.items()}

    return flat(torch.load(file, weights_only=True), "")
