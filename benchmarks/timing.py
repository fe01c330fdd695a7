"""Timing side by side: candidates run in turn, round after round in one process, so that what the machine
does in between meets all of them alike. CPU times are for ratios; absolute times are quoted for GPUs
alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

# Larger than any L2 there is (H200: 50 MB): reading it between GPU calls leaves nothing of a candidate's
# input in the cache. Reading, not writing: lines that are written back to memory during the call would be in
# the time of every short one.
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds per call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        cut = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
        return cls(cut[1], statistics.median(seconds), cut[7], len(seconds))


def measure(
    candidates: dict[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time each candidate, interleaved, for about ``seconds`` per candidate (at least 5 rounds, at most
    1000).

    On CUDA each call is timed by events behind a read of more than the whole L2 (cold reads); on the CPU by
    the clock.
    """
    device = torch.device(device)
    for _ in range(warmup):
        for call in candidates.values():
            call()
    cuda = device.type == "cuda"
    if cuda:
        flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        torch.cuda.synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds * len(candidates)
    while (time.perf_counter() < end or len(next(iter(times.values()))) < 5) and len(
        next(iter(times.values()))
    ) < 1000:
        for name, call in candidates.items():
            if cuda:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.sum()
                start.record()
                call()
                stop.record()
                stop.synchronize()
                times[name].append(start.elapsed_time(stop) / 1e3)
            else:
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return {name: Timing.of(values) for name, values in times.items()}


def roof(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, float]:
    """What this machine does at best, measured as the candidates are: ``bytes_per_s`` of a large copy,
    ``flops_per_s`` of a large matrix product in ``dtype``."""
    large, side = (1 << 28, 8192) if torch.device(device).type == "cuda" else (1 << 25, 1024)
    source = torch.randn(large, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # zeros and ones draw less power: the clock would be higher
    a = torch.randn(side, side, device=device).to(dtype)
    timings = measure(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, device=device, seconds=0.5
    )
    return {
        "bytes_per_s": 2 * source.nbytes / timings["copy"].p20,
        "flops_per_s": 2 * side**3 / timings["matmul"].p20,
    }


def row(
    op: str,
    shape: str,
    dtype: torch.dtype,
    timings: dict[str, Timing],
    *,
    flops: int = 0,
    nbytes: int = 0,
    roof: dict[str, float] | None = None,
) -> dict:
    """One result: the first timing is ours, the others are its peers. With ``roof``, also how near ours comes
    to the longer of the times that the bytes and the FLOPs need there."""
    name, *peers = timings
    ours = timings[name]
    floor = max(nbytes / roof["bytes_per_s"], flops / roof["flops_per_s"]) if roof else 0.0
    return {
        "op": op,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "timings": {n: asdict(t) for n, t in timings.items()},
        "tflops": flops / ours.p50 / 1e12 if flops else None,
        "gbytes_per_s": nbytes / ours.p50 / 1e9 if nbytes else None,
        "percent_of_roof": 100 * floor / ours.p50 if floor else None,
        "times_faster_than": {peer: timings[peer].p50 / ours.p50 for peer in peers},
    }


def line(result: dict) -> str:
    """`op shape dtype | us (p50, p20-p80) | TFLOP/s | GB/s | % of roof | x vs peer`."""
    ours = next(iter(result["timings"].values()))
    parts = [f"{result['op']} {result['shape']} {result['dtype']}"]
    parts.append(f"{ours['p50'] * 1e6:.1f} us ({ours['p20'] * 1e6:.1f}-{ours['p80'] * 1e6:.1f})")
    if result["tflops"]:
        parts.append(f"{result['tflops']:.4f} TFLOP/s")
    if result["gbytes_per_s"]:
        parts.append(f"{result['gbytes_per_s']:.1f} GB/s")
    if result["percent_of_roof"]:
        parts.append(f"{result['percent_of_roof']:.0f}% of roof")
    parts += [f"{ratio:.2f}x vs {peer}" for peer, ratio in result["times_faster_than"].items()]
    return " | ".join(parts)


def geometric_means(results: list[dict]) -> dict[str, dict[str, float]]:
    """op -> peer -> geometric mean over the op's results of "times faster than"."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for peer, ratio in result["times_faster_than"].items():
            ratios.setdefault(result["op"], {}).setdefault(peer, []).append(ratio)
    return {
        op: {peer: statistics.geometric_mean(values) for peer, values in peers.items()}
        for op, peers in ratios.items()
    }
