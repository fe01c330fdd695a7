"""What the memory-bound kernels move, beside the least that their job can move: at most 1.05 times that at the real shapes."""

import pytest
import torch

import rf_kernels as rf
from benchmarks import traffic

LIMIT = 1.05
WAN = rf.RoPE3D.wan(128)
GRID, HEADS, HEAD_DIM = (30, 52), 12, 128
FRAME_TOKENS = GRID[0] * GRID[1]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)


def check(predicted, floor):
    assert floor["bytes"] <= sum(predicted.values()) <= LIMIT * floor["bytes"], (predicted, floor)


@dtypes
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("heads", [12, 3, 40])
def test_rope_append(dtype, frames, heads):
    angles, _ = WAN.table([range(6, 6 + frames), *map(range, GRID)], dtype=dtype)
    shape = dict(batch=1, tokens=frames * FRAME_TOKENS, q_heads=heads, kv_heads=heads, head_dim=HEAD_DIM, dtype=dtype)
    predicted = traffic.rope_append(**shape, frames=frames, angles=angles.shape[1], weight_bytes=4)
    check(predicted, rf.rope_append.cost(**shape, pairs=WAN.pairs))


@dtypes
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 0], [2, 1, 1], [1]], ids=str)
def test_ema_evict(dtype, state, counts):
    """Chunks of three frames, of one, of four; one sink frame."""
    shape = dict(batch=1, frame_tokens=FRAME_TOKENS, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, state=state)
    shape["temporal_pairs"] = WAN.temporal_pairs
    predicted = traffic.ema_evict(**shape, counts=counts)
    check(predicted, rf.ema_evict.cost(**shape, sink_frames=len(counts), sources=sum(counts)))


@dtypes
@pytest.mark.parametrize("options", [dict(), dict(fake_uncond=True), dict(flow=True), dict(normalize=False)], ids=str)
def test_dmd_gradient(dtype, options):
    """One sample is read once in every dtype whose differences fit on the chip (float64's do); a batch of four is not: its
    predictions are then read twice by any kernel, x is not."""
    for samples, once in ((1, True), (4, False)):
        shape = (samples, 21, 16, 60, 104)
        predicted = traffic.dmd_gradient(shape, dtype, **options, weight_elements=samples)
        floor = rf.dmd_gradient.cost(shape, dtype, **options, weight_elements=samples)
        elements = torch.Size(shape).numel()
        assert elements * max(dtype.itemsize, 4) < 132 * 227 * 1024 or not once
        assert (predicted["again"] == 0) == once
        if not once:
            floor["bytes"] += (3 + options.get("fake_uncond", False)) * elements * dtype.itemsize
        check(predicted, floor)
