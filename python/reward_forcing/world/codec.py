"""A linear patch autoencoder: the decoder's place in the pipeline, fitted in a second.

Pixels are cut into 4 x 4 patches; their principal components are the latent channels. One number scales them
all to unit variance together, so an error in latents is an error in pixels: channels of unit variance each
would give the finest detail the weight of brightness and colour. Encoder and decoder are one matrix and its
transpose, frame by frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import expect
from .scene import draw_prompts, render

PATCH = 4
CHANNELS = 8


class PatchCodec(torch.nn.Module):
    """``encode``: video ``[B, F, 3, H, W]`` -> latents ``[B, F, 8, H / 4, W / 4]``; ``decode``: the way
    back.
    """

    def __init__(self, channels: int = CHANNELS):
        super().__init__()
        size = 3 * PATCH * PATCH
        expect(1 <= channels <= size, "PatchCodec", "channels", f"1 to {size}", channels)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size)[:channels].clone())  # rows: principal components
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    @torch.no_grad()
    def fit(cls, *, clips: int = 256, frames: int = 4, channels: int = CHANNELS, seed: int = 0) -> PatchCodec:
        """Fitted on freshly rendered clips; the same seed gives the same codec."""
        generator = torch.Generator().manual_seed(seed)
        video, _ = render(draw_prompts(clips, generator), frames, generator=generator)
        patches = cls._patches(video).flatten(0, -2).double()
        mean = patches.mean(dim=0)
        variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        codec = cls(channels)
        basis = basis.flip(1)[:, :channels].T
        # The sign of an eigenvector is the solver's; the largest element of each decides it here.
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
        codec.mean.copy_(mean)
        codec.basis.copy_(basis)
        codec.scale.copy_(variance.flip(0)[:channels].mean().sqrt())
        return codec

    @staticmethod
    def _patches(video: Tensor) -> Tensor:
        """``[B, F, 3, H, W]`` -> ``[B, F, H / 4, W / 4, 48]``."""
        b, f, c, h, w = video.shape
        cut = video.reshape(b, f, c, h // PATCH, PATCH, w // PATCH, PATCH)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3)

    def encode(self, video: Tensor) -> Tensor:
        fits = video.dim() == 5 and video.shape[2] == 3 and not any(n % PATCH for n in video.shape[3:])
        expect(
            fits, "PatchCodec.encode", "video", f"[B, F, 3, H, W], H, W % {PATCH} == 0", tuple(video.shape)
        )
        latents = ((self._patches(video) - self.mean) @ self.basis.T) / self.scale
        return latents.movedim(-1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Not clamped: what leaves [-1, 1] is over-saturation, which a read-out should see."""
        channels = len(self.basis)
        fits = latents.dim() == 5 and latents.shape[2] == channels
        expect(fits, "PatchCodec.decode", "latents", f"[B, F, {channels}, h, w]", tuple(latents.shape))
        patches = (latents.movedim(2, -1) * self.scale) @ self.basis + self.mean
        b, f, h, w, _ = patches.shape
        images = F.pixel_shuffle(patches.movedim(-1, 2).reshape(b * f, 3 * PATCH * PATCH, h, w), PATCH)
        return images.reshape(b, f, 3, h * PATCH, w * PATCH)
