"""ema_evict beside the published sink update.

    pytest benchmarks/bench_ema_evict.py --benchmark-only --benchmark-columns=median,iqr,rounds

Two jobs. ``update``: what a chunk's first forward does to one layer's cache, without norm and RoPE: a leaving chunk is fused into the
sink and the new one is written. Published: roll, average, write, concatenate sink and window. Ours: ``ema_evict`` and
``rope_append`` with nothing to normalise or rotate; the attended keys are then a prefix of the cache. ``evict``: ``ema_evict`` alone,
beside a plain-PyTorch copy of memory of the same size; GB/s counts the floor of ``ema_evict.cost``.
"""

import pytest
import torch

import rf_kernels as rf
from rf_kernels.reference.published.attention import EMASinkKVCache

SINK, WINDOW, CHUNK, ALPHA = 3, 6, 3, 0.999
HEADS, HEAD_DIM = 12, 128
GRIDS = {"15x26": (15, 26), "30x52": (30, 52)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE = rf.RoPE3D.wan(HEAD_DIM)


def problem(grid, dtype):
    """n, and the q, k, v of a chunk."""
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    return n, [torch.randn(1, CHUNK * n, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(3)]


def published_update(grid, dtype):
    """One call of the returned function is one chunk on a full cache."""
    n, (_, k, v) = problem(grid, dtype)
    capacity, S = (SINK + WINDOW) * n, SINK * n
    cache = EMASinkKVCache(1, capacity, HEADS, HEAD_DIM, dtype)
    position = 0

    def chunk():
        nonlocal position
        end = cache.append(k, v, position, S, ALPHA)
        position += CHUNK * n
        start = max(S, end - capacity + S)
        return [torch.cat([x[:, :S], x[:, start:end]], dim=1) for x in (cache.k, cache.v)]

    for _ in range(4):  # fill
        chunk()
    return chunk


def evict_arguments(grid, dtype, state):
    n, (q, k, v) = problem(grid, dtype)
    caches = [torch.randn(1, (SINK + WINDOW) * n, HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    half = dtype.itemsize == 2
    wide = torch.float32 if half and state == "float32" else dtype
    zeros = lambda kind: torch.zeros(1, SINK * n, HEADS, HEAD_DIM, dtype=kind)  # noqa: E731
    states = [caches[0][:, : SINK * n].to(wide, copy=True), None, None]
    if half and state == "compensated":
        states[1:] = zeros(dtype), zeros(dtype)
    elif half and state == "float32":
        states[2] = caches[1][:, : SINK * n].float()
    slots = [[SINK + j, SINK + CHUNK + j] for j in range(SINK)]  # the ring's two chunks take turns

    def options(turn):
        deltas = [j - slots[j][turn] for j in range(SINK)]
        table = torch.from_numpy(ROPE.temporal_table([x for d in deltas for x in (d, 30)])).float()
        return dict(
            schedule=torch.tensor([[0, 1, slots[j][turn]] for j in range(SINK)], dtype=torch.int32),
            turns=table.reshape(SINK, 2, ROPE.temporal_pairs, 2),
            alpha=torch.tensor(ALPHA, dtype=torch.float64),
            frame_tokens=n,
            temporal=ROPE.temporal_dims,
            state=state,
        )

    return (q, k, v), caches, states, slots, [options(0), options(1)]


def our_update(grid, dtype, state="compensated"):
    (q, k, v), caches, states, slots, options = evict_arguments(grid, dtype, state)
    write = [torch.tensor([s[turn] for s in slots], dtype=torch.int32) for turn in range(2)]
    turn = 0

    def chunk():
        nonlocal turn
        rf.ema_evict(*caches, *states, **options[turn])
        rf.rope_append(q, k, v, *caches, slots=write[turn])
        turn = 1 - turn
        return caches

    return chunk


def cost(grid, dtype, state="compensated"):
    return rf.ema_evict.cost(
        batch=1,
        sink_frames=SINK,
        frame_tokens=grid[0] * grid[1],
        heads=HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        temporal_pairs=ROPE.temporal_pairs,
        state=state,
    )


def bytes_of_update(grid, dtype):
    """Least bytes of the whole job: the floor of ema_evict, and k and v of the chunk read and written."""
    chunk = CHUNK * grid[0] * grid[1] * HEADS * HEAD_DIM * dtype.itemsize
    return cost(grid, dtype)["bytes"] + 4 * chunk


def measure(benchmark, function, least_bytes, *, group):
    benchmark.group = group
    with torch.no_grad():
        benchmark.pedantic(function, rounds=9, iterations=1, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info["least_bytes"] = least_bytes
        benchmark.extra_info["GB/s"] = round(least_bytes / benchmark.stats["median"] / 1e9, 2)


@pytest.mark.parametrize("path", ["published", "ours"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_update(benchmark, grid, dtype, path):
    make = {"published": published_update, "ours": our_update}[path]
    size = GRIDS[grid], DTYPES[dtype]
    measure(benchmark, make(*size), bytes_of_update(*size), group=f"update {grid} {dtype}")


@pytest.mark.parametrize("path", ["copy", "compensated", "float32", "published"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_evict(benchmark, dtype, path):
    size = GRIDS["30x52"], DTYPES[dtype]
    state = "published" if path == "copy" else path
    least = cost(*size, state)["bytes"]
    if path == "copy":
        source = torch.randn(least // 8)
        target = torch.empty_like(source)
        function = lambda: target.copy_(source)  # noqa: E731
    else:
        _, caches, states, _, options = evict_arguments(*size, state)
        function = lambda: rf.ema_evict(*caches, *states, **options[0])  # noqa: E731
    measure(benchmark, function, least, group=f"evict 30x52 {dtype}")
