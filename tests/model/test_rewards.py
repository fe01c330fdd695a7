"""Rewards: the protocol, and dynamics by optical flow that flicker does not raise."""

import pytest
import torch

import rf_kernels as rf
from reward_forcing.rewards import OpticalFlowDynamics, scores
from reward_forcing.world import Prompt, render

cv2 = pytest.importorskip("cv2")


def clip(speed, seed=0, count=6):
    prompts = [Prompt("red", "disc", speed)] * count
    video, centres = render(prompts, 12, generator=torch.Generator().manual_seed(seed))
    return video, (centres[:, 1] - centres[:, 0]).norm(dim=-1), [str(p) for p in prompts]


def raw_flow(video, share=0.05):
    """The plain measure that can be cheated: magnitude of the fastest pixels."""
    images = ((video.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 1, 3, 4, 2).numpy()
    values = []
    for one in images:
        grey = [cv2.resize(i, (64, 64), interpolation=cv2.INTER_CUBIC).max(axis=-1) for i in one]
        for a, b in zip(grey[:-1], grey[1:], strict=True):
            flow = torch.from_numpy(cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 13, 3, 5, 1.1, 0))
            values.append(flow.norm(dim=-1).flatten().topk(round(share * 64 * 64)).values.mean() / 2)
    return torch.stack(values).mean()


def test_the_score_is_the_speed():
    for speed in ("slow", "fast"):
        video, true, prompts = clip(speed)
        assert scores(OpticalFlowDynamics(), video, prompts).mean().item() == pytest.approx(
            true.mean().item(), rel=0.25
        )
    still, _, prompts = clip("still")
    assert scores(OpticalFlowDynamics(), still, prompts).mean() < 0.2  # the background drifts at 0.1 to 0.3


def test_flicker_raises_raw_flow_but_not_the_score():
    video, _, prompts = clip("still")
    flicker = video + 0.25 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    slow, _, _ = clip("slow")
    assert raw_flow(flicker) > raw_flow(
        slow
    )  # what the correction is for: noise on a still clip beats real motion
    reward = OpticalFlowDynamics()
    assert scores(reward, flicker, prompts).mean() < 0.6 * scores(reward, slow, prompts).mean()


def test_a_sample_is_scored_by_itself():
    video, _, prompts = clip("fast")
    reward = OpticalFlowDynamics()
    together = scores(reward, video, prompts)
    assert torch.equal(
        together, torch.cat([scores(reward, video[i : i + 1], prompts[:1]) for i in range(len(video))])
    )
    assert together.dtype == torch.float32 and together.shape == (6,)


@pytest.mark.parametrize(
    ("reward", "frames", "prompts", "argument"),
    [
        (lambda f, p: torch.zeros(3), torch.zeros(2, 4, 3, 8, 8), ["a", "b"], "scores"),
        (lambda f, p: 1.0, torch.zeros(2, 4, 3, 8, 8), ["a", "b"], "scores"),
        (lambda f, p: torch.zeros(2), torch.zeros(2, 4, 3, 8, 8), ["a"], "prompts"),
        (lambda f, p: torch.zeros(2), torch.zeros(2, 4, 4, 8, 8), ["a", "b"], "frames"),
        (OpticalFlowDynamics(), torch.zeros(2, 2, 3, 8, 8), ["a", "b"], "frames"),
    ],
)
def test_refusals(reward, frames, prompts, argument):
    with pytest.raises(rf.ArgumentError, match=argument):
        scores(reward, frames, prompts)


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 2}, {"scale": 0}])
def test_options_out_of_range(options):
    with pytest.raises(rf.ArgumentError, match="OpticalFlowDynamics"):
        OpticalFlowDynamics(**options)
