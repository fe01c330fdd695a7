"""How the streams of golden cases map onto the library's cache: its geometry, the calls, and what a ring that
holds rotated keys has to be compared with (tests/golden/README.md, section 10)."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import rf_kernels as rf
from helpers.golden_cases import Bound, Case
from reward_forcing import StreamConfig
from rf_kernels.reference.streaming import StreamingReference, rotate, token_positions

# ----------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Sink, window and policy of a case, in frames."""

    grid: tuple[int, int]
    sink_frames: int
    window_frames: int
    policy: str
    alpha: float

    @classmethod
    def of(cls, case: Case, capacity_tokens: int, total_frames: int) -> "Geometry":
        """``capacity_tokens`` of the recorded cache; a stream of ``total_frames``."""
        hyper = case.hyper
        frame_tokens, sink_frames = hyper["frame_seqlen"], hyper["sink_frames"]
        reach = hyper.get("max_attention_size_tokens", hyper["local_attn_size"] * frame_tokens)
        visible = min(capacity_tokens, reach) // frame_tokens
        policy = "ema" if sink_frames else "none"
        if sink_frames and capacity_tokens > reach:
            # A cache that outlasts its window averages only once it overflows; until then the sink is the raw
            # first frames.
            if total_frames * frame_tokens > capacity_tokens:
                pytest.skip(
                    "the recorded cache is larger than its window and overflows: no library cache does that"
                )
            policy = "static"
        grid = (hyper["grid_h"], hyper["grid_w"])
        return cls(grid, sink_frames, visible - sink_frames, policy, hyper["alpha"])

    def sink_policy(self, state: str):
        return {
            "ema": rf.EMASink(self.alpha, state=state),
            "static": rf.StaticSink(rephase=True),
            "none": rf.NoSink(),
        }[self.policy]

    def stream_config(self, hyper: dict, state: str) -> StreamConfig:
        visible = self.sink_frames + self.window_frames
        ours = {"local_attn_size": visible, "sink_policy": self.policy, "sink_state": state}
        return StreamConfig.from_dict({**hyper, **ours})

    def reference(self) -> StreamingReference:
        return StreamingReference(
            grid=self.grid,
            sink_frames=self.sink_frames,
            window_frames=self.window_frames,
            policy=self.policy,
            alpha=self.alpha,
        )


class ReferenceStream:
    """Stands in for a ``SinkWindowCache``, and for each of its chunks, where the whole model runs on the
    reference: same protocol, no ring."""

    hears = False

    def __init__(self, geometry: Geometry, layers: int, batch: int):
        self.spec = SimpleNamespace(grid=geometry.grid, batch=batch, layers=layers, undo_frames=0)
        self.layers = [geometry.reference() for _ in range(layers)]
        self.next_frame = self.first_frame = self.frames = 0
        self.cache = self

    def open(self, frames, start=None, position=None, cut=False, undo=False):
        assert start is None and position is None and not cut
        for layer in self.layers:
            layer.begin(frames)
        self.first_frame, self.frames = self.next_frame, frames
        return self

    chunk = open

    def commit(self):
        self.next_frame += self.frames

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.commit()


def raw(keys: Tensor, frames: list[int], grid: tuple[int, int]) -> Tensor:
    """Keys ``[B, len(frames) * n, H, D]`` un-rotated in float64 from the positions ``frames``."""
    return rotate(keys, -token_positions(frames, grid))


def held_keys_values(cache: rf.SinkWindowCache, layer: int) -> tuple[list[int], Tensor, Tensor]:
    """The frames outside the sink that a committed cache still holds, their raw keys and values."""
    end, n = cache.next_frame, cache.spec.frame_tokens
    frames = list(range(max(cache.spec.sink_frames, end - cache.spec.window_frames), end))
    slots = [cache.spec.sink_frames + (f - cache.spec.sink_frames) % cache.spec.window_frames for f in frames]
    tokens = torch.cat([torch.arange(s * n, (s + 1) * n) for s in slots]) if slots else torch.arange(0)
    k, v = cache.k[layer][:, tokens], cache.v[layer][:, tokens]
    return frames, raw(k, frames, cache.spec.grid) if frames else k.double(), v


def raw_sink(cache: rf.SinkWindowCache, layer: int) -> tuple[Tensor, Tensor]:
    """The sink's state as raw keys and values."""
    k, v = cache.sink_state(layer)
    frames = list(range(k.shape[1] // cache.spec.frame_tokens))
    return (raw(k, frames, cache.spec.grid) if frames else k.double()), v


def check_against_raw_cache(
    bound, cache, layer: int, golden_k: Tensor, golden_v: Tensor, label: str, sink_state: bool = True
):
    """What a committed cache holds against a recorded raw cache ``[B, capacity, H, D]`` whose newest token is
    its last one written.

    The recorded cache has the sink first, then the newest frames in order; unused capacity is at its end.
    """
    n, end = cache.spec.frame_tokens, cache.next_frame
    frames, k, v = held_keys_values(cache, layer)
    recorded_end = min(end * n, golden_k.shape[1])
    window = slice(recorded_end - len(frames) * n, recorded_end)
    bound.check(k, golden_k[:, window], f"{label}: window keys")
    bound.check(v, golden_v[:, window], f"{label}: window values")
    if sink_state and cache.spec.sink_frames:
        k, v = raw_sink(cache, layer)
        bound.check(k, golden_k[:, : k.shape[1]], f"{label}: sink keys")
        bound.check(v, golden_v[:, : v.shape[1]], f"{label}: sink values")


def check_against_reference(
    bound: Bound, cache, layer: int, reference: StreamingReference, label: str, sink_state: bool = True
):
    """What a committed cache holds against the reference's raw keys and values."""
    frames, k, v = held_keys_values(cache, layer)
    assert frames == sorted(reference.window_kv)
    pairs = [(f"frame {f}", reference.window_kv[f], i, k, v) for i, f in enumerate(frames)]
    if sink_state:
        sink_k, sink_v = raw_sink(cache, layer)
        pairs += [(f"sink frame {j}", kv, j, sink_k, sink_v) for j, kv in reference.sink_kv.items()]
    n = cache.spec.frame_tokens
    for name, (expected_k, expected_v), i, ours_k, ours_v in pairs:
        bound.check(ours_k[:, i * n : (i + 1) * n], expected_k, f"{label}: keys of {name}")
        bound.check(ours_v[:, i * n : (i + 1) * n], expected_v, f"{label}: values of {name}")


@dataclass(frozen=True)
class Call:
    """One call of a recorded stream."""

    index: int
    frames: int
    opens: bool
    closes: bool


def recorded_calls(case: Case, frames: list[int]) -> Iterator[Call]:
    """Calls with their frames, and whether they are the first and the last of their chunk."""
    chunks = case.tensors["call_chunk"].tolist()
    for i, chunk in enumerate(chunks):
        opens, closes = i == 0 or chunks[i - 1] != chunk, i + 1 == len(chunks) or chunks[i + 1] != chunk
        yield Call(i, frames[i], opens, closes)


def total_frames(calls: list[Call]) -> int:
    return sum(call.frames for call in calls if call.opens)
