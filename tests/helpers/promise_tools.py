"""What the tests of docs/promises.md share: caches of any kind, chunks drawn from a seed, and all that a cache holds, as bytes."""

import torch

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits, fingerprint

POISON = (float("nan"), float("inf"), -float("inf"), 3e38)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

POLICIES = {
    "none": (0, rf.NoSink()),
    "static": (2, rf.StaticSink()),
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
    settings = {"layers": 2, "batch": 1, "rope": rf.RoPE3D.wan(head_dim)} | more
    return rf.SinkWindowCache(
        grid=grid, heads=heads, head_dim=head_dim, sink_frames=sink_frames, window_frames=window_frames, sink_policy=policy,
        dtype=dtype, **settings,
    )  # fmt: skip


def draw(cache, frames, seed):
    """q, k, v of a chunk in one layer; a sample's numbers do not depend on the batch it is in."""
    size = (frames * cache.frame_tokens, cache.heads, cache.head_dim)
    generators = [torch.Generator().manual_seed(1000 * seed + b) for b in range(cache.batch)]
    return [torch.stack([torch.randn(size, generator=g) for g in generators]).to(cache.dtype) for _ in range(3)]


def forward(cache, plan, inputs):
    """All layers once: ``inputs[layer]`` is (q, k, v). Returns the attention outputs and their LSE."""
    results = []
    for layer, (q, k, v) in enumerate(inputs):
        q = cache[layer].append(q, k, v, plan)
        results += rf.sink_window_attention(
            q, cache[layer].k, cache[layer].v, kv_tokens=plan.kv_tokens, return_lse=True
        )
    return results


def step(cache, frames, seed, forwards=2):
    """One committed chunk of several forwards; results of the last."""
    plan = cache.begin(frames)
    for i in range(forwards):
        inputs = [draw(cache, frames, seed * 100 + i * 10 + layer) for layer in range(len(cache))]
        results = forward(cache, plan, inputs)
    cache.commit(plan)
    return results


def tensors_of(cache):
    """Every tensor that belongs to a cache."""
    tensors = [cache.k, cache.v, cache.k_state, cache.k_state_lo, cache.v_state, cache.skipped_tokens]
    return tensors + [cache._buffers.ints, cache._buffers.floats, cache._alpha, *(cache._undo or {}).values()]


def everything_of(cache):
    """Every tensor and every host value of a cache, to compare before and after."""
    plan = cache._plan
    host = (cache.next_frame, cache._generation, cache._state_ready, cache._seen_skipped, id(plan))
    if plan is not None:
        host += (plan.open, tuple(plan.evicted), tuple(plan.appended), plan.kv_tokens, plan.shift)
    return fingerprint(*tensors_of(cache)), host


def seen_of(cache):
    """What later chunks can read of a cache between chunks: its valid prefix and, once it has been taken, the sink's state."""
    states = [cache.k_state, cache.k_state_lo, cache.v_state] if cache._state_ready else []
    return [cache.k[:, :, : cache.kv_tokens], cache.v[:, :, : cache.kv_tokens], *(t for t in states if t is not None)]


def assert_all_equal_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_equal_bits(a, b)
