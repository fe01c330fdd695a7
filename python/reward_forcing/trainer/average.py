"""The exponential moving average of the weights, in float32 from construction: what ``generate`` and every
evaluation use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import local


class WeightAverage:
    """``average <- d average + (1 - d) weights`` after every optimizer step, ``d = min(decay, (1 + n) / (10 +
    n))``: the first steps count less.

    The average exists from construction, so that a resume never starts it anew. Sharded weights are averaged
    shard by shard.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.weights = {
            name: t.detach().to(torch.float32, copy=True) for name, t in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in model.state_dict().items():
            local(self.weights[name]).lerp_(local(weight).to(torch.float32), 1 - decay)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, weight in self.weights.items():
            local(weight).copy_(local(state["weights"][name]))
