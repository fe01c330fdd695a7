"""How much moves in a clip, by optical flow, corrected for flicker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._check import expect


class FrameDifference:
    """Mean magnitude of what changes from frame to frame: a reward that has a gradient, for trials of the
    losses that ask for one. Flicker earns it too.
    """

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        expect(frames.shape[1] >= 2, "FrameDifference", "frames", "at least 2 frames", frames.shape[1])
        return frames.float().diff(dim=1).abs().flatten(1).mean(dim=1)


class OpticalFlowDynamics:
    """Speed of what moves, in pixels per frame.

    Flow magnitude alone is a reward that can be cheated: noise and flicker have large flow that points
    elsewhere in every frame. What really moves goes on moving. So a pixel counts with the part of its flow
    that persists,

        m(p, i)^2 = max(0, <f_i(p), f_{i+1}(p + f_i(p))>)        f_i: flow from frame i to i + 1

    whose expectation is 0 for flow of independent directions, and |f|^2 for steady motion. The inner product
    is averaged over the fastest ``share`` of the pixels before the root is taken, so that noise cancels
    instead of adding up. The score is the mean over the frames.

    Args:
        share: the fastest part of the pixels that is averaged (the object, not the background).
        scale: frames are enlarged by this factor before flow is computed (small videos need it).
    """

    def __init__(self, *, share: float = 0.05, scale: int = 2):
        expect(0 < share <= 1, "OpticalFlowDynamics", "share", "above 0, at most 1", share)
        expect(scale >= 1, "OpticalFlowDynamics", "scale", "at least 1", scale)
        self.share, self.scale = share, scale

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        expect(frames.shape[1] >= 3, "OpticalFlowDynamics", "frames", "at least 3 frames", frames.shape[1])
        images = (
            ((frames.detach().float().clamp(-1, 1) + 1) * 127.5).byte().cpu().permute(0, 1, 3, 4, 2).numpy()
        )
        return torch.tensor([self._clip(clip) for clip in images], dtype=torch.float32)

    def _clip(self, clip) -> float:
        import cv2
        import numpy as np

        height, width = clip.shape[1] * self.scale, clip.shape[2] * self.scale
        # The largest channel: shapes of saturated colours differ from grey there, whatever their luminance.
        grey = [cv2.resize(i, (width, height), interpolation=cv2.INTER_CUBIC).max(axis=-1) for i in clip]
        # Farneback: pyramid of 3 levels at half size, windows of 13, 3 iterations, polynomials over 5 pixels.
        flows = [
            cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 13, 3, 5, 1.1, 0)
            for a, b in zip(grey[:-1], grey[1:], strict=True)
        ]
        ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
        count = max(1, round(self.share * height * width))
        persistent = []
        for now, after in zip(flows[:-1], flows[1:], strict=True):
            moved = cv2.remap(
                after, xs + now[..., 0], ys + now[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            fastest = np.argpartition(np.square(now).sum(-1).ravel(), -count)[-count:]
            inner = (now * moved).sum(-1).ravel()[fastest]
            persistent.append(max(0.0, float(inner.mean())) ** 0.5)
        return float(np.mean(persistent)) / self.scale
