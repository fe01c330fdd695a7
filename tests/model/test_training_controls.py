"""Controls of distillation that must come out null, and TensorBoard where it is installed."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers.training import DISTILL, TEACHER
from reward_forcing import rewards
from reward_forcing.trainer import train

pytest.importorskip("cv2")


def distilled(tmp_path, objective, beta, shuffle=False):
    distill = replace(DISTILL.distill, objective=objective, beta=beta, shuffle_rewards=shuffle)
    return load_file(
        train(replace(DISTILL, steps=2, distill=distill), tmp_path / f"{objective} {beta} {shuffle}")
    )


def test_beta_0_is_dmd_to_the_bit(tmp_path):
    plain, null, rewarded = (
        distilled(tmp_path, *run) for run in (("dmd", 2.0), ("re_dmd", 0.0), ("re_dmd", 2.0))
    )
    assert all(torch.equal(plain[name], null[name]) for name in plain)
    assert any(not torch.equal(plain[name], rewarded[name]) for name in plain)  # the reward does reach it


def test_shuffled_rewards_weight_other_samples(tmp_path, monkeypatch):
    """The same run when every clip is given its neighbour's score by hand."""
    shuffled = distilled(tmp_path, "re_dmd", 2.0, shuffle=True)
    scores = rewards.scores
    monkeypatch.setattr(rewards, "scores", lambda *args: torch.roll(scores(*args), 1))
    by_hand = distilled(tmp_path, "re_dmd", 2.0)
    monkeypatch.undo()
    assert all(torch.equal(shuffled[name], by_hand[name]) for name in by_hand)
    straight = distilled(tmp_path / "straight", "re_dmd", 2.0)
    assert any(not torch.equal(straight[name], by_hand[name]) for name in by_hand)


def test_figures_reach_tensorboard(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_scalar(self, name, value, step):
            written.append((self.path, name, value, step))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(replace(TEACHER, steps=2), tmp_path)
    assert {path for path, *_ in written} == {str(tmp_path / "tensorboard")}
    assert [step for _, name, value, step in written if name == "teacher_loss" and value > 0] == [1, 2]
