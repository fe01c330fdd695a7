"""Why the published bf16 sink does not move: the EMA of evicted tokens through ``ema_evict`` in its state
precisions, against float64.

    python benchmarks/ema_study.py        # writes benchmarks/results/ema_study.json and docs/ema_study.png

Set-up: 48 tokens of 12 x 128 channels. Keys are RMS-normalised with a weight per channel (log-normal, sigma
0.5), values are unit Gaussian; along the evictions each element is an AR(1) process (rho = 0.9) plus a part
that stays (a quarter of the variance). All states start from the same bf16 sink and see the same bf16 tokens,
at angle zero, where "published" is bit for bit ``alpha * sink + (1 - alpha) * evicted`` in bf16 PyTorch
(checked here at every eviction).
"""

import argparse
import json
from pathlib import Path

import torch

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits, relative_l2

ROOT = Path(__file__).resolve().parents[1]
RESULT, PICTURE = ROOT / "benchmarks/results/ema_study.json", ROOT / "docs/ema_study.png"
TOKENS, HEADS, HEAD_DIM = 48, 12, 128
RHO, STATIC_SHARE = 0.9, 0.25
ALPHAS = (0.999, 0.99, 0.9)
EVICTIONS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
STATES = ("published", "compensated", "float32")


def streams(seed: int = 0):
    """Endless (key, value) tokens ``[1, TOKENS, HEADS, HEAD_DIM]`` in bf16; the first is the sink."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, TOKENS, HEADS * HEAD_DIM)

    def draw():
        return torch.randn(shape, generator=generator)

    weight = torch.exp(0.5 * torch.randn(shape[-1], generator=generator))
    still, moving = draw() * STATIC_SHARE**0.5, draw()
    while True:
        raw = still + (1 - STATIC_SHARE) ** 0.5 * moving
        key = raw[0] * torch.rsqrt(raw[0].square().mean(-1, keepdim=True)) * weight
        yield tuple(t.to(torch.bfloat16).view(1, TOKENS, HEADS, HEAD_DIM) for t in (key, raw[1]))
        moving = RHO * moving + (1 - RHO**2) ** 0.5 * draw()


class State:
    """A cache of one sink frame and one window frame, whose window frame is evicted again and again."""

    def __init__(self, precision: str, start):
        self.precision = precision
        self.caches = [torch.cat([t, t], dim=1) for t in start]
        wide = torch.float32 if precision == "float32" else torch.bfloat16
        zeros = [torch.zeros_like(start[0], dtype=wide) for _ in range(2)]
        self.k_state = start[0].to(wide, copy=True)
        self.k_state_lo = zeros[0] if precision == "compensated" else None
        self.v_state = {"published": None, "compensated": zeros[1], "float32": start[1].to(wide)}[precision]

    def evict(self, tokens, alpha: float) -> None:
        for cache, new in zip(self.caches, tokens, strict=True):
            cache[:, TOKENS:] = new
        rf.ema_evict(
            *self.caches,
            self.k_state,
            self.k_state_lo,
            self.v_state,
            schedule=torch.tensor([[0, 1, 1]], dtype=torch.int32),
            turns=torch.zeros(1, 2, 0, 2),
            alpha=alpha,
            frame_tokens=TOKENS,
            state=self.precision,
        )

    @property
    def slot(self) -> torch.Tensor:
        """Keys as attention reads them."""
        return self.caches[0][:, :TOKENS]

    @property
    def kept(self) -> torch.Tensor:
        """Keys as they are carried on."""
        return self.k_state.double() + (0 if self.k_state_lo is None else self.k_state_lo.double())


def follow(alpha: float, evictions: int) -> list[dict]:
    tokens = streams()
    start = next(tokens)
    states = {name: State(name, start) for name in STATES}
    exact, eager = start[0].double(), [t.clone() for t in start]
    untouched = torch.ones_like(start[0], dtype=torch.bool)
    rows = []
    for count in range(1, evictions + 1):
        new = next(tokens)
        for state in states.values():
            state.evict(new, alpha)
        exact = alpha * exact + (1 - alpha) * new[0].double()
        eager = [alpha * old + (1 - alpha) * x for old, x in zip(eager, new, strict=True)]
        for cache, expected in zip(states["published"].caches, eager, strict=True):
            assert_equal_bits(cache[:, :TOKENS], expected)
        untouched &= states["published"].slot == start[0]
        if count in EVICTIONS:
            published, way = states["published"].slot.double(), (exact - start[0].double()).norm()
            rows.append(
                {
                    "evictions": count,
                    "state": {name: relative_l2(state.kept, exact) for name, state in states.items()},
                    "slot": {name: relative_l2(state.slot, exact) for name, state in states.items()},
                    "no_update": relative_l2(start[0], exact),
                    "rounded_once": relative_l2(exact.to(torch.bfloat16), exact),
                    "published_never_changed": float(untouched.double().mean()),
                    "published_error_over_way": float((published - exact).norm() / way),
                }
            )
    return rows


def study(evictions: int = max(EVICTIONS)) -> dict:
    setup = {"tokens": TOKENS, "channels": HEADS * HEAD_DIM, "rho": RHO, "static_share": STATIC_SHARE}
    return {"setup": setup, "alpha": {str(alpha): follow(alpha, evictions) for alpha in ALPHAS}}


def draw(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(ALPHAS), figsize=(12, 6.2), layout="constrained", sharex=True)
    for column, (alpha, rows) in enumerate(report["alpha"].items()):
        x = [row["evictions"] for row in rows]
        top, bottom = axes[:, column]
        for label, style, values in (
            ("published: bf16 state", "o-C0", [row["state"]["published"] for row in rows]),
            ("no update at all", ":k", [row["no_update"] for row in rows]),
            ("compensated: what attention reads", "s-C1", [row["slot"]["compensated"] for row in rows]),
            ("exact, rounded once to bf16", "--k", [row["rounded_once"] for row in rows]),
            ("compensated: the state", "^-C2", [row["state"]["compensated"] for row in rows]),
            ("float32: the state", "v-C3", [row["state"]["float32"] for row in rows]),
        ):
            top.loglog(x, values, style, label=label, markersize=4)
        bottom.semilogx(
            x,
            [row["published_never_changed"] for row in rows],
            "o-C0",
            label="elements never changed",
            markersize=4,
        )
        bottom.semilogx(
            x,
            [row["published_error_over_way"] for row in rows],
            "s-C1",
            label="error / way of the exact sink",
            markersize=4,
        )
        top.set(title=f"keys, alpha = {alpha}", ylim=(1e-8, 5))
        bottom.set(xlabel="evictions", ylim=(0, 1.1), title="published bf16 state")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative L2 error against float64")
    handles, labels = (
        sum(pair, []) for pair in zip(*(a.get_legend_handles_labels() for a in axes[:, 0]), strict=True)
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--redraw", action="store_true", help="the picture alone, from the result that is there"
    )
    if parser.parse_args().redraw:
        report = json.loads(RESULT.read_text())
    else:
        report = study()
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, PICTURE)
    for alpha, rows in report["alpha"].items():
        print(alpha, rows[-1])


if __name__ == "__main__":
    main()
