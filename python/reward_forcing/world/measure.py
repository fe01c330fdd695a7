"""What a clip of the embedded world shows, read from its pixels alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scene import COLOURS, Prompt

_SATURATION = 0.5  # a pixel whose channels differ by more belongs to an object (backgrounds are grey)


@dataclass(frozen=True)
class Reading:
    """All ``[B, F]`` but where noted."""

    mass: Tensor
    """Area of the object in pixels, edges by their share."""
    count: Tensor
    """Connected objects of at least 6 pixels, on the torus."""
    centre: Tensor
    """``[B, F, 2]`` (x, y) on the torus, in pixels."""
    way: Tensor
    """``[B, F - 1, 2]`` way of the centre from frame to frame, the shorter way around."""
    colour: Tensor
    """``[B, F, 3]`` mean colour of the object."""
    background: Tensor
    """Mean grey level of what is not the object."""
    sharpness: Tensor
    """Root mean square difference of neighbouring pixels (blur lowers it, noise raises it)."""

    @property
    def speed(self) -> Tensor:
        """``[B, F - 1]`` length of the way."""
        return self.way.norm(dim=-1)


def measure(video: Tensor) -> Reading:
    """Read a clip ``[B, F, 3, H, W]``; see :class:`Reading`."""
    height, width = video.shape[3:]
    saturation = video.amax(dim=2) - video.amin(dim=2)  # [B, F, H, W]
    weight = ((saturation - _SATURATION) / _SATURATION).clamp(0, 1)
    mass = weight.sum(dim=(-1, -2))
    total = mass.clamp_min(1e-6)

    def circular(weights: Tensor, length: int) -> Tensor:
        angle = torch.arange(length, device=video.device) * (2 * math.pi / length)
        mean = torch.atan2((weights * angle.sin()).sum(-1), (weights * angle.cos()).sum(-1))
        return torch.remainder(mean * (length / (2 * math.pi)), length)

    centre = torch.stack((circular(weight.sum(-2), width), circular(weight.sum(-1), height)), dim=-1)
    size = torch.tensor([width, height], dtype=video.dtype, device=video.device)
    step = torch.remainder(centre[:, 1:] - centre[:, :-1] + size / 2, size) - size / 2
    colour = (video * weight[:, :, None]).sum(dim=(-1, -2)) / total[..., None]
    rest = 1 - (saturation > 0.25).float()
    grey = (video.mean(dim=2) * rest).sum(dim=(-1, -2)) / rest.sum(dim=(-1, -2)).clamp_min(1)
    steps = sum((video - video.roll(1, dims=dim)).square().mean(dim=(-1, -2, -3)) for dim in (-1, -2))
    return Reading(mass, _count(weight > 0.5), centre, step, colour, grey, (steps / 2).sqrt())


def _count(inside: Tensor, at_least: int = 6) -> Tensor:
    """Connected regions (4-neighbours, torus) of each image ``[..., H, W]`` with so many pixels: every pixel
    takes the largest label of its region until nothing changes."""
    height, width = inside.shape[-2:]
    pixels = height * width
    names = torch.arange(1, pixels + 1, device=inside.device, dtype=torch.int16)  # int16: four times as fast
    label = names.reshape(height, width) * inside
    while True:
        spread = label
        for dim, by in ((-1, 1), (-1, -1), (-2, 1), (-2, -1)):
            spread = torch.maximum(spread, label.roll(by, dims=dim))
        spread = spread * inside
        if torch.equal(spread, label):
            break
        label = spread
    sizes = torch.zeros(*label.shape[:-2], pixels + 1, dtype=torch.int64, device=inside.device)
    label = label.flatten(-2).long()
    sizes.scatter_add_(-1, label, torch.ones_like(label))
    return (sizes[..., 1:] >= at_least).sum(dim=-1)


def colour_right(reading: Reading, prompts: list[Prompt]) -> Tensor:
    """Whether the named colour is the nearest of all colours, ``[B, F]`` in {0, 1}; 0 where there is no
    object.
    """
    colours = torch.tensor(list(COLOURS.values()), device=reading.colour.device)
    # Direction alone: a darker or an over-saturated red is red.
    unit = torch.nn.functional.normalize(reading.colour, dim=-1)
    nearest = (unit @ torch.nn.functional.normalize(colours, dim=-1).T).argmax(dim=-1)
    wanted = torch.tensor([list(COLOURS).index(p.colour) for p in prompts], device=nearest.device)
    return ((nearest == wanted[:, None]) & (reading.mass > 6)).float()


def similarity_to_first(video: Tensor) -> Tensor:
    """Correlation of each frame's pixels with the first frame's, ``[B, F]``: 1 where a stream copies or
    freezes.
    """
    flat = video.flatten(2)
    flat = flat - flat.mean(dim=-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(flat, flat[:, :1], dim=-1)


def steady_speed(reading: Reading, window: int | None = None) -> Tensor:
    """Speed of the object in pixels per frame, corrected for flicker: ``sqrt(max(0, mean_i <d_i, d_{i+2}>))``
    with d_i the way of the centre from frame i to i + 1.

    What drifts goes on drifting, so the product is its squared speed. A centre that trembles around a place
    has ways two frames apart that are independent, and their product is 0 on average (neighbouring ways are
    not independent: they share a frame).

    Args:
        reading: of ``measure``, at least 4 frames.
        window: mean over so many products around each frame, ``[B, F - window - 2]``; None: over the clip,
            ``[B]``.
    """
    products = (reading.way[:, :-2] * reading.way[:, 2:]).sum(dim=-1)  # [B, F - 3]
    mean = products.mean(dim=1) if window is None else products.unfold(1, window, 1).mean(dim=-1)
    return mean.clamp_min(0).sqrt()
