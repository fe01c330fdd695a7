"""Prompts of a text file, their features by Wan's text encoder, and frames by its VAE: what distillation and
ODE regression of Wan ask for. Clips are not read, so other stages need a source of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import expect
from ..checkpoint import read_safetensors
from ..generate import StreamingDecoder, TextEncoder
from .config import TrainConfig
from .data import read_lines
from .distributed import rank
from .draws import Draws

_KEPT = 64  # features of prompts in memory: one step asks for the same ones several times


class WanSource:
    """The source of a run with the key ``wan``. The encoder and the VAE are loaded when they are first
    needed, in the dtype that the run computes in; a run whose features are all in ``wan.features`` loads no
    encoder.

    Raises:
        rf_kernels.ArgumentError: a stage that trains on clips, no prompt, or a folder that does not fit the
            model.
    """

    def __init__(self, config: TrainConfig, draws: Draws):
        wan = config.wan
        expect(
            config.stage in ("distill", "ode"), "TrainConfig", "wan", "the stage distill or ode", config.stage
        )
        self.draws, self.wan, self.sizes = draws, wan, config.model
        self.among = [line for _, line in read_lines(config.prompts)]
        self.latent_shape = (config.model.in_dim, *wan.latent)
        config.model.grid(*wan.latent)
        self._place = {"dtype": getattr(torch, config.compute), "device": draws.device}
        self._encoder: TextEncoder | None = None
        self._vae: torch.nn.Module | None = None
        self._kept: dict[str, Tensor] = {}

    def prompts(self, step: int, samples: Sequence[int]) -> list[str]:
        """The prompts of a step."""
        return [self.among[i] for i in self.draws.integers("prompt", step, len(self.among), samples)]

    def clips(self, step: int, samples: Sequence[int], frames: int) -> tuple[Tensor, list[str]]:
        raise NotImplementedError("a WanSource has prompts alone")

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Features ``[B, n, text_dim]``, n of the longest prompt; the others are padded with zeros, as the
        model pads all of them."""
        features = [self._features(prompt) for prompt in prompts]
        longest = max(len(f) for f in features)
        return torch.stack([F.pad(f, (0, 0, 0, longest - len(f))) for f in features])

    def no_text(self, batch: int) -> Tensor:
        """Features of the negative prompt, for guidance."""
        return self._features(self.wan.negative_prompt).expand(batch, -1, -1)

    def _features(self, prompt: str) -> Tensor:
        if prompt not in self._kept:
            features = self._stored(prompt)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[prompt] = features.to(**self._place)
        return self._kept[prompt]

    def _stored(self, prompt: str) -> Tensor:
        """Features ``[n, text_dim]``, from ``wan.features`` or computed, and then written there."""
        if not self.wan.features:
            return self._computed(prompt)
        name = hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()
        path = Path(self.wan.features) / f"{name}.safetensors"
        if path.exists():
            features = read_safetensors(path).get("context", torch.empty(0))
            self._check(features, str(path))
            return features
        from safetensors.torch import save_file

        features = self._computed(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{rank()}.part")  # ranks may meet here
        save_file({"context": features.cpu().contiguous()}, part)
        part.replace(path)
        return features

    @torch.no_grad()
    def _computed(self, prompt: str) -> Tensor:
        if self._encoder is None:
            self._encoder = TextEncoder(self.wan.folder, self.sizes.text_len, **self._place)
        features = self._encoder(prompt)[0]
        self._check(features, self.wan.folder)
        return features

    def _check(self, features: Tensor, where: str) -> None:
        fits = features.dim() == 2 and 1 <= len(features) <= self.sizes.text_len
        fits = fits and features.shape[1] == self.sizes.text_dim
        expected = f"text features [at most {self.sizes.text_len}, {self.sizes.text_dim}]"
        expect(fits, "TrainConfig", "wan", expected, f"{tuple(features.shape)} of {where}")

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, 1 + 4 (F - 1), 3, H, W]`` in [-1, 1] of latents ``[B, F, C, h, w]``, clip by clip."""
        if self._vae is None:
            self._vae = StreamingDecoder.from_pretrained(self.wan.folder, **self._place).vae
            found = self._vae.config.z_dim
            expect(
                found == self.sizes.in_dim,
                "TrainConfig",
                "wan",
                f"a VAE of {self.sizes.in_dim} channels",
                found,
            )
        clips = [StreamingDecoder(self._vae).decode(z[None])[0] for z in latents]
        self._vae.clear_cache()
        return torch.stack(clips) * 2 - 1
