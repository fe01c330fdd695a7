"""Stream a job chunk by chunk, beside the published path, and collect the figures of the report."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import benchmarks as bench
import rf_kernels as rf
from reward_forcing.folder import StreamFolder
from reward_forcing.job import PreparedStream

from . import traffic
from .compare import PublishedTwin, op_rows


def memory_bytes(device: torch.device) -> int:
    """Allocated bytes on a GPU; on the CPU the resident set of the process (Linux), else its peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flatness(values: list[float], skip: int) -> dict:
    """Median of the last third over the median of the first third of the steady part."""
    steady = values[min(skip, max(0, len(values) - 3)) :]
    third = max(1, len(steady) // 3)
    first, last = (
        torch.tensor(part, dtype=torch.float64).median().item() for part in (steady[:third], steady[-third:])
    )
    return {"first_third": first, "last_third": last, "ratio": last / first if first else None}


def run(
    prepared: PreparedStream,
    cache: rf.SinkWindowCache,
    folder: StreamFolder,
    *,
    compare: bool,
    measure_seconds: float,
    progress: Callable,
) -> dict:
    """Stream the clip into the folder; the figures of the report.

    Args:
        compare: run the published path beside the stream, on the same noise.
        measure_seconds: time spent on each op beside its peer.
        progress: wraps the iteration over chunks, e.g. tqdm.
    """
    job, stream, config = prepared.job, prepared.job.stream, prepared.model.config
    device, dtype, grid = prepared.model.device, prepared.model.dtype, config.grid(job.height, job.width)
    twin = PublishedTwin(prepared, grid) if compare else None
    phases: dict[str, float] = defaultdict(float)

    def on_phase(phase):
        phases[phase.name] += phase.seconds

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    chunks = []
    begin = clock()
    for chunk in progress(prepared.chunks(cache, on_phase=on_phase)):
        seconds, frames = clock() - begin, chunk.latents.shape[1]
        row = {"index": chunk.index, "first_frame": chunk.first_frame, "frames": frames, "seconds": seconds}
        row |= {"phases": dict(phases), "memory_bytes": memory_bytes(device)}
        if twin is not None:
            begin = clock()
            expected = twin.chunk(chunk).double()
            row["published_seconds"] = clock() - begin
            row["relative_l2"] = float((chunk.latents.double() - expected).norm() / expected.norm())
        chunks.append(row)
        folder.append(chunk.latents[0])
        phases.clear()
        begin = clock()

    # chunks until the cache is full and has evicted
    warm = -(-stream.local_attn_size // stream.chunk_frames) + 1
    figures = {
        "environment": bench.environment(),
        "job": {k: str(v) if isinstance(v, Path | torch.dtype) else v for k, v in asdict(job).items()},
        "model": asdict(config),
        "chunks": chunks,
        "cache_bytes": cache.nbytes,
        "time_per_chunk": flatness([c["seconds"] for c in chunks], warm),
        "memory": flatness([float(c["memory_bytes"]) for c in chunks], warm),
        "phases": {
            name: sum(c["phases"].get(name, 0.0) for c in chunks)
            for name in ("denoise", "renoise", "context")
        },
        "ops": op_rows(config, stream, grid, 1, dtype, device, measure_seconds),
        "bytes_per_chunk": traffic.count(config, stream, grid, 1, dtype, len(stream.denoising_step_list) + 1),
    }
    if twin is not None:
        steady = chunks[min(warm, len(chunks) - 1) :]
        slower = torch.tensor([c["published_seconds"] / c["seconds"] for c in steady])
        figures["agreement"] = {
            "largest_relative_l2": max(c["relative_l2"] for c in chunks),
            "last_relative_l2": chunks[-1]["relative_l2"],
            "published_over_ours_seconds": slower.median().item(),
        }
    return figures
