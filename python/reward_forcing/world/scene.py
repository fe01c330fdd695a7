"""The embedded world: procedural video on a torus, small enough to train on two CPU cores.

One textured shape stands or drifts, turning as it goes, over a soft grey pattern that drifts on its own. A
prompt names the shape's colour and form, and may name its speed; where it does not, the speed is drawn over
the whole range (so a reward has something to choose). Everything wraps around: a position is never special,
as it never is for rotary embeddings.

The object is saturated and the background is grey, so that every read-out of ``measure`` needs the pixels
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._check import expect

COLOURS = {
    "red": (0.90, -0.70, -0.70),
    "green": (-0.70, 0.75, -0.70),
    "blue": (-0.70, -0.45, 0.95),
    "yellow": (0.90, 0.75, -0.75),
}
FORMS = ("disc", "square", "ring")
#: Pixels per frame, the range that a word stands for.
SPEEDS = {"still": (0.0, 0.0), "slow": (0.5, 0.8), "fast": (1.6, 2.2)}
OPEN_SPEED = (0.0, 2.2)
SIZE = 32
RADIUS = 6.0
_EDGE = 2.5  # width of a soft edge, pixels
_TURN = 0.12  # radians per pixel of way: what drifts also turns
_BACKGROUND_SPEED = (0.1, 0.3)


@dataclass(frozen=True)
class Prompt:
    """What a clip shows. ``speed`` None leaves it open."""

    colour: str
    form: str
    speed: str | None = None

    def __post_init__(self):
        for name, allowed in (("colour", tuple(COLOURS)), ("form", FORMS), ("speed", (*SPEEDS, None))):
            value = getattr(self, name)
            expect(value in allowed, "Prompt", name, f"one of {allowed}", repr(value))

    def __str__(self) -> str:
        return " ".join(word for word in (self.speed, self.colour, self.form) if word)

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """From words in any order, such as "a slow red disc"; words that say nothing here are refused."""
        found: dict[str, str] = {}
        for word in text.lower().split():
            kind = next((k for k, v in _VOCABULARY.items() if word in v), None)
            if word in ("a", "an", "the"):
                continue
            known = ", ".join(w for v in _VOCABULARY.values() for w in v)
            expect(
                kind is not None and kind not in found,
                "Prompt.parse",
                "text",
                f"each once, of: {known}",
                text,
            )
            found[kind] = word
        missing = [kind for kind in ("colour", "form") if kind not in found]
        expect(not missing, "Prompt.parse", "text", f"a {' and a '.join(missing)}", repr(text))
        return cls(**found)


_VOCABULARY = {"colour": tuple(COLOURS), "form": FORMS, "speed": tuple(SPEEDS)}
PROMPTS = tuple(Prompt(c, f, s) for c in COLOURS for f in FORMS for s in (*SPEEDS, None))


def draw_prompts(count: int, generator: torch.Generator, among: tuple[Prompt, ...] = PROMPTS) -> list[Prompt]:
    """``count`` prompts, each drawn uniformly from ``among``."""
    return [among[i] for i in torch.randint(len(among), (count,), generator=generator).tolist()]


def render(
    prompts: list[Prompt], frames: int, *, generator: torch.Generator, size: int = SIZE
) -> tuple[Tensor, Tensor]:
    """Clips of the prompts, and where their objects are.

    Returns:
        video ``[B, F, 3, size, size]`` in [-1, 1], float32; centres ``[B, F, 2]`` (x, y) in pixels, not
        wrapped, so that differences are the true motion.
    """
    batch = len(prompts)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    time = torch.arange(frames, dtype=torch.float32)
    ranges = torch.tensor([SPEEDS[p.speed] if p.speed else OPEN_SPEED for p in prompts])
    speed = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * rand(batch)
    heading = 2 * math.pi * rand(batch)
    velocity = torch.stack((heading.cos(), heading.sin()), dim=1) * speed[:, None]
    centres = size * rand(batch, 2)[:, None] + velocity[:, None] * time[None, :, None]
    sign = torch.where(rand(batch) < 0.5, -1.0, 1.0)
    turn = (2 * math.pi * rand(batch) + 0.0)[:, None] + (_TURN * sign * speed)[:, None] * time

    # Offsets to the object on the torus, turned into its own frame.
    axis = torch.arange(size, dtype=torch.float32)
    dx = torch.remainder(axis - centres[..., 0, None] + size / 2, size) - size / 2  # [B, F, size]
    dy = torch.remainder(axis - centres[..., 1, None] + size / 2, size) - size / 2
    dx, dy = dx[..., None, :], dy[..., :, None]
    cos, sin = turn.cos()[..., None, None], turn.sin()[..., None, None]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    radius = (dx.square() + dy.square()).sqrt()
    square = 0.85 * RADIUS
    distance = {  # signed, negative inside
        "disc": radius - RADIUS,
        "square": torch.maximum(u.abs(), v.abs()) - square,
        "ring": (radius - 0.72 * RADIUS).abs() - 0.36 * RADIUS,
    }
    pick = torch.tensor([FORMS.index(p.form) for p in prompts])
    distance = torch.stack([distance[form] for form in FORMS])[pick, torch.arange(batch)]
    mask = (0.5 - distance / _EDGE).clamp(0, 1)
    texture = 1 - 0.25 * (
        0.5 + 0.5 * torch.sin(u * (2 * math.pi / RADIUS))
    )  # stripes that turn with the object

    colour = torch.tensor([COLOURS[p.colour] for p in prompts])[:, None, :, None, None]
    body = colour * texture[:, :, None]
    background = _background(batch, time, size, rand)
    video = background * (1 - mask[:, :, None]) + body * mask[:, :, None]
    return video, centres


def _background(batch: int, time: Tensor, size: int, rand) -> Tensor:
    """A grey pattern of three waves that fit the torus, drifting: ``[B, F, 1, size, size]``."""
    axis = torch.arange(size, dtype=torch.float32) * (2 * math.pi / size)
    heading, phase = 2 * math.pi * rand(batch), 2 * math.pi * rand(batch, 3)
    speed = _BACKGROUND_SPEED[0] + (_BACKGROUND_SPEED[1] - _BACKGROUND_SPEED[0]) * rand(batch)
    way = speed[:, None] * time * (2 * math.pi / size)
    x = axis - (heading.cos()[:, None] * way)[..., None]  # [B, F, size]
    y = axis - (heading.sin()[:, None] * way)[..., None]
    level = 0.3 * (rand(batch) - 0.5)
    pattern = level[:, None, None, None].expand(batch, len(time), size, size).clone()
    for i, (a, b) in enumerate(((1, 0), (1, 1), (1, -2))):
        pattern += 0.13 * torch.sin(a * x[..., None, :] + b * y[..., :, None] + phase[:, i, None, None, None])
    return pattern[:, :, None]
