"""What the tests of docs/promises.md share: caches of any kind, chunks drawn from a seed, and all that a
cache holds, as bytes."""

import torch

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits, fingerprint

POISON = (float("nan"), float("inf"), -float("inf"), 3e38)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

POLICIES = {
    "none": (0, rf.NoSink()),
    "static": (2, rf.StaticSink(rephase=True)),
    "compensated": (2, rf.EMASink(0.9)),
    "float32": (2, rf.EMASink(0.9, state="float32")),
    "published": (2, rf.EMASink(0.9, state="published")),
    "held": (2, rf.EMASink(0.9, held=(1,))),
}


def poison_of(value: float, dtype: torch.dtype) -> float:
    """3e38 is no float16: its largest finite number instead."""
    return min(value, torch.finfo(dtype).max) if value == 3e38 else value


def make_cache(
    policy="compensated", *, window_frames=4, dtype=torch.float32, grid=(1, 3), heads=2, head_dim=16, **more
):
    """A small cache; ``policy`` names an entry of POLICIES or is a policy (of two sink frames)."""
    sink_frames, policy = POLICIES[policy] if isinstance(policy, str) else (2, policy)
    settings = {"layers": 2, "batch": 1, "rope": rf.RoPE3D.wan(head_dim), "device": "cpu"} | more
    spec = rf.CacheSpec(
        grid=grid,
        heads=heads,
        head_dim=head_dim,
        sink_frames=sink_frames,
        window_frames=window_frames,
        dtype=dtype,
        **settings,
    )
    return rf.SinkWindowCache(spec, sink=policy)


def draw(cache, frames, seed):
    """q, k, v of a chunk in one layer; a sample's numbers do not depend on the batch it is in."""
    spec = cache.spec
    size = (frames * spec.frame_tokens, spec.heads, spec.head_dim)
    generators = [torch.Generator().manual_seed(1000 * seed + b) for b in range(spec.batch)]
    return [
        torch.stack([torch.randn(size, generator=g) for g in generators]).to(spec.dtype) for _ in range(3)
    ]


def forward(chunk, inputs):
    """All layers once: ``inputs[layer]`` is (q, k, v). Returns the attention outputs and their LSE."""
    results = []
    for layer, (q, k, v) in enumerate(inputs):
        q = chunk.append(layer, q, k, v)
        k, v, tokens, bias = chunk.kv(layer)
        results += rf.sink_window_attention(q, k, v, kv_tokens=tokens, kv_bias=bias, return_lse=True)
    return results


def step(cache, frames, seed, forwards=2):
    """One committed chunk of several forwards; results of the last."""
    with cache.chunk(frames) as chunk:
        for i in range(forwards):
            inputs = [draw(cache, frames, seed * 100 + i * 10 + layer) for layer in range(cache.spec.layers)]
            results = forward(chunk, inputs)
    return results


def states_of(cache):
    """The tensors of the sink's state, counters apart."""
    return {name: t for name, t in cache._sink.tensors.items() if name != "skipped"}


def tensors_of(cache):
    """Every tensor that belongs to a cache."""
    own = [cache.k, cache.v, *cache._sink.tensors.values(), *cache._undo.values()]
    return own + [cache._buffers.ints, cache._buffers.floats, getattr(cache._sink, "_alpha", None)]


def everything_of(cache):
    """Every tensor and every host value of a cache, to compare before and after."""
    chunk = cache._chunk
    host = (cache.next_frame, cache._broken, id(chunk))
    if chunk is not None:
        host += (
            chunk.is_open,
            tuple(chunk._evicted),
            tuple(chunk._appended),
            chunk.kv_tokens,
            chunk.plan.shift,
        )
    return fingerprint(*tensors_of(cache)), host


def seen_of(cache):
    """What later chunks can read of a cache between chunks: its valid prefix and, once it has been taken, the
    sink's state."""
    states = states_of(cache).values() if cache.next_frame > cache.ring.length else ()
    return [cache.k[:, :, : cache.kv_tokens], cache.v[:, :, : cache.kv_tokens], *states]


def assert_all_equal_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_equal_bits(a, b)
