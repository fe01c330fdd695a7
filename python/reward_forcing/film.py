"""Frames as an MP4 that every player opens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ._check import expect


def tile(videos: Tensor, *, zoom: int = 1) -> Tensor:
    """Videos ``[rows, columns, F, 3, H, W]`` in [-1, 1] as one of uint8 ``[F, height, width, 3]``, a white
    line between the cells, every pixel ``zoom`` wide."""
    pixels = ((videos.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=255)
    rows, columns, frames, _, height, width = pixels.shape
    grid = pixels.permute(2, 0, 4, 1, 5, 3).reshape(frames, rows * height, columns * width, 3)
    return grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)


def write_mp4(frames: Tensor, path: Path, *, frames_per_second: int = 16) -> None:
    """Write uint8 ``[F, H, W, 3]`` as H.264 (PyAV). Odd sizes get a white edge: H.264 wants even ones."""
    import av

    fits = frames.dim() == 4 and frames.shape[3] == 3 and frames.dtype == torch.uint8 and len(frames) > 0
    expect(fits, "write_mp4", "frames", "uint8 [F, H, W, 3]", (frames.dtype, tuple(frames.shape)))
    height, width = frames.shape[1:3]
    frames = torch.nn.functional.pad(frames, (0, 0, 0, width % 2, 0, height % 2), value=255)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=frames_per_second)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames.cpu().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
