"""The trained student of the embedded world under several sinks: one long stream each, from the same noise
and prompts, as a film and as curves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from reward_forcing import evaluate, world
from reward_forcing.film import tile, write_mp4
from reward_forcing.pipeline import StreamingPipeline

from .run import flatness, memory_bytes

PROMPTS = (
    "slow red disc",
    "fast blue ring",
    "still green square",
    "yellow disc",
    "fast green disc",
    "slow yellow ring",
    "still blue disc",
    "red square",
    "fast yellow square",
    "slow blue square",
    "still red ring",
    "green ring",
)
SHOWN = 4  # prompts in the film
WINDOW = 15  # frames that the speed is read from


@torch.no_grad()
def stream_sinks(
    sinks: tuple[str, ...], frames: int, *, seed: int = 0, checkpoint: Path | None = None, progress: Callable
) -> tuple[dict[str, torch.Tensor], dict]:
    """Videos ``[prompts, F, 3, H, W]`` by sink, and all figures of the report on them."""
    prompts = [world.Prompt.parse(text) for text in PROMPTS]
    model, trained = evaluate.load_student(checkpoint)
    codec = world.PatchCodec.fit()
    videos, timed = {}, {}
    for sink in sinks:
        stream = evaluate.with_sink(trained, sink)
        pipeline, side = StreamingPipeline(model, stream), world.SIZE // world.PATCH
        cache = pipeline.new_cache(len(prompts), side, side)
        chunks = evaluate.stream_clips(pipeline, prompts, frames=frames, seed=seed, cache=cache)
        latents, seconds, memory, begun = [], [], [], time.perf_counter()
        for chunk in progress(chunks, sink, frames // stream.chunk_frames):
            seconds.append(time.perf_counter() - begun)
            latents.append(chunk.latents)
            memory.append(float(memory_bytes(model.device)))
            begun = time.perf_counter()
        # chunks until the cache is full and has evicted
        warm = -(-stream.local_attn_size // stream.chunk_frames) + 1
        timed[sink] = {
            "seconds_per_chunk": float(np.median(seconds)),
            "time": flatness(seconds, warm),
            "memory": flatness(memory, warm),
            "cache_bytes": cache.nbytes,
        }
        videos[sink] = codec.decode(torch.cat(latents, dim=1))
    real, _ = world.render(prompts, frames, generator=torch.Generator().manual_seed(seed))
    shown = {"real": real} | videos
    readings = {name: world.measure(video) for name, video in shown.items()}
    figures = {
        "frames": frames,
        "trained_frames": evaluate.shipped("distill")[1].frames,
        "prompts": list(PROMPTS),
        "sinks": timed,
        "curves": {name: _curves(video, prompts, readings[name]) for name, video in shown.items()},
        "measures": {
            name: {
                k: evaluate.interval(v[None])
                for k, v in evaluate.measures(video, prompts, readings[name]).items()
            }
            for name, video in shown.items()
        },
    }
    return videos, figures


def _curves(video, prompts, reading) -> dict:
    """Means over the prompts, every third frame; ``frame`` holds the x axis of each."""
    found, result = evaluate.curves(video, prompts, reading, window=WINDOW), {"frame": {}}
    for key, values in found.items():
        start = (video.shape[1] - values.shape[1]) // 2
        result["frame"][key] = list(range(start, start + values.shape[1], 3))
        result[key] = [round(v, 4) for v in values.nanmean(dim=0)[::3].tolist()]
    return result


def write_film(videos: dict[str, torch.Tensor], folder: Path, *, frames_per_second: int = 16) -> list[Path]:
    """Write ``film.mp4`` (every frame) and ``film.gif`` (every second, smaller): a column a sink, a row a
    prompt."""
    paths = [folder / "film.mp4", folder / "film.gif"]
    large, small = _pages(videos, zoom=4), _pages(videos, zoom=2)[::2]
    write_mp4(torch.from_numpy(large), paths[0], frames_per_second=frames_per_second)
    # one palette for all frames: a palette each would flicker, and weigh more
    palette = Image.fromarray(np.concatenate(list(small[:: max(1, len(small) // 8)]))).quantize(96)
    images = [Image.fromarray(page).quantize(palette=palette, dither=Image.Dither.NONE) for page in small]
    duration = round(2000 / frames_per_second)
    images[0].save(paths[1], save_all=True, append_images=images[1:], duration=duration, loop=0)
    return paths


def _pages(videos: dict[str, torch.Tensor], zoom: int) -> np.ndarray:
    """uint8 ``[F, height, width, 3]``: a line of names over the cells."""
    stacked = torch.stack([video[:SHOWN] for video in videos.values()], dim=1)  # [rows, sinks, F, 3, H, W]
    grid = tile(stacked, zoom=zoom).numpy()
    frames, width = len(grid), grid.shape[2] // len(videos)
    head = 16
    pages = np.full((frames, grid.shape[1] + head, grid.shape[2], 3), 255, np.uint8)
    pages[:, head:] = grid
    for index, page in enumerate(pages):
        label = Image.fromarray(page[:head])
        draw = ImageDraw.Draw(label)
        for column, name in enumerate(videos):
            draw.text((column * width + 2, 2), name, fill="black")
        draw.text((label.width - 26, 2), f"{index:3d}", fill="gray")
        page[:head] = np.asarray(label)
    return pages
