"""A long stream at small size: does memory stay, does the error stay?

    python tests/helpers/soak.py --chunks 100000 --report tests/contracts/reports/soak.json

One stream of bfloat16 frames goes through a cache of every kind of sink at once. Every SAMPLE chunks the
sink's state and the attention of the chunk are compared with a float64 replay of the recursion on raw frames,
and memory is read: live tensors and their bytes, bytes in use by malloc, live Python objects, resident
memory. Allocations of one chunk are counted by the profiler before the first hundred chunks are over and
again at the end. The trend of an error is a least-squares line over means of BATCH samples, which are far
apart enough (500 chunks at a memory of 100) to be independent; the correlation of neighbouring means (`lag1`)
is reported.
"""

import argparse
import ctypes
import gc
import resource
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "tests")]

import numpy as np
import torch

import rf_kernels as rf
from helpers.provenance import provenance, write
from rf_kernels.reference.streaming import rotate, softmax_attention, token_positions
from rf_kernels.testing import relative_l2

SINK, WINDOW, FRAMES, GRID, HEADS, DIM, ALPHA = 2, 4, 2, (1, 3), 2, 32, 0.99
SAMPLE, BATCH, SETTLE = (
    20,
    25,
    1000,
)  # errors every 20 chunks, means of 25 of them, after 1000 chunks (alpha^1000 = 4e-5)
ALL = tuple(range(SINK))

POLICIES = {
    "static": rf.StaticSink(rephase=True),
    "static, compensated": rf.EMASink(ALPHA, held=ALL),
    "static, float32": rf.EMASink(ALPHA, held=ALL, state="float32"),
    "EMA, compensated": rf.EMASink(ALPHA),
    "EMA, float32": rf.EMASink(ALPHA, state="float32"),
    "EMA, published": rf.EMASink(ALPHA, state="published"),
}
PROMISED = [name for name in POLICIES if "published" not in name]


class Replay:
    """The recursion in float64 on raw frames: a static and an averaged sink over one window."""

    def __init__(self):
        self.frames, self.window = 0, deque()
        self.sinks = {"static": [], "EMA": []}

    def add(self, k, v):
        """A chunk's frames; keys without rotation, values ``[1, n, H, D]`` each."""
        for pair in zip(k.double().chunk(FRAMES, 1), v.double().chunk(FRAMES, 1), strict=True):
            if self.frames < SINK:
                for sink_frames in self.sinks.values():
                    sink_frames.append(pair)
            else:
                self.window.append(pair)
            if len(self.window) > WINDOW:
                leaving, j = self.window.popleft(), (self.frames - WINDOW - SINK) % SINK
                held = self.sinks["EMA"][j]
                self.sinks["EMA"][j] = tuple(
                    ALPHA * s + (1 - ALPHA) * x for s, x in zip(held, leaving, strict=True)
                )
            self.frames += 1

    def state(self, kind):
        """Sink keys at their own slots' phase, and values."""
        k, v = (torch.cat(parts, 1) for parts in zip(*self.sinks[kind], strict=True))
        return rotate(k, token_positions(list(ALL), GRID)), v

    def attend(self, kind, q):
        shift = self.frames - SINK - WINDOW
        frames = [j + shift for j in ALL] + list(range(self.frames - WINDOW, self.frames))
        k, v = (torch.cat(parts, 1) for parts in zip(*self.sinks[kind], *self.window, strict=True))
        q = rotate(q.double(), token_positions(list(range(self.frames - FRAMES, self.frames)), GRID))
        return softmax_attention(q, rotate(k, token_positions(frames, GRID)), v)


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def memory() -> dict[str, int]:
    """Live tensors and their bytes, bytes in use by malloc, live Python blocks, resident bytes."""
    gc.collect()
    # isinstance would wake lazy objects
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    info = libc.mallinfo2()
    return {
        "tensors": len(tensors),
        "tensor bytes": sum(x.numel() * x.element_size() for x in tensors),
        "malloc bytes": info.uordblks + info.hblkhd,
        "python blocks": sys.getallocatedblocks(),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
    }


