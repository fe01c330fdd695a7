"""A stream as a job: what to stream and from which checkpoint, all of it checked before the first forward."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import rf_kernels as rf

from ._check import expect
from .checkpoint import CheckpointError, build_model, infer_config, read_checkpoint, read_safetensors
from .config import ModelConfig, StreamConfig
from .models import CausalWanModel
from .pipeline import Chunk, StreamingPipeline

_WHO = "StreamJob"


@dataclass(frozen=True)
class StreamJob:
    """What to stream.

    Args:
        checkpoint: .safetensors or .pt file in the published format.
        frames, height, width: of the latent clip.
        heads: attention heads. Tensors do not show them; needed unless width and depth are a published
            model's.
        context: .safetensors file with text features ``[1, n, text_dim]`` named `context`; random features
            without it.
        seed: of all noise, and of random text features.
        stream: chunks, window, sink and schedule.
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
    stream: StreamConfig = field(default_factory=StreamConfig)

    def settings(self) -> dict:
        """All that the latents depend on, in JSON types; files by a fingerprint of their contents."""
        values = {**asdict(self), **asdict(self.stream)}
        del values["stream"]
        values["denoising_step_list"] = list(self.stream.denoising_step_list)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values | {name: _fingerprint(values[name]) for name in ("checkpoint", "context")}

    def prepare(self) -> PreparedStream:
        """Check everything, then load the model.

        Raises:
            rf_kernels.ArgumentError: which field cannot be, what was expected, what was found.
        """
        device = _device(self.device, self.dtype)
        with _refused_as("checkpoint", "a readable checkpoint of a causal Wan model"):
            state = read_checkpoint(self.checkpoint)
        if self.heads is None:
            with _refused_as("heads", "the number of attention heads"):
                config = infer_config(state)
        else:
            with _refused_as("checkpoint", "a checkpoint of a causal Wan model"):
                config = infer_config(state, num_heads=self.heads)
        self._check_sizes(config)
        weights = sum(t.numel() for t in state.values())
        self._check_memory(config, weights, device)
        context = self._context(config).to(device, self.dtype)
        with _refused_as("checkpoint", "a checkpoint of a causal Wan model"):
            source = str(self.checkpoint)
            model = build_model(CausalWanModel, state, config, source=source, dtype=self.dtype, device=device)
        return PreparedStream(self, model, StreamingPipeline(model, self.stream), context)

    def _check_sizes(self, config: ModelConfig) -> None:
        stream = self.stream
        for name in ("frames", "height", "width"):
            expect(getattr(self, name) >= 1, _WHO, name, "at least 1", getattr(self, name))
        config.grid(self.height, self.width)
        first = int(stream.independent_first_frame)
        whole = (self.frames - first) % stream.chunk_frames == 0
        multiple = f"{'1 + ' * first}a multiple of the {stream.chunk_frames} frames of a chunk"
        expect(whole, _WHO, "frames", multiple, self.frames)
        # Frames of the sink have slots of their own until it is full, so the last chunk needs the largest
        # window.
        needed = min(self._together, max(0, self.frames - stream.sink_frames))
        found = (
            f"{stream.window_frames} ({stream.local_attn_size} frames attended, {stream.sink_frames} of the"
            " sink)"
        )
        expect(stream.window_frames >= needed, _WHO, "local_attn_size", f"a window of {needed} frames", found)
        # Whether the policy can serve such a cache.
        sizes = {"layers": 1, "batch": 1, "heads": 1, "head_dim": config.head_dim, "grid": (1, 1)}
        frames = {"sink_frames": stream.sink_frames, "window_frames": stream.window_frames}
        spec = rf.CacheSpec(**sizes, **frames, rope=config.rope, dtype=self.dtype, device="meta")
        stream.policy().bind(spec)

    @property
    def _together(self) -> int:
        """Frames of the largest forward."""
        stream = self.stream
        return stream.chunk_frames * (len(stream.denoising_step_list) if stream.rolling else 1)

    def _check_memory(self, config: ModelConfig, weights: int, device: torch.device) -> None:
        """Refuse what cannot fit: weights, cache and the widest tensors of one forward, each at its least."""
        stream, size = self.stream, self.dtype.itemsize
        frame_tokens = math.prod(config.grid(self.height, self.width))
        chunk_tokens = self._together * frame_tokens
        parts = {
            "weights": weights * size,
            "cache": 2 * config.num_layers * stream.local_attn_size * frame_tokens * config.dim * size,
            "one forward": chunk_tokens * (2 * config.dim + config.ffn_dim) * size,
        }
        needed, free = sum(parts.values()), free_memory(device)
        found = ", ".join(f"{name} {_gib(n)}" for name, n in parts.items())
        fits = free is None or needed <= free
        sizes = "height, width, chunk_frames, local_attn_size"
        free_text = f"sizes that fit the {_gib(free or 0)} free on {device}"
        expect(fits, _WHO, sizes, free_text, f"at least {_gib(needed)} ({found})")

    def _context(self, config: ModelConfig) -> Tensor:
        if self.context is None:
            return ChunkNoise(self.seed, "text").draw((1, config.text_len, config.text_dim))
        with _refused_as("context", "a readable safetensors file"):
            tensors = read_safetensors(Path(self.context))
        shape = (
            f"a tensor named `context`, [n, {config.text_dim}] with n in 1..{config.text_len}, of floating"
            " point"
        )
        found = f"{self.context} with {sorted(tensors)[:8]}"
        expect("context" in tensors, _WHO, "context", shape, found)
        context = tensors["context"]
        found = f"{context.dtype} {list(context.shape)}"
        context = context[0] if context.dim() == 3 and len(context) == 1 else context
        fits = (
            context.dim() == 2
            and 1 <= len(context) <= config.text_len
            and context.shape[1] == config.text_dim
        )
        expect(fits and context.is_floating_point(), _WHO, "context", shape, found)
        expect(bool(context.isfinite().all()), _WHO, "context", "finite numbers", "a NaN or an infinity")
        return context.unsqueeze(0)


