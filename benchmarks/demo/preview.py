"""Latents as pictures a person can look at: three directions of latent space as red, green and blue. No VAE
is involved, and every picture says so."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw

_LABEL = "latent channels as colours (3 principal directions), not decoded by a VAE"


def latent_colours(latents: torch.Tensor) -> np.ndarray:
    """Latents ``[F, C, H, W]`` -> uint8 ``[F, H, W, 3]``: projection on the three principal directions of the
    channels over the whole clip, each scaled from its 1st to its 99th percentile."""
    frames, channels, height, width = latents.shape
    pixels = latents.double().permute(0, 2, 3, 1).reshape(-1, channels)
    centred = pixels - pixels.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    components = min(3, channels)
    projected = centred @ directions[:, -components:].flip(1)
    low, high = (
        torch.quantile(projected[:: max(1, len(projected) // 100_000)], q, dim=0) for q in (0.01, 0.99)
    )
    scaled = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    colours = torch.zeros(len(scaled), 3, dtype=torch.float64)
    colours[:, :components] = scaled
    return (colours * 255).round().to(torch.uint8).reshape(frames, height, width, 3).numpy()


def _labelled(image: Image.Image, text: str) -> Image.Image:
    page = Image.new("RGB", (max(image.width, 460), image.height + 32), "white")
    page.paste(image, (0, 32))
    draw = ImageDraw.Draw(page)
    draw.text((4, 2), text, fill="black")
    draw.text((4, 16), _LABEL, fill="black")
    return page


def write_preview(latents: torch.Tensor, folder: Path, *, frames_per_second: int = 16) -> list[Path]:
    """Write ``preview.gif`` (every frame) and ``preview.png`` (24 frames spread over the clip) for latents
    ``[F, C, H, W]``."""
    colours = latent_colours(latents)
    count, height, width, _ = colours.shape
    zoom = max(1, 256 // max(height, width))
    images = [
        Image.fromarray(frame).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        for frame in colours
    ]
    movie = [np.asarray(_labelled(image, f"latent frame {i} of {count}")) for i, image in enumerate(images)]
    paths = [folder / "preview.gif", folder / "preview.png"]
    iio.imwrite(paths[0], movie, duration=1000 / frames_per_second, loop=0)

    chosen = np.unique(np.linspace(0, count - 1, min(24, count)).round().astype(int))
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    cell_width, cell_height = images[0].width + 6, images[0].height + 18
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        x, y = (place % columns) * cell_width, (place // columns) * cell_height
        draw.text((x + 2, y + 2), f"frame {index}", fill="black")
        sheet.paste(images[index], (x, y + 15))
    _labelled(sheet, f"{count} latent frames").save(paths[1])
    return paths
