"""Configuration: every size of a model, and every choice of a stream. Nothing elsewhere in the package is
fixed at one model's sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import rf_kernels as rf

from . import policies
from ._check import expect

#: What a field of each annotated type may hold.
_KINDS = {
    "int": ("an integer", lambda v: isinstance(v, Integral) and not isinstance(v, bool)),
    "float": (
        "a finite number",
        lambda v: isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v),
    ),
    "bool": ("True or False", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "tuple": ("a tuple of integers", lambda v: isinstance(v, tuple) and all(map(_KINDS["int"][1], v))),
}


def _check_kinds(config) -> None:
    """Every field holds what its annotation says: values also come from JSON files and command lines."""
    for field in dataclasses.fields(config):
        expected, fits = _KINDS[field.type.split("[")[0]]
        value = getattr(config, field.name)
        expect(fits(value), type(config).__name__, field.name, expected, repr(value))


def _from_dict(cls, values: Mapping[str, Any]):
    who = f"{cls.__name__}.from_dict"
    expect(isinstance(values, Mapping), who, "values", "a mapping of names to values", type(values).__name__)
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
    for name, needed in known.items():
        expect(
            name in values or not needed,
            who,
            name,
            "a value",
            f"none among the keys {sorted(map(str, values))}",
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Wan video transformer, under their published names.

    Args:
        model_type: "t2v" (text to video); other conditionings have further parameters and are refused.
        patch_size: latent (frames, rows, columns) per token. One frame a token: positions and caches count in
            latent frames.
        text_len: tokens the text features are zero-padded to (the padding is attended, as published).
        in_dim, out_dim: latent channels in and out.
        dim, ffn_dim: model width and feed-forward width.
        freq_dim: width of the sinusoidal time embedding.
        text_dim: width of the text features.
        num_heads, num_layers: attention heads (dim / num_heads each) and blocks.
        qk_norm: RMSNorm on queries and keys, over the whole model width.
        cross_attn_norm: affine LayerNorm before cross-attention.
        eps: of every normalisation.
        linear_proj: a map of each head behind what the policy answers beside the attention (Hybrid Forcing's
            ``self_attn.linear_proj``); such a model streams with a policy that answers (``linear``).
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
    linear_proj: bool = False

    def __post_init__(self):
        who = "ModelConfig"
        _check_kinds(self)
        sizes = (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "in_dim",
            "out_dim",
            "text_dim",
            "text_len",
            "freq_dim",
        )
        for name in sizes:
            expect(getattr(self, name) >= 1, who, name, "at least 1", getattr(self, name))
        expect(self.model_type == "t2v", who, "model_type", "'t2v'", repr(self.model_type))
        patch_ok = len(self.patch_size) == 3 and self.patch_size[0] == 1 and min(self.patch_size) >= 1
        expect(patch_ok, who, "patch_size", "(1, rows, columns)", self.patch_size)
        even_heads = self.dim % (2 * self.num_heads) == 0
        expect(even_heads, who, "num_heads", f"heads of an even width (dim = {self.dim})", self.num_heads)
        expect(self.freq_dim % 2 == 0, who, "freq_dim", "an even number", self.freq_dim)
        expect(self.eps > 0, who, "eps", "a positive number", self.eps)

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
        """From a mapping with the published names (a config.json, a golden case's hyper-parameters); other
        keys are not ours.
        """
        return _from_dict(cls, values)

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
        local_attn_size: frames a query sees, the sink included (so ``window_frames = local_attn_size -
            sink_frames``).
        alpha: decay of the sink's moving average.
        sink_policy: "ema", "static", or "none" (needs ``sink_frames = 0``); "ema" without sink frames is
            "none". Any other as ``reward_forcing.policies.parse`` takes it. "ema:alpha=A" is "ema" with
            ``alpha = A``.
        sink_state: precision of the sink's state, see ``rf_kernels.EMASink``.
        denoising_step_list: nominal timesteps, 1000 = pure noise.
        warp: look the nominal steps up in the shifted schedule.
        shift: timestep shift of the schedule.
        context_noise: timestep of the forward that writes the finished chunk into the cache.
        independent_first_frame: the first chunk of a stream is one frame.
        clean_forward: whether a forward on the finished chunk leaves its keys and values. Without it those of
            the last denoising step stay (Causal-rCM, arXiv 2606.25473; Diagonal Distillation, arXiv
            2603.09488).
        cuts: frames at which a chunk begins a new shot, for policies that know of shots.
        rolling: denoise as many chunks together as there are steps, each a step behind the one before it
            (Rolling Forcing, arXiv 2509.25161). The window holds all of them.
        restart: (frames, overlap): start over after so many frames, with the last ``overlap`` of them as the
            beginning (CausVid, arXiv 2412.07772). Positions count from there, whatever the policy says.
            Empty: never.
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
    clean_forward: bool = True
    cuts: tuple[int, ...] = ()
    rolling: bool = False
    restart: tuple[int, ...] = ()

    def __post_init__(self):
        who = "StreamConfig"
        _check_kinds(self)
        expect(self.chunk_frames >= 1, who, "chunk_frames", "at least 1", self.chunk_frames)
        expect(self.sink_frames >= 0, who, "sink_frames", "at least 0", self.sink_frames)
        allowed = ("compensated", "float32", "published")
        expect(self.sink_state in allowed, who, "sink_state", f"one of {allowed}", repr(self.sink_state))
        expect(0 <= self.alpha <= 1, who, "alpha", "a number in 0..1", self.alpha)
        self._settle_policy()
        no_frames = self.sink_policy != "none" or self.sink_frames == 0
        expect(no_frames, who, "sink_frames", "0 with sink_policy 'none'", self.sink_frames)
        least = self.sink_frames + 1 if isinstance(self.policy(), rf.EMASink) else max(self.sink_frames, 1)
        enough = f"at least {least}, with {self.sink_frames} sink frames and sink_policy '{self.sink_policy}'"
        expect(self.local_attn_size >= least, who, "local_attn_size", enough, self.local_attn_size)
        expect(len(self.denoising_step_list) >= 1, who, "denoising_step_list", "at least one step", "none")
        lowest = min(self.denoising_step_list)
        expect(lowest >= 0, who, "denoising_step_list", "steps of at least 0", lowest)
        expect(self.shift > 0, who, "shift", "a positive number", self.shift)
        expect(self.context_noise >= 0, who, "context_noise", "at least 0", self.context_noise)
        self._check_mode(who)

    def _settle_policy(self) -> None:
        """An average whose text says no more than fields can is told by the fields."""
        found = self.policy()
        if self.sink_policy.startswith("ema:") and self.sink_frames and isinstance(found.alpha, float):
            if found == rf.EMASink(found.alpha, found.state):
                for name, value in (
                    ("sink_policy", "ema"),
                    ("alpha", found.alpha),
                    ("sink_state", found.state),
                ):
                    object.__setattr__(self, name, value)

    def _check_mode(self, who: str) -> None:
        """Of ``rolling`` and ``restart``."""
        for name in [name for name in ("rolling", "restart") if getattr(self, name)]:
            for other, none in (("independent_first_frame", False), ("cuts", ()), ("restart", ())):
                fits = other == name or getattr(self, other) == none
                expect(fits, who, other, f"{none} with {name}", getattr(self, other))
            placed = isinstance(self.policy(), policies.StateSlot)
            expect(not placed, who, "sink_policy", f"another policy with {name}", repr(self.sink_policy))
        if self.rolling:
            noisy = len(self.denoising_step_list) * self.chunk_frames
            text = f"at least {self.sink_frames + noisy}, with rolling: {self.sink_frames} sink frames and"
            text += f" {len(self.denoising_step_list)} chunks of {self.chunk_frames}"
            expect(self.window_frames >= noisy, who, "local_attn_size", text, self.local_attn_size)
        if self.restart:
            chunk = self.chunk_frames
            frames, overlap = self.restart if len(self.restart) == 2 else (0, 0)
            fits = overlap >= chunk and overlap % chunk == 0 and frames >= overlap + chunk
            expected = f"(frames, overlap), overlap a multiple of the {chunk} frames of a chunk, frames at"
            expected += f" least {chunk} more"
            expect(fits, who, "restart", expected, self.restart)

    @property
    def window_frames(self) -> int:
        return self.local_attn_size - self.sink_frames

    def policy(self):
        """The ``sink`` argument of ``rf_kernels.SinkWindowCache``."""
        found = policies.parse(self.sink_policy, who="StreamConfig", alpha=self.alpha, state=self.sink_state)
        plain = self.sink_policy.partition(":")[0] in ("none", "static", "ema")
        return rf.NoSink() if plain and not self.sink_frames else found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamConfig:
        """From a mapping with the published names; other keys are not ours."""
        return _from_dict(cls, values)