@dataclass(frozen=True)
class PreparedStream:
    """A checked job with its model, ready to stream."""

    job: StreamJob
    model: CausalWanModel
    pipeline: StreamingPipeline
    context: Tensor

    def new_cache(self) -> rf.SinkWindowCache:
        return self.pipeline.new_cache(1, self.job.height, self.job.width)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the finished latents."""
        return self.job.frames, self.model.config.in_dim, self.job.height, self.job.width

    def noise(self, first_frame: int) -> ChunkNoise:
        """The noise of the chunk that begins at a frame: its initial noise first, then one draw a
        renoising."""
        return ChunkNoise(self.job.seed, first_frame, self.model.device, self.model.dtype)

    def chunks(
        self, cache: rf.SinkWindowCache, carry: Tensor | None = None, on_phase=None
    ) -> Iterator[Chunk]:
        """Stream from where the cache stands to the job's last frame. ``carry``: that of the chunk before.

        Raises:
            FloatingPointError: a chunk that is not finite. The stream ends before it.
        """
        stream, (frames, *size) = self.job.stream, self.shape
        begin, step, levels = (
            self.pipeline.next_frame(cache, carry),
            stream.chunk_frames,
            self.pipeline.timesteps,
        )
        current: deque[ChunkNoise] = deque(maxlen=len(levels))  # of the newest chunks
        if stream.rolling and carry is not None:
            for i in range(carry.shape[1] // step):  # they drew their first noise, and one a forward
                current.append(self.noise(begin))
                for _ in range(len(levels) - i):
                    current[-1].draw((1, step, *size))
                begin += step

        def noise_chunks() -> Iterator[Tensor]:
            frame = begin
            while frame < frames:
                length = 1 if frame == 0 and stream.independent_first_frame else step
                current.append(self.noise(frame))
                yield current[-1].draw((1, length, *size))
                frame += length

        def noise_source(like: Tensor) -> Tensor:
            count = like.shape[1] // step if stream.rolling else 1
            shape = (1, like.shape[1] // count, *size)
            return torch.cat([noise.draw(shape) for noise in list(current)[-count:]], dim=1)

        options = {"noise_source": noise_source, "on_phase": on_phase}
        chunks = self.pipeline.stream(noise_chunks(), self.context, cache=cache, carry=carry, **options)
        for chunk in chunks:
            if not torch.isfinite(chunk.latents).all():
                last = chunk.first_frame + chunk.latents.shape[1] - 1
                where = f"frames {chunk.first_frame}..{last}"
                raise FloatingPointError(f"{where}: expected finite latents, found a NaN or an infinity")
            yield chunk


class ChunkNoise:
    """Gaussian noise that depends on a seed and a place in the stream alone, so that a resumed stream draws
    the same.

    Numbers are drawn on the CPU: every device gets the same.
    """

    def __init__(self, seed: int, place: int | str, device="cpu", dtype: torch.dtype = torch.float32):
        self.place = place
        digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        self._to = {"device": device, "dtype": dtype}

    def draw(self, shape) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator, device="cpu").to(**self._to)


@contextmanager
def _refused_as(argument: str, expected: str) -> Iterator[None]:
    """What the file layer refuses, in the words of an argument that was refused."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        expect(False, _WHO, argument, expected, " ".join(str(error).split()))


def _device(name: str, dtype: torch.dtype) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    known = device is not None and device.type in ("cpu", "cuda")
    expect(known, _WHO, "device", "cpu, cuda or cuda:N", repr(name))
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = "no CUDA device" if not count else f"{count} CUDA devices"
    expect((device.index or 0) < count, _WHO, "device", f"a device for {name!r}", found)
    expect(dtype != torch.float64, _WHO, "dtype", "float32, bfloat16 or float16 on a CUDA device", "float64")
    built = rf.build_info().get("cuda_archs")
    expect(bool(built), _WHO, "device", "cpu, as the extension was built without CUDA", repr(name))
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))  # of a container; "max" without one
    except (OSError, KeyError, ValueError):
        pass
    return min(limits, default=None)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _fingerprint(path: str | os.PathLike | None, blocks: int = 256, block: int = 4096) -> str | None:
    """Size and a hash of blocks spread over a file: another training step changes every tensor, so some of
    them."""
    if path is None:
        return None
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, size - block) * i // (blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()
