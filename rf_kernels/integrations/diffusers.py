"""diffusers' ``WanTransformer3DModel`` as a streaming model, and its checkpoints under both names.

    stream = StreamingTransformer(transformer)              # a WanTransformer3DModel
    cache = stream.cache(height, width, sink_frames=3, window_frames=6, sink_policy=rf.EMASink())
    with cache.chunk(frames=3) as chunk:
        flow = stream(latents, timestep, text, chunk)       # any number of times

Nothing here imports diffusers: the wrapper is handed the model, and the processor has the interface of
``WanAttnProcessor``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from .._backend import argument_error
from ..cache import CacheSpec, Chunk, SinkPolicy, SinkWindowCache
from ..positions import RoPE3D

_OP = "integrations.diffusers"


# ---- the model ---------------------------------------------------------------------------------------------
class AttentionProcessor:
    """The self-attention of one layer of a ``WanTransformer3DModel`` through an open chunk; without one, that
    of the processor that it replaces.

    Args:
        layer: index of the block.
        whole: the processor for whole sequences.
    """

    #: What ``set_attention_backend`` and context parallelism set; a chunk's attention has one backend.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, layer: int, whole: Callable):
        self.layer, self.whole = layer, whole
        self.chunk: Chunk | None = None

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **options
    ):
        if self.chunk is None:
            return self.whole(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **options
            )
        if attention_mask is not None:
            raise argument_error(_OP, "attention_mask", "None in a stream", type(attention_mask).__name__)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = self.chunk.attend(self.layer, q, k, v, q_norm=attn.norm_q, k_norm=attn.norm_k, norm="model")
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class StreamingTransformer(nn.Module):
    """A ``WanTransformer3DModel`` that streams. The transformer is the caller's and keeps its parameters; its
    blocks' self-attention gets an ``AttentionProcessor``, and ``restore()`` puts the old ones back.

    Args:
        transformer: text-to-video, with one latent frame a token.
    """

    def __init__(self, transformer: nn.Module):
        super().__init__()
        config = getattr(transformer, "config", None)
        if config is None or not hasattr(transformer, "blocks"):
            raise argument_error(_OP, "transformer", "a WanTransformer3DModel", type(transformer).__name__)
        if config.patch_size[0] != 1:
            raise argument_error(_OP, "transformer", "one frame a token", f"patches {config.patch_size}")
        self.transformer = transformer
        self._before = [block.attn1.processor for block in transformer.blocks]
        self._processors = [AttentionProcessor(i, own) for i, own in enumerate(self._before)]
        for block, processor in zip(transformer.blocks, self._processors, strict=True):
            block.attn1.set_processor(processor)

    def restore(self) -> None:
        """Give the blocks their own processors back."""
        for block, processor in zip(self.transformer.blocks, self._before, strict=True):
            block.attn1.set_processor(processor)

    def cache_spec(
        self,
        height: int,
        width: int,
        *,
        sink_frames: int,
        window_frames: int,
        batch: int = 1,
        undo_frames: int = 0,
    ) -> CacheSpec:
        """What a cache for latents of ``height`` x ``width`` must be."""
        config, weight = self.transformer.config, self.transformer.blocks[0].attn1.to_out[0].weight
        _, rows, columns = config.patch_size
        return CacheSpec(
            layers=len(self.transformer.blocks),
            batch=batch,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            grid=(height // rows, width // columns),
            sink_frames=sink_frames,
            window_frames=window_frames,
            rope=RoPE3D.wan(config.attention_head_dim),
            dtype=weight.dtype,
            device=weight.device,
            undo_frames=undo_frames,
        )

    def cache(self, height: int, width: int, *, sink_policy: SinkPolicy, **sizes) -> SinkWindowCache:
        """An empty cache; ``sizes`` as for ``cache_spec``."""
        return SinkWindowCache(self.cache_spec(height, width, **sizes), sink=sink_policy)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, chunk: Chunk):
        """Flow of a chunk.

        Args:
            hidden_states: noisy latents ``[B, C, F, H, W]`` of the chunk's frames.
            timestep: ``[B]``, or one per frame ``[B, F]``.
            encoder_hidden_states: text features ``[B, n, text_dim]``.
            chunk: open, of a cache as ``cache_spec`` says. Mutated.
        Returns:
            ``[B, C, F, H, W]``.
        """
        frames, spec = hidden_states.shape[2], chunk.cache.spec
        if frames != chunk.frames:
            raise argument_error(_OP, "hidden_states", f"{chunk.frames} frames, the chunk's", frames)
        if timestep.dim() == 2:  # diffusers takes one per token
            timestep = timestep.expand(-1, frames).repeat_interleave(spec.frame_tokens, dim=1)
        for processor in self._processors:
            processor.chunk = chunk
        try:
            return self.transformer(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]
        finally:
            for processor in self._processors:
                processor.chunk = None


# ---- checkpoints -------------------------------------------------------------------------------------------
#: (published, diffusers), patterns of the parts of a name that differ. A block's second norm is the published
#: third: both sides number by use.
_NAMES = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("patch_embedding", "patch_embedding"),
)
_IN_BLOCK = (
    *(
        (f"{ours}.{a}", f"{theirs}.{b}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)


def _renamed(name: str, to: int) -> str:
    """The name on side ``to``: 0 published, 1 diffusers."""
    found = re.match(r"(blocks\.\d+\.)(.*)", name)
    prefix, rest = found.groups() if found else ("", name)
    for pair in _IN_BLOCK if found else _NAMES:
        old, new = pair[1 - to], pair[to]
        if rest == old or rest.startswith(old + "."):
            return prefix + new + rest[len(old) :]
    side = ("a published", "a diffusers")[1 - to]
    raise argument_error(_OP, "name", f"{side} name of Wan's text-to-video transformer", name)


def to_diffusers(name: str) -> str:
    """Name in ``WanTransformer3DModel`` of a published parameter. Tensors are the same."""
    return _renamed(name, 1)


def to_published(name: str) -> str:
    """Published name of a parameter of ``WanTransformer3DModel``. Tensors are the same."""
    return _renamed(name, 0)


_INDEX = "diffusion_pytorch_model.safetensors.index.json"


def shards(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file, or a folder with one or with an index."""
    path = Path(path)
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        listed = json.loads(indices[0].read_text())["weight_map"].values()
        return [path / name for name in sorted(set(listed))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise argument_error(_OP, "path", "a safetensors file, or a folder with some", path)
    return files


def convert(source: str | Path, target: str | Path, layout: str, *, shard_bytes: int = 1 << 30) -> list[Path]:
    """Write a checkpoint under the other names, shard by shard: at most one shard is in memory.

    Args:
        source: a safetensors file, or a folder (sharded with an index, or not), in either layout.
        target: a folder; made if it is not there. Gets ``diffusion_pytorch_model*.safetensors``, and an index
            if there is more than one.
        layout: "diffusers" or "published": the names to write.
        shard_bytes: size from which a new file is begun.
    Returns:
        the files written.
    Raises:
        ArgumentError: a name that is not of Wan's text-to-video transformer, before its shard is written.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if layout not in ("published", "diffusers"):
        raise argument_error(_OP, "layout", "'published' or 'diffusers'", repr(layout))
    target, to = Path(target), int(layout == "diffusers")
    names: list[tuple[Path, str, str]] = []
    for file in shards(source):
        with safe_open(file, "pt") as opened:
            names += [(file, name, _either(name, to)) for name in opened.keys()]
    target.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            path = target / f"part-{len(written):05d}.safetensors"
            save_file(held, path, metadata={"format": "pt"})
            written.append((path, list(held)))
        held, size = {}, 0

    total = 0
    for file, group in _by_file(names):
        with safe_open(file, "pt") as opened:
            for old, new in group:
                tensor = opened.get_tensor(old)
                held[new] = tensor.contiguous()
                size += tensor.numel() * tensor.element_size()
                total += tensor.numel() * tensor.element_size()
                if size >= shard_bytes:
                    flush()
    flush()
    return _finished(target, written, total)


def _either(name: str, to: int) -> str:
    """The name on side ``to``, of a name on either side."""
    try:
        return _renamed(name, to)
    except ValueError:
        _renamed(_renamed(name, 1 - to), to)  # raises, unless it is there already
        return name


def _by_file(names) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    files: dict[Path, list[tuple[str, str]]] = {}
    for file, old, new in names:
        files.setdefault(file, []).append((old, new))
    yield from files.items()


def _finished(target: Path, written: list[tuple[Path, list[str]]], total: int) -> list[Path]:
    """Files under the names that diffusers looks for."""
    if len(written) == 1:
        path = target / "diffusion_pytorch_model.safetensors"
        written[0][0].replace(path)
        return [path]
    paths, weight_map = [], {}
    for i, (part, keys) in enumerate(written, 1):
        path = target / f"diffusion_pytorch_model-{i:05d}-of-{len(written):05d}.safetensors"
        part.replace(path)
        paths.append(path)
        weight_map |= dict.fromkeys(keys, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / _INDEX).write_text(json.dumps(index, indent=2))
    return paths


def published_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``WanTransformer3DModel``'s state dictionary under the published names."""
    return {to_published(name): tensor for name, tensor in state.items()}


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dictionary under diffusers' names."""
    return {to_diffusers(name): tensor for name, tensor in state.items()}
