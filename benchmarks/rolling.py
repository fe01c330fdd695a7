"""Rolling Forcing's own pipeline, from its checkout, beside ours with the same parameters and noise.

    python -m benchmarks.rolling DIR            DIR holds the checkout RollingForcing

In float64, for each length: whether the denoising forwards are the same (their order, the timestep of every
frame, the first frame), how many frames each forward attends, and the relative L2 between the latents. Some
of their modules compute in float32. ``docs/policies.md`` says where the two differ.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch

from reward_forcing import StreamConfig
from reward_forcing.checkpoint import build_model
from reward_forcing.config import ModelConfig
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline

from . import upstream

#: Frames that the cache holds: those of one forward, and with "rolling" those of a context pass too.
POLICIES = {"static": {"local_attn_size": 21}, "rolling": {"local_attn_size": 36}}
SIZES = {"heads": 2, "head_dim": 32, "grid": (4, 6)}


@contextlib.contextmanager
def own_noise():
    """The noise of a latent is a function of it, however their code draws and cuts it."""
    theirs, torch.randn_like = torch.randn_like, lambda x, **_: (3 * x).sin()
    try:
        yield
    finally:
        torch.randn_like = theirs


class Keys:
    """Counts the keys of every attention of the first layer."""

    def __init__(self, layers: int):
        self.layers, self.calls = layers, []

    def __call__(self, q, k, v, *args, **kwargs):
        self.calls.append(k.shape[1])
        return upstream.attention(q, k, v)

    def of_forwards(self, frame_tokens: int) -> list[int]:
        return [keys // frame_tokens for keys in self.calls[:: self.layers]]


def theirs(rig: upstream.RollingForcing, frames: int) -> tuple[torch.Tensor, list, list[int]]:
    """Latents, the denoising forwards (first frame, timesteps), and the frames that each forward attends,
    context passes included."""
    pipeline, forwards, keys = rig.pipeline(torch.float64), [], Keys(rig.layers)
    own = pipeline.generator.forward

    def forward(**given):
        if not given.get("updating_cache"):
            forwards.append((given["current_start"] // rig.frame_tokens, given["timestep"][0].tolist()))
        return own(**given)

    pipeline.generator.forward, rig.code.attention = forward, keys
    with own_noise(), contextlib.redirect_stdout(None), torch.no_grad():
        latents = rig.stream(pipeline, rig.noise(frames, torch.float64), torch.float64)
    rig.code.attention = upstream.attention
    return latents, forwards, keys.of_forwards(rig.frame_tokens)


def ours(rig: upstream.RollingForcing, frames: int, **options) -> tuple[torch.Tensor, list, list[int]]:
    width, settings = rig.heads * rig.head_dim, rig.settings()
    sizes = {"dim": width, "ffn_dim": 2 * width, "freq_dim": 32, "text_dim": 16, "text_len": 8}
    config = ModelConfig(**sizes, num_heads=rig.heads, num_layers=rig.layers, in_dim=4, out_dim=4)
    state = rig.generator(torch.float64).model.state_dict()
    place = {"dtype": torch.float64, "device": "cpu"}
    model = build_model(CausalWanModel, state, config, source="RollingForcing", **place)
    stream = {"chunk_frames": rig.chunk, "sink_frames": rig.chunk, "local_attn_size": rig.window}
    stream |= {"denoising_step_list": tuple(settings.denoising_step_list), "shift": 8.0}
    config = StreamConfig(**stream | {"sink_policy": "static", "rolling": True} | options)
    line, forwards, attended = StreamingPipeline(model, config), [], []
    own = model.forward

    def forward(x, t, text, chunk):
        attended.append(chunk.plan.kv_tokens // rig.frame_tokens)
        if t.shape[1] > 1:  # a context pass has one timestep
            forwards.append((chunk.first_frame, t[0].tolist()))
        return own(x, t, text, chunk)

    model.forward = forward
    noise, text = rig.noise(frames, torch.float64), rig.text(torch.float64)(["a prompt"])["prompt_embeds"]
    return line.rollout(noise, text, noise_source=lambda x: (3 * x).sin()), forwards, attended


def compare(folder: Path, frames: int, **options) -> dict:
    rig = upstream.RollingForcing(folder / upstream.RollingForcing.checkout, **SIZES)
    expected, their_forwards, their_keys = theirs(rig, frames)
    found, forwards, keys = ours(rig, frames, **options)
    return {
        "frames": frames,
        "same forwards": forwards == their_forwards,
        "theirs": their_keys,
        "ours": keys,
        "distance": float((found - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, nargs="+", default=[21, 45])
    options = parser.parse_args()
    for frames in options.frames:
        for name, sizes in POLICIES.items():
            found = compare(options.folder, frames, sink_policy=name, **sizes)
            print(json.dumps({"policy": name} | found))


if __name__ == "__main__":
    main()
