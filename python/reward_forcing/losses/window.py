"""Self-Forcing++: distribution matching on a window of a rollout longer than the teacher's horizon (arXiv
2510.02283)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .._check import expect
from .dmd import dmd_loss
from .objective import Batch, Objective


def window(batch: Batch, first: int, frames: int) -> Batch:
    """The batch, of ``frames`` frames from ``first`` on; gradient reaches those frames alone."""
    total = batch.x.shape[1]
    fits = 0 <= first and 0 < frames and first + frames <= total
    expect(fits, "window", "frames", f"within the rollout's {total}", f"{frames} from {first}")

    def cut(part: Tensor) -> Tensor:
        return part[:, first : first + frames]

    return replace(
        batch,
        x=cut(batch.x),
        noise=cut(batch.noise),
        entered=cut(batch.entered),
        entered_t=batch.entered_t[first : first + frames],
        draw=lambda name: cut(batch.draw(name)),
        clips=lambda: cut(batch.clips()),
    )


@dataclass(frozen=True)
class SelfForcingPP(Objective):
    """DMD on a window that begins at any frame, each as likely; generator and critic have one each. The
    rollout (``frames`` of the file) is without gradient up to the exit forwards, as always here.

    Args:
        window: its frames; the published teacher's horizon is 21.
    """

    window: int = 21

    def _cut(self, batch: Batch) -> Batch:
        starts = batch.x.shape[1] - self.window + 1
        return window(batch, int(batch.uniform("window") * max(starts, 1)), self.window)

    def generator_loss(self, batch: Batch) -> Tensor:
        batch = self._cut(batch)
        return dmd_loss(batch.x, **batch.arguments)

    def critic_loss(self, batch: Batch) -> Tensor:
        return super().critic_loss(self._cut(batch))
