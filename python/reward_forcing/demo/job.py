"""The job behind `reward-forcing stream` and `make demo`: load a checkpoint, stream, compare chunk by chunk, collect figures."""

import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import benchmarks as bench

from ..checkpoint import infer_config, load_causal_model, read_checkpoint, read_safetensors
from ..config import StreamConfig
from ..pipeline import StreamingPipeline
from . import traffic
from .compare import PublishedTwin, op_rows


@dataclass(frozen=True)
class StreamJob:
    """What to stream.

    checkpoint: .safetensors or .pt in the published format. heads: attention heads (tensors do not show them; needed unless
    width and depth are those of a published model). frames, height, width: of the latent clip. context: text features ``[1, n,
    text_dim]`` in a .safetensors file under the name `context`; without it, random features of ``seed``.
    """

    checkpoint: Path
    frames: int
    height: int
    width: int
    heads: int | None = None
    context: Path | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compare: bool = True
    measure_seconds: float = 1.0
    stream: StreamConfig = field(default_factory=StreamConfig)


def memory_bytes(device: torch.device) -> int:
    """Allocated bytes on a GPU; on the CPU the resident set of the process (Linux), else its peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _context(job: StreamJob, config, generator: torch.Generator) -> torch.Tensor:
    if job.context is None:
        return torch.randn(1, config.text_len, config.text_dim, generator=generator, device="cpu")
    tensors = read_safetensors(Path(job.context))
    if "context" not in tensors:
        raise ValueError(f"{job.context}: expected a tensor named `context`, found {sorted(tensors)}")
    return tensors["context"].reshape(1, *tensors["context"].shape[-2:])


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _flatness(values: list[float], skip: int) -> dict:
    """Median of the last third over the median of the first third of the steady part."""
    steady = values[min(skip, max(0, len(values) - 3)) :]
    third = max(1, len(steady) // 3)
    first, last = (
        torch.tensor(part, dtype=torch.float64).median().item() for part in (steady[:third], steady[-third:])
    )
    return {"first_third": first, "last_third": last, "ratio": last / first if first else None}


def run(job: StreamJob, progress: Callable | None = None) -> tuple[torch.Tensor, dict]:
    """Stream the clip; latents ``[F, C, H, W]`` (CPU, float32) and the figures of the report.

    Args:
        progress: wraps the iteration over chunks, e.g. tqdm.
    """
    device, dtype, stream = torch.device(job.device), job.dtype, job.stream
    state = read_checkpoint(job.checkpoint)
    config = infer_config(state, num_heads=job.heads)
    model = load_causal_model(job.checkpoint, num_heads=job.heads, dtype=dtype, device=device).eval()
    pipeline = StreamingPipeline(model, stream)
    grid = config.grid(job.height, job.width)
    generator = torch.Generator().manual_seed(job.seed)
    context = _context(job, config, generator).to(device, dtype)

    def randn(shape):
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    draws: list[torch.Tensor] = []

    def noise_source(like):
        draws.append(randn(like.shape))
        return draws[-1]

    phases: dict[str, float] = defaultdict(float)
    lengths = [n.shape[1] for n in pipeline.split(torch.empty(1, job.frames, 1, 1, 1))]
    noise: list[torch.Tensor] = []  # of the chunk under way: the published path gets the same

    def noise_chunks():
        for frames in lengths:
            noise[:] = [randn((1, frames, config.in_dim, job.height, job.width))]
            yield noise[0]

    cache = pipeline.new_cache(1, job.height, job.width)
    twin = PublishedTwin(config, stream, state, 1, grid, dtype, device) if job.compare else None

    def clock():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    chunks, latents = [], []

    def on_phase(phase):
        phases[phase.name] += phase.seconds

    iterator = pipeline.stream(noise_chunks(), context, cache=cache, noise_source=noise_source, on_phase=on_phase)
    for index in progress(range(len(lengths))) if progress else range(len(lengths)):
        draws.clear()
        phases.clear()
        begin = clock()
        chunk = next(iterator)
        row = {"index": index, "first_frame": chunk.first_frame, "frames": lengths[index], "seconds": clock() - begin}
        row["phases"] = dict(phases)
        row["memory_bytes"] = memory_bytes(device)
        if twin is not None:
            begin = clock()
            expected = twin.chunk(noise[0], context, draws)
            row["published_seconds"] = clock() - begin
            row["relative_l2"] = _relative(chunk.latents, expected)
        if not torch.isfinite(chunk.latents).all():
            raise FloatingPointError(f"chunk {index} (frames {chunk.first_frame}..) is not finite")
        chunks.append(row)
        latents.append(chunk.latents[0].float().cpu())

    warm = -(-stream.local_attn_size // stream.chunk_frames) + 1  # chunks until the cache is full and has evicted
    figures = {
        "environment": bench.environment(),
        "job": {k: str(v) if isinstance(v, Path | torch.dtype) else v for k, v in asdict(job).items()},
        "model": asdict(config),
        "chunks": chunks,
        "cache_bytes": cache.nbytes,
        "time_per_chunk": _flatness([c["seconds"] for c in chunks], warm),
        "memory": _flatness([float(c["memory_bytes"]) for c in chunks], warm),
        "phases": {name: sum(c["phases"].get(name, 0.0) for c in chunks) for name in ("denoise", "renoise", "context")},
        "ops": op_rows(config, stream, grid, 1, dtype, device, job.measure_seconds),
        "bytes_per_chunk": traffic.count(config, stream, grid, 1, dtype, len(stream.denoising_step_list) + 1),
    }
    if twin is not None:
        steady = chunks[min(warm, len(chunks) - 1) :]
        figures["agreement"] = {
            "largest_relative_l2": max(c["relative_l2"] for c in chunks),
            "last_relative_l2": chunks[-1]["relative_l2"],
            "published_over_ours_seconds": torch.tensor([c["published_seconds"] / c["seconds"] for c in steady])
            .median()
            .item(),
        }
    return torch.cat(latents), figures