@dataclass
class Trend:
    """Least squares over independent means: slope per 1000 chunks with its confidence interval."""

    mean: float
    slope: float
    low: float
    high: float
    lag1: float  # correlation of neighbouring means beside the line: about 0 where they are independent

    @property
    def flat(self) -> bool:
        return self.low <= 0 <= self.high


#: Student's t, two-sided at 99.9%: ten trends are judged at once. By degrees of freedom, the next smaller
#: entry is taken.
T_QUANTILES = {
    1: 636.6,
    2: 31.6,
    3: 12.9,
    4: 8.61,
    6: 5.96,
    8: 5.04,
    10: 4.59,
    15: 4.07,
    16: 4.01,
    20: 3.85,
    30: 3.65,
    60: 3.46,
    120: 3.37,
}


def trend(errors, batch: int = BATCH) -> Trend:
    """Of errors sampled every SAMPLE chunks."""
    means = np.asarray(errors)[: len(errors) // batch * batch].reshape(-1, batch).mean(1)
    at = np.arange(len(means)) * SAMPLE * batch / 1000
    centred = at - at.mean()
    slope = float((centred * means).sum() / (centred**2).sum())
    residual = means - means.mean() - slope * centred
    freedom = len(means) - 2
    deviation = float(np.sqrt((residual**2).sum() / freedom / (centred**2).sum()))
    width = T_QUANTILES[max(n for n in T_QUANTILES if n <= freedom)] * deviation
    lag1 = float((residual[1:] * residual[:-1]).sum() / ((residual**2).sum() or 1.0))
    return Trend(float(means.mean()), slope, slope - width, slope + width, lag1)


@dataclass
class Report:
    chunks: int
    state: dict[str, Trend]
    attention: dict[str, Trend]
    early: dict[str, int]
    late: dict[str, int]
    peak_growth: int
    allocations: tuple[int, int]
    seconds: float = field(default=0.0)


def allocations_of(call) -> int:
    """Allocations of tensor memory during a call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def soak(chunks: int, *, seed: int = 0, batch: int = BATCH, plant=None) -> Report:
    """Stream ``chunks`` chunks. ``plant(caches)``, called after each, is for faults that must be found."""
    start = time.perf_counter()
    spec = rf.CacheSpec(
        layers=1,
        batch=1,
        heads=HEADS,
        head_dim=DIM,
        grid=GRID,
        sink_frames=SINK,
        window_frames=WINDOW,
        rope=rf.RoPE3D.wan(DIM),
        dtype=torch.bfloat16,
        device="cpu",
    )
    caches = {name: rf.SinkWindowCache(spec, sink=policy) for name, policy in POLICIES.items()}
    replay, generator = Replay(), torch.Generator().manual_seed(seed)
    shape = (1, FRAMES * GRID[0] * GRID[1], HEADS, DIM)
    scene = torch.randn(
        shape, generator=generator
    )  # frames of a video resemble each other: an average of them is not zero
    samples = max(1, (chunks - SETTLE) // SAMPLE)
    errors = {name: np.zeros((2, samples)) for name in POLICIES}
    outputs = {}
    growth = 0

    def chunk():
        q, k, v = (scene + torch.randn(shape, generator=generator) for _ in range(3))
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        for name, cache in caches.items():
            with cache.chunk(FRAMES) as opened:
                outputs[name] = opened.attend(0, q, k, v)
        replay.add(k, v)
        return q

    def compare(q, sample):
        for name, cache in caches.items():
            kind = name.split(",")[0]
            pairs = zip(cache.sink_state(0), replay.state(kind), strict=True)
            worst = max(relative_l2(actual, expected) for actual, expected in pairs)
            attention = relative_l2(outputs[name], replay.attend(kind, q))
            errors[name][:, sample] = worst, attention

    first_count = 0
    for i in range(chunks):
        if i == 50:  # once the buffers of everything have been through their first use
            first_count = allocations_of(chunk)
        q = chunk()
        if plant:
            plant(caches)
        sample = (i - SETTLE) // SAMPLE
        if i >= 10 and i % SAMPLE == 0:
            compare(q, max(0, min(sample, samples - 1)))
        if i == 100:
            early = memory()
        elif i > 100 and i % 500 == 0:
            growth = max(growth, memory()["resident"] - early["resident"])
    late = memory()
    growth = max(growth, late["resident"] - early["resident"])
    last_count = allocations_of(chunk)
    states, attentions = ({name: trend(errors[name][row], batch) for name in POLICIES} for row in (0, 1))
    took = time.perf_counter() - start
    return Report(chunks, states, attentions, early, late, growth, (first_count, last_count), took)


def table(report: Report) -> str:
    lines = [
        (
            f"{report.chunks} chunks of {FRAMES} frames, {report.seconds:.0f} s; relative L2 errors against"
            " the float64 replay, slope per 1000 chunks with its 99.9% interval"
        ),
        "",
    ]
    lines.append(f"{'sink':20} {'of':10} {'mean':>10} {'slope':>11} {'interval':>25}")
    for name in POLICIES:
        for what, trends in (("state", report.state), ("attention", report.attention)):
            t = trends[name]
            verdict = "" if t.flat else "  trend"
            lines.append(
                f"{name:20} {what:10} {t.mean:10.3e} {t.slope:11.2e} [{t.low:11.2e}, {t.high:11.2e}]{verdict}"
            )
    lines += ["", f"{'memory':16} {'chunk 100':>12} {'end':>12}"]
    lines += [f"{name:16} {report.early[name]:12} {report.late[name]:12}" for name in report.early]
    lines.append(
        f"{'allocations':16} {report.allocations[0]:12} {report.allocations[1]:12}   (of one chunk, all"
        " sinks)"
    )
    lines.append(f"largest growth of resident memory after chunk 100: {report.peak_growth} bytes")
    return "\n".join(lines)


def as_report(report: Report, facts: dict) -> dict:
    """The report as it is committed: figures, what they were judged by, and where they come from."""
    promised = [trends[name] for trends in (report.state, report.attention) for name in PROMISED]
    memory_is_constant = all(report.early[name] == report.late[name] for name in ("tensors", "tensor bytes"))
    return {
        "command": (
            f"python tests/helpers/soak.py --chunks {report.chunks} --report"
            " tests/contracts/reports/soak.json"
        ),
        **facts,
        "chunks": report.chunks,
        "seconds": round(report.seconds),
        "verdicts": {
            "live tensors and their bytes constant": memory_is_constant,
            "allocations of a chunk constant": report.allocations[0] == report.allocations[1] > 0,
            "resident memory below 1 MiB after chunk 100": report.peak_growth < 1 << 20,
            "no trend": all(trend.flat for trend in promised),
        },
        "largest growth of resident memory after chunk 100": report.peak_growth,
        "allocations of a chunk": {"chunk 50": report.allocations[0], "end": report.allocations[1]},
        "memory": {"chunk 100": report.early, "end": report.late},
        "errors": (
            "relative L2 against a float64 replay; slope per 1000 chunks, interval at 99.9% (ten are judged"
            " at once)"
        ),
        "sinks": {
            name: {
                "promised": name in PROMISED,
                "state": asdict(report.state[name]),
                "attention": asdict(report.attention[name]),
            }
            for name in POLICIES
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.chunks < (least := SETTLE + 3 * SAMPLE * BATCH):
        parser.error(f"a trend takes at least {least} chunks")
    torch.set_num_threads(1)
    facts = provenance("torch", "numpy")  # of the start
    done = soak(arguments.chunks, seed=arguments.seed)
    print(table(done))
    if arguments.report:
        written = as_report(done, facts)
        write(arguments.report, written)
        sys.exit(0 if all(written["verdicts"].values()) else 1)
