"""What the CPU backend aims at: ratios of medians of one run on 2 cores, float32, both sides doing the same
job."""

from dataclasses import dataclass

import torch

from . import dmd_gradient, layer
from .case import Case

_GRID = (15, 26)


@dataclass(frozen=True)
class Aim:
    """``figure``: time of ``over`` divided by time of ``under``; at least (or at most) ``bound``."""

    text: str
    case: Case
    over: str
    under: str
    bound: float
    at_most: bool = False

    def judge(self, results: dict[str, dict]) -> dict:
        """``results`` by case id. ``met`` is None where the case was not measured, or not on the CPU."""
        verdict = {
            "aim": self.text,
            "case": self.case.id,
            "bound": f"{'<=' if self.at_most else '>='} {self.bound}",
            "figure": None,
            "met": None,
        }
        result = results.get(self.case.id)
        if result is not None and result["device"] == "cpu":
            figure = result["timings"][self.over]["p50"] / result["timings"][self.under]["p50"]
            verdict |= {
                "figure": figure,
                "met": figure <= self.bound if self.at_most else figure >= self.bound,
            }
        return verdict


def aims() -> list[Aim]:
    forward = layer.case("repeat forward", layer.Layer(_GRID, torch.float32))
    update = layer.case("update", layer.Layer(_GRID, torch.float32, rotary=False))
    loss = next(case for case in dmd_gradient.cases() if case.quick and case.dtype == torch.float32)
    return [
        Aim(
            "repeat forward of one layer: times faster than the published path",
            forward,
            "published",
            "rf_kernels",
            1.3,
        ),
        Aim(
            "repeat forward of one layer: time over SDPA alone on ready tensors",
            forward,
            "rf_kernels",
            "sdpa",
            1.15,
            True,
        ),
        Aim(
            "evict + append: times faster than roll, average, write, concatenate",
            update,
            "published",
            "rf_kernels",
            5.0,
        ),
        Aim(
            "DMD gradient, loss, norms, dx: times faster than eager float64", loss, "float64", "dmd_loss", 8.0
        ),
    ]


def line(verdict: dict) -> str:
    """`figure, aim, met or missed`."""
    if verdict["met"] is None:
        return f"{verdict['aim']}: not measured (aim {verdict['bound']} on the CPU)"
    state = "met" if verdict["met"] else "MISSED"
    return f"{verdict['aim']}: {verdict['figure']:.2f} (aim {verdict['bound']}): {state}"
