"""What a benchmark stage does, in its own process: jobs one after another, a row each, written as soon as it
exists.

A job that fails is a row with its error. A peer that fails, disagrees or is absent is named in the row, with
the reason, and not timed.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rf_kernels.testing import relative_l2

from .. import Case, measure, roof, row


class Rows:
    """A file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, kind: str, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")


@dataclass(frozen=True)
class Options:
    """Of a stage: ``seconds`` of timing per candidate, ``limit`` of the whole stage in seconds; ``tiny``
    shapes for a dry run."""

    device: str
    rows: Rows
    seconds: float
    limit: float
    tiny: bool
    quick: bool
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def parse(cls, arguments=None) -> "Options":
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", required=True)
        parser.add_argument("--rows", type=Path, required=True)
        parser.add_argument("--seconds", type=float, default=0.15)
        parser.add_argument("--limit", type=float, default=60)
        parser.add_argument("--tiny", action="store_true")
        parser.add_argument("--quick", action="store_true")
        options = vars(parser.parse_args(arguments))
        return cls(**options | {"rows": Rows(options["rows"])})

    @property
    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.started)


@dataclass(frozen=True, eq=False)
class Job:
    """``build(device)`` returns the calls by name, ours first, all of which have been checked; and the peers
    that cannot be timed, with the reason.

    Args:
        eager: candidates that are launched from Python in every call (they read the device, or are meant to
            be timed that way); the others are replayed from a CUDA graph, so that what is timed is the
            device's work.
    """

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable[[str], tuple[dict[str, Callable[[], object]], dict[str, str]]]
    cost: dict[str, int] = field(default_factory=dict)
    eager: tuple[str, ...] = ()

    @classmethod
    def of(cls, case: Case, **more) -> "Job":
        """From a case of benchmarks, whose candidates all have to agree."""
        return cls(
            case.op, case.shape, case.dtype, lambda device: (case.candidates(device), {}), case.cost, **more
        )


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:400]


def disagreement(name: str, found: torch.Tensor, truth: torch.Tensor, ulps: float) -> str | None:
    """Why a candidate is not timed: its relative L2 error against ``truth`` is above so many units in the
    last place of its dtype."""
    error, bound = relative_l2(found, truth), ulps * torch.finfo(found.dtype).eps
    return (
        None
        if error <= bound
        else f"{name} differs from the float64 result by {error:.1e}, allowed {bound:.1e}"
    )


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call's device work as a CUDA graph's replay."""
    before = torch.cuda.current_stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails at its end leaves its own stream current
    return graph.replay


def run_job(job: Job, options: Options, roofs: dict[str, float] | None) -> dict:
    """The row of a job."""
    facts = {"op": job.op, "shape": job.shape, "dtype": str(job.dtype).removeprefix("torch.")}
    facts |= {"device": options.device, **{name: job.cost.get(name) for name in ("flops", "bytes")}}
    begin = time.perf_counter()
    try:
        torch.manual_seed(0)
        with torch.no_grad() if job.op != "dmd_gradient" else torch.enable_grad():
            calls, left_out = job.build(options.device)
            launched = {}
            for name, call in list(calls.items()):
                launched[name] = "python"
                if options.device == "cuda" and name not in job.eager:
                    try:
                        call()  # outside of the graph first: handles and workspaces
                        calls[name], launched[name] = captured(call), "graph"
                    except Exception as error:
                        left_out[f"{name} (as a graph)"] = reason(error)
            timings = measure(calls, device=options.device, seconds=options.seconds)
        counts = {"flops": job.cost.get("flops", 0), "nbytes": job.cost.get("bytes", 0)}
        result = row(job.op, job.shape, job.dtype, timings, **counts, roof=roofs)
        return (
            facts
            | result
            | {"launched": launched, "left_out": left_out, "wall_s": time.perf_counter() - begin}
        )
    except Exception as error:
        return facts | {"error": reason(error), "trace": traceback.format_exc()[-2000:]}


def run_jobs(jobs: list[Job], options: Options, roofs: dict[str, float] | None = None) -> None:
    """All jobs for which there is time; those for which there is none are rows that say so."""
    longest = 0.0
    for job in jobs:
        # every graph capture collects garbage: what lives by now need not be looked at each time
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        # a first job may have compiled its peers; the others do not take so long
        if options.left < min(longest, 6.0):
            reason_ = f"the stage's {options.limit:.0f} s were nearly over"
            options.rows.add("skipped", op=job.op, shape=job.shape, reason=reason_)
            continue
        begin = time.perf_counter()
        result = run_job(job, options, roofs)
        options.rows.add("result", **result)
        longest = max(longest, time.perf_counter() - begin)
        name = next(iter(result["timings"])) if "timings" in result else None
        shown = f"{result['timings'][name]['p50'] * 1e6:.1f} us" if name else result["error"]
        print(f"{job.op} | {job.shape} | {result['dtype']} | {shown}", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    gc.unfreeze()


def measured_roof(options: Options, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Copy bandwidth and matrix rate of this process's device."""
    if options.tiny:
        # a dry run's numbers mean nothing, and need not take long
        return {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    return roof(dtype, options.device)
