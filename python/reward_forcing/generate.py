"""`reward-forcing generate`: a prompt becomes a video. The text is encoded by UMT5, through transformers; the
latents stream from a causal model; and the Wan VAE, through diffusers, decodes each chunk while the next one
is generated.

The encoder and the VAE come from a folder in diffusers' layout (`tokenizer/`, `text_encoder/`, `vae/`), such
as a copy of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._check import expect, installed

if TYPE_CHECKING:
    from .job import StreamJob

_WHO = "generate"


class TextEncoder:
    """UMT5 of Wan: features of a prompt.

    Args:
        folder: with `tokenizer/` and `text_encoder/`.
        length: most tokens; longer prompts are cut.
    """

    def __init__(self, folder: str | Path, length: int, *, dtype: torch.dtype, device: str | torch.device):
        transformers, self.length = installed("transformers", _WHO, "integrations"), length
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
            model = transformers.UMT5EncoderModel.from_pretrained(
                folder, subfolder="text_encoder", dtype=dtype
            )
        except (OSError, ValueError) as error:
            expect(False, _WHO, "wan", "a folder with tokenizer/ and text_encoder/", _line(error))
        self.model = model.to(device).eval().requires_grad_(False)

    def __call__(self, prompt: str) -> Tensor:
        """Features ``[1, n, text_dim]`` of the prompt's own tokens; the model pads them with zeros."""
        text = self.tokenizer(
            " ".join(prompt.split()),
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        return self.model(text.input_ids, attention_mask=text.attention_mask).last_hidden_state


class StreamingDecoder:
    """The Wan VAE, chunk by chunk: frames are those of decoding the whole video at once, to the bit.

    The VAE keeps what its causal convolutions saw of earlier frames, so one decoder serves one stream.

    Args:
        vae: an ``AutoencoderKLWan``.
    """

    def __init__(self, vae: torch.nn.Module):
        self.vae, self._begun = vae, False
        config, shape = vae.config, (1, -1, 1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, dtype=vae.dtype, device=vae.device).view(shape)
            for values in (config.latents_mean, config.latents_std)
        )
        vae.clear_cache()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype, device) -> StreamingDecoder:
        diffusers = installed("diffusers", _WHO, "integrations")
        try:
            vae = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        except (OSError, ValueError) as error:
            expect(False, _WHO, "wan", "a folder with vae/", _line(error))
        return cls(vae.to(device).eval().requires_grad_(False))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, F, C, H, W]`` of the next frames -> frames ``[B, T, 3, rows, columns]`` in 0..1; the
        stream's first latent frame is one frame, each other one is four."""
        vae, frames = self.vae, []
        z = latents.transpose(1, 2).to(self._mean) * self._std + self._mean
        x = vae.post_quant_conv(z)
        for i in range(x.shape[2]):
            vae._conv_idx = [0]
            options = {} if self._begun else {"first_chunk": True}
            frames.append(
                vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **options)
            )
            self._begun = True
        out = torch.cat(frames, 2)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            out = unpatchify(out, patch_size=vae.config.patch_size)
        return (out.clamp(-1, 1).transpose(1, 2).float() * 0.5 + 0.5).clamp(0, 1)


class VideoFile:
    """An mp4 file that is written frame by frame; it has its name once it is whole."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.frames, self._writer = Path(path), fps, 0, None
        self._part = self.path.with_name(f".{self.path.stem}.part.mp4")

    def write(self, frames: Tensor) -> None:
        """Frames ``[T, 3, rows, columns]`` in 0..1."""
        cv2 = installed("cv2", _WHO, "integrations")
        pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).flip(-1).contiguous().cpu()
        if self._writer is None:
            size = (pixels.shape[2], pixels.shape[1])
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._part), code, self.fps, size)
            if not self._writer.isOpened():
                raise OSError(f"{self._part}: cannot be written as a video")
        for frame in pixels.numpy():
            self._writer.write(frame)
        self.frames += len(frames)

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._writer is not None:
            self._writer.release()
        if kind is None:
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)


def decoded(chunks: Iterator, decoder: StreamingDecoder) -> Iterator[Tensor]:
    """Frames of each chunk, decoded in a thread of its own while the next chunk is generated."""
    with ThreadPoolExecutor(1, thread_name_prefix="vae") as worker:
        waiting = None
        for chunk in chunks:
            following = worker.submit(decoder.decode, chunk.latents)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def generate(job: StreamJob, prompt: str, wan: str | Path, out: Path, *, fps: float = 16.0) -> int:
    """Write the video of a prompt; the number of its frames.

    Raises:
        rf_kernels.ArgumentError: a checkpoint, a folder or a size that cannot be; nothing was generated.
    """
    expect(bool(prompt.strip()), _WHO, "prompt", "some text", repr(prompt))
    expect(out.suffix == ".mp4", _WHO, "out", "a file name that ends in .mp4", str(out))
    expect(out.parent.is_dir(), _WHO, "out", "a file in a folder that exists", str(out))
    prepared = job.prepare()
    config, place = prepared.model.config, {"dtype": job.dtype, "device": prepared.model.device}
    encoder = TextEncoder(wan, config.text_len, **place)
    features = encoder(prompt)
    found = features.shape[-1]
    expect(found == config.text_dim, _WHO, "wan", f"text features of {config.text_dim} numbers", found)
    del encoder  # gigabytes
    decoder = StreamingDecoder.from_pretrained(wan, **place)
    channels = decoder.vae.config.z_dim
    expect(channels == config.in_dim, _WHO, "wan", f"a VAE of {config.in_dim} channels", channels)
    prepared = replace(prepared, context=features)
    cache, begin = prepared.new_cache(), time.perf_counter()
    with VideoFile(out, fps) as video, _bar(job.frames) as bar:
        for frames in decoded(_counted(prepared.chunks(cache), bar), decoder):
            video.write(frames[0])
            seconds = time.perf_counter() - begin
            bar.set_postfix_str(f"{video.frames / seconds:.2f} frames/s")
    return video.frames


def _counted(chunks: Iterator, bar) -> Iterator:
    for chunk in chunks:
        bar.update(chunk.latents.shape[1])
        yield chunk


def _bar(frames: int):
    from tqdm import tqdm

    return tqdm(total=frames, unit=" latents", file=sys.stderr, disable=None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
