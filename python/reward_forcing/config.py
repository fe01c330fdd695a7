"""Configuration: every size of a model, and every choice of a stream. Nothing elsewhere in the package is fixed at one
model's sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rf_kernels as rf

from ._check import expect


def _known_fields(cls, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Wan video transformer, under their published names.

    Args:
        model_type: "t2v" (text to video); other conditionings have further parameters and are refused.
        patch_size: latent (frames, rows, columns) per token. One frame a token: positions and caches count in latent
            frames.
        text_len: tokens the text features are zero-padded to (the padding is attended, as published).
        in_dim, out_dim: latent channels in and out.
        dim, ffn_dim: model width and feed-forward width.
        freq_dim: width of the sinusoidal time embedding.
        text_dim: width of the text features.
        num_heads, num_layers: attention heads (dim / num_heads each) and blocks.
        qk_norm: RMSNorm on queries and keys, over the whole model width.
        cross_attn_norm: affine LayerNorm before cross-attention.
        eps: of every normalisation.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    model_type: str = "t2v"

    def __post_init__(self):
        who = "ModelConfig"
        sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "text_len", "freq_dim")
        for name in sizes:
            expect(getattr(self, name) >= 1, who, name, "at least 1", getattr(self, name))
        expect(self.model_type == "t2v", who, "model_type", "'t2v'", repr(self.model_type))
        patch_ok = len(self.patch_size) == 3 and self.patch_size[0] == 1 and min(self.patch_size) >= 1
        expect(patch_ok, who, "patch_size", "(1, rows, columns)", self.patch_size)
        even_heads = self.dim % (2 * self.num_heads) == 0
        expect(even_heads, who, "num_heads", f"heads of an even width (dim = {self.dim})", self.num_heads)
        expect(self.freq_dim % 2 == 0, who, "freq_dim", "an even number", self.freq_dim)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope(self) -> rf.RoPE3D:
        """The model's rotary embedding over (frame, row, column)."""
        return rf.RoPE3D.wan(self.head_dim)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per (column, row) direction of one latent frame of ``height`` x ``width``."""
        _, rows, columns = self.patch_size
        fits = height % rows == 0 and width % columns == 0
        expect(fits, "ModelConfig.grid", "height, width", f"multiples of {(rows, columns)}", (height, width))
        return height // rows, width // columns

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From a mapping with the published names (a config.json, a golden case's hyper-parameters); other keys are
        not ours.
        """
        return cls(**_known_fields(cls, values))

    @classmethod
    def wan_1_3b(cls, **overrides) -> ModelConfig:
        """Wan2.1-T2V-1.3B."""
        return cls(**{"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, **overrides})

    @classmethod
    def wan_14b(cls, **overrides) -> ModelConfig:
        """Wan2.1-T2V-14B."""
        return cls(**{"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, **overrides})


@dataclass(frozen=True)
class StreamConfig:
    """Choices of a few-step stream, under their published names.

    Args:
        chunk_frames: latent frames generated together.
        sink_frames: frames of the sink.
        local_attn_size: frames a query sees, the sink included (so ``window_frames = local_attn_size - sink_frames``).
        alpha: decay of the sink's moving average.
        sink_policy: "ema", "static", or "none" (needs ``sink_frames = 0``); "ema" without sink frames is "none".
        sink_state: precision of the sink's state, see ``rf_kernels.EMASink``.
        denoising_step_list: nominal timesteps, 1000 = pure noise.
        warp: look the nominal steps up in the shifted schedule.
        shift: timestep shift of the schedule.
        context_noise: timestep of the forward that writes the finished chunk into the cache.
        independent_first_frame: the first chunk of a stream is one frame.
    """

    chunk_frames: int = 3
    sink_frames: int = 3
    local_attn_size: int = 9
    alpha: float = 0.999
    sink_policy: str = "ema"
    sink_state: str = "compensated"
    denoising_step_list: tuple[int, ...] = (1000, 750, 500, 250)
    warp: bool = True
    shift: float = 5.0
    context_noise: float = 0.0
    independent_first_frame: bool = False

    def __post_init__(self):
        who = "StreamConfig"
        expect(self.chunk_frames >= 1, who, "chunk_frames", "at least 1", self.chunk_frames)
        expect(self.sink_frames >= 0, who, "sink_frames", "at least 0", self.sink_frames)
        enough = self.local_attn_size >= max(self.sink_frames, 1)
        expect(enough, who, "local_attn_size", f"at least the {self.sink_frames} sink frames", self.local_attn_size)
        policies = ("ema", "static", "none")
        expect(self.sink_policy in policies, who, "sink_policy", f"one of {policies}", repr(self.sink_policy))
        no_frames = self.sink_policy != "none" or self.sink_frames == 0
        expect(no_frames, who, "sink_frames", "0 with sink_policy 'none'", self.sink_frames)
        expect(len(self.denoising_step_list) >= 1, who, "denoising_step_list", "at least one step", "none")

    @property
    def window_frames(self) -> int:
        return self.local_attn_size - self.sink_frames

    def policy(self):
        """The ``sink_policy`` argument of ``rf_kernels.SinkWindowCache``."""
        if self.sink_policy == "none" or self.sink_frames == 0:
            return rf.NoSink()
        if self.sink_policy == "static":
            return rf.StaticSink()
        return rf.EMASink(self.alpha, state=self.sink_state)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamConfig:
        """From a mapping with the published names; other keys are not ours."""
        return cls(**_known_fields(cls, values))
