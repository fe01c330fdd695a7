"""``reward-forcing train --plan``: what a run would take on each rank, without allocating it.

Parameters are counted on the device "meta", sharded as FSDP2 shards them (by their first dimension, rounded
up: rank 0 holds the most). Activations are the peak of the live tensors of the run's own forwards and
backwards, executed on "meta" at full depth. Not counted: what the source of data holds (a text encoder, a
decoder for the reward), buffers of the collectives, and the allocator's fragments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rf_kernels as rf

from .._check import expect
from ..config import ModelConfig
from ..models import BidirectionalWanModel, CausalWanModel
from ..models.blocks import WanTransformer
from ..models.head_parallel import HeadParallel, share_heads
from .config import TrainConfig
from .teacher_forcing import TeacherForcedWan

_FLOAT32 = 4
_COLUMNS = ("parameters", "gradients", "optimizer", "average")


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Network:
    """One network of a run, and what a micro-step does with it."""

    name: str
    kind: type[WanTransformer]
    sizes: ModelConfig
    trains: bool
    averaged: bool = False


def networks(config: TrainConfig) -> list[Network]:
    """The networks that a stage holds."""
    teacher = Network("teacher", BidirectionalWanModel, config.teacher_model or config.model, trains=False)
    if config.stage == "teacher":
        return [Network("teacher", BidirectionalWanModel, config.model, True, True)]
    if config.stage == "distill":
        critic = Network("critic", BidirectionalWanModel, config.model, True)
        return [Network("generator", CausalWanModel, config.model, True, True), critic, teacher]
    student = Network("generator", TeacherForcedWan, config.model, True, True)
    return [student, teacher] if config.stage == "ode" else [student]


def shard_numel(shape: Sequence[int], ranks: int) -> int:
    """Elements of a parameter on the rank that holds the most of it."""
    return -(-shape[0] // ranks) * prod(shape[1:]) if len(shape) else 1


def plan(config: TrainConfig, ranks: int, *, height: int, width: int) -> dict:
    """Bytes on one rank of ``ranks``, for latents of ``height`` x ``width``.

    Returns:
        ``networks`` (by name: parameters, gradients, optimizer, average, their total; gathered blocks and the
        peak of activations, which come and go), ``cache``, and ``total``: all that stays, and the largest of
        what comes and goes.
    """
    together = config.head_parallel
    expect(ranks % together == 0, "plan", "head_parallel", f"a divisor of {ranks} ranks", together)
    dtype = getattr(torch, config.compute)
    samples = max(1, config.batch // (ranks // together))
    found = {"ranks": ranks, "samples_per_rank": samples, "networks": {}, "cache": 0}
    for network in networks(config):
        with torch.device("meta"):
            model = network.kind(network.sizes)
        entry = _held(network, model, ranks, dtype.itemsize)
        alone = ranks == 1 and dtype == torch.float32
        entry["gathered"] = 0 if alone else _gathered(model, dtype.itemsize)
        work = _Work(config, model.to(dtype), samples, height, width)
        entry["activations"] = work.peak(network)
        found["cache"] = max(found["cache"], work.cache_bytes)
        found["networks"][network.name] = entry
    held = sum(entry["held"] for entry in found["networks"].values())
    passing = max(entry["gathered"] + entry["activations"] for entry in found["networks"].values())
    found["total"] = held + found["cache"] + passing
    return found


def _held(network: Network, model: WanTransformer, ranks: int, itemsize: int) -> dict[str, int]:
    shapes = [tuple(p.shape) for p in model.parameters()]
    numel = sum(shard_numel(shape, ranks) for shape in shapes)
    entry = dict.fromkeys(_COLUMNS, 0) | {"numel": sum(map(prod, shapes))}
    entry["parameters"] = numel * (_FLOAT32 if network.trains else itemsize)
    if network.trains:
        entry["gradients"] = numel * _FLOAT32
        entry["optimizer"] = (2 * numel + len(shapes)) * _FLOAT32  # AdamW: two moments, and a count each
    if network.averaged:
        entry["average"] = numel * _FLOAT32
    return entry | {"held": sum(entry[column] for column in _COLUMNS)}


def _gathered(model: WanTransformer, itemsize: int) -> int:
    """The root, the block that computes and the one that is fetched ahead, whole, in the computing dtype."""
    block = sum(p.numel() for p in model.blocks[0].parameters())
    blocks = block * len(model.blocks)
    root = sum(p.numel() for p in model.parameters()) - blocks
    return (root + min(2 * block, blocks)) * itemsize


class _Work:
    """The forwards and backwards of one network."""

    def __init__(
        self, config: TrainConfig, model: WanTransformer, samples: int, height: int, width: int, device="meta"
    ):
        self.config, self.model, self.samples, self.device = config, model, samples, device
        self.size, self.cache_bytes = (height, width), 0
        model.checkpointing = config.checkpointing
        if config.head_parallel > 1:
            share_heads(model, HeadParallel.alone(config.head_parallel, model.config.num_heads))

    def _latent(self, frames: int) -> Tensor:
        return torch.zeros(self.samples, self.model.config.in_dim, frames, *self.size, device=self.device)

    def _text(self) -> Tensor:
        sizes = self.model.config
        return torch.zeros(self.samples, sizes.text_len, sizes.text_dim, device=self.device)

    def _time(self, *shape: int) -> Tensor:
        return torch.zeros(self.samples, *shape, device=self.device)

    def peak(self, network: Network) -> int:
        """Bytes of activations at their peak."""
        forward = self.prepare(network)
        with LiveBytes() as live:
            self.run(network, forward)
        return live.peak

    def prepare(self, network: Network) -> Callable[[], Tensor]:
        """The forward. Gradients of parameters are let go as they come: a shard's unit hands them on after
        its block."""
        for p in self.model.parameters():
            p.requires_grad_(network.trains)
            if network.trains:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return self._forward(network.kind)

    @staticmethod
    def run(network: Network, forward: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(network.trains):
            output = forward()
            if network.trains:
                output.backward(torch.zeros_like(output))

    def _forward(self, kind: type[WanTransformer]) -> Callable[[], Tensor]:
        config, frames = self.config, self.config.frames
        if kind is BidirectionalWanModel:
            return lambda: self.model(self._latent(frames), self._time(), self._text())
        if kind is TeacherForcedWan:
            clean, noisy, t = self._latent(frames), self._latent(frames), self._time(frames)
            return lambda: self.model(clean, noisy, t, self._text(), config.stream)
        return self._chunk()

    def _chunk(self) -> Callable[[], Tensor]:
        """The exit forward of a chunk that fills the window, as replay runs it."""
        stream, step = self.config.stream, self.config.stream.chunk_frames
        frames = {"sink_frames": stream.sink_frames, "window_frames": stream.window_frames}
        heads = self.model.config.num_heads // self.config.head_parallel
        spec = self.model.cache_spec(*self.size, batch=self.samples, heads=heads, **frames)
        cache = rf.SinkWindowCache(spec, sink=stream.policy())
        self.cache_bytes = cache.nbytes
        before = min(self.config.frames, stream.local_attn_size) // step - 1
        with torch.no_grad():
            for _ in range(before):
                with cache.chunk(step) as chunk:
                    self.model(self._latent(step), self._time(1), self._text(), chunk)

        def forward() -> Tensor:
            with cache.chunk(step) as chunk:
                return self.model(self._latent(step), self._time(1), self._text(), chunk)

        return forward


def wan() -> TrainConfig:
    """The published run: a student and a critic of 1.3B, a teacher of 14B, one sample a rank."""
    sizes = {"model": ModelConfig.wan_1_3b(), "teacher_model": ModelConfig.wan_14b()}
    return TrainConfig("distill", **sizes, frames=21, batch=1, compute="bfloat16", checkpointing=True)


def table(plans: Sequence[dict]) -> str:
    """The plans as text, in GiB a rank."""
    lines, columns = [], (*_COLUMNS, "gathered", "activations")
    for found in plans:
        lines.append(f"{found['ranks']} ranks, {found['samples_per_rank']} sample(s) a rank: GiB a rank")
        lines.append(
            f"{'':12}{'size':>9}" + "".join(f"{c:>13}" for c in (*_COLUMNS, "gathered", "activations"))
        )
        for name, entry in found["networks"].items():
            cells = "".join(_cell(entry[c]) for c in columns)
            lines.append(f"{name:12}{entry['numel'] / 1e9:>8.3f}B{cells}")
        lines.append(f"cache {found['cache'] / 2**30:.2f}, total {found['total'] / 2**30:.2f}")
        lines.append("")
    lines.append("total: what stays, the cache, and the largest gathered + activations of one network")
    return "\n".join(lines)


def _cell(count: int) -> str:
    return f"{count / 2**30:>13.2f}"
