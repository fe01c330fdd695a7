"""What the memory-bound kernels move, beside the least that their job can move: at most 1.05 times that at
the real shapes."""

import pytest
import torch

import rf_kernels as rf
from benchmarks import floors, traffic
from helpers.attention_case import DENSE, WHOLE, make_case, visible

LIMIT = 1.05
WAN = rf.RoPE3D.wan(128)
GRID, HEADS, HEAD_DIM = (30, 52), 12, 128
FRAME_TOKENS = GRID[0] * GRID[1]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)


def check(predicted, floor):
    assert floor["bytes"] <= sum(predicted.values()) <= LIMIT * floor["bytes"], (predicted, floor)


@dtypes
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("heads", [12, 3, 40])
def test_rope_append(dtype, frames, heads):
    angles, _ = WAN.table([range(6, 6 + frames), *map(range, GRID)], dtype=dtype)
    shape = dict(
        batch=1, tokens=frames * FRAME_TOKENS, q_heads=heads, kv_heads=heads, head_dim=HEAD_DIM, dtype=dtype
    )
    predicted = traffic.rope_append(**shape, frames=frames, angles=angles.shape[1], weight_bytes=4)
    check(predicted, floors.rope_append(**shape, pairs=WAN.pairs))


@dtypes
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 0], [2, 1, 1], [1]], ids=str)
def test_ema_evict(dtype, state, counts):
    """Chunks of three frames, of one, of four; one sink frame."""
    shape = dict(batch=1, frame_tokens=FRAME_TOKENS, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, state=state)
    shape["temporal_pairs"] = WAN.temporal_pairs
    predicted = traffic.ema_evict(**shape, counts=counts)
    check(predicted, floors.ema_evict(**shape, sink_frames=len(counts), sources=sum(counts)))


@dtypes
@pytest.mark.parametrize(
    "options", [dict(), dict(fake_uncond=True), dict(flow=True), dict(normalize=False)], ids=str
)
def test_dmd_gradient(dtype, options):
    """One sample is read once in every dtype whose differences fit on the chip (float64's do); a batch of
    four is not: its predictions are then read twice by any kernel, x is not."""
    for samples, once in ((1, True), (4, False)):
        shape = (samples, 21, 16, 60, 104)
        predicted = traffic.dmd_gradient(shape, dtype, **options, weight_elements=samples)
        floor = floors.dmd_gradient(shape, dtype, **options, weight_elements=samples)
        elements = torch.Size(shape).numel()
        assert elements * max(dtype.itemsize, 4) < 132 * 227 * 1024 or not once
        assert (predicted["again"] == 0) == once
        if not once:
            floor["bytes"] += (3 + options.get("fake_uncond", False)) * elements * dtype.itemsize
        check(predicted, floor)


def test_floors_of_one_chunk_of_wan():
    """Wan2.1-1.3B: q, k, v in and out are six times 14.4 MB in bf16."""
    chunk = dict(batch=1, tokens=4680, head_dim=128, dtype=torch.bfloat16, pairs=(22, 21, 21))
    elements = 4680 * 12 * 128
    assert floors.rope_append(q_heads=12, **chunk)["bytes"] == 6 * 2 * elements
    assert floors.rope_append(q_heads=12, kv_heads=3, **chunk)["bytes"] == 2 * (2 * elements + elements)
    shape = (1, 21, 16, 60, 104)
    elements = 21 * 16 * 60 * 104
    assert floors.dmd_gradient(shape)["bytes"] == 5 * 4 * elements  # x, fake, real, real_uncond, gradient
    flow = [floors.dmd_gradient(shape, flow=True, normalize=n)["bytes"] for n in (True, False)]
    assert flow == [6 * 4 * elements, 4 * 4 * elements]  # and x_t; neither x_t nor x without the normaliser


def test_floor_of_an_eviction():
    one = dict(batch=1, sink_frames=3, frame_tokens=2, heads=1, head_dim=8, dtype=torch.float32)
    frame = (
        2 * 8 * 4
    )  # one source's K and V, three key states read and slots written, K and V state read and written once
    assert floors.ema_evict(**one, sources=1)["bytes"] == frame * (2 + 3 * 2 + 3)
    # One frame of 2 x 3 x 5 x 16 elements into each of two sink frames, bfloat16, hi + lo: evicted K and V
    # read (4 bytes an element), K state read and written (8), V slot and lo read and written (8), K slot
    # written (2).
    two = dict(batch=2, sink_frames=2, frame_tokens=5, heads=3, head_dim=16, dtype=torch.bfloat16)
    floor, elements = floors.ema_evict(**two, temporal_pairs=4), 2 * 2 * 5 * 3 * 16
    assert floor["bytes"] == elements * (4 + 8 + 8 + 2)
    assert floor["flops"] == 6 * elements + 2 * (2 * 2 * 5 * 3) * 4 * 6


@pytest.mark.parametrize("case", [*DENSE.values(), *WHOLE.values()], ids=str)
def test_attention_counts_visible_pairs(case):
    (q, k, v), options = make_case(torch.bfloat16, case)
    batch, queries, heads, dim = q.shape
    pairs = int(visible(queries, k.shape[1], **options).sum())
    floor = floors.sink_window_attention(batch, queries, heads, dim, kv_heads=k.shape[2], **options)
    assert floor["flops"] == 4 * batch * heads * dim * pairs
    seen = 2 * k[:, : options.get("kv_tokens", k.shape[1])].numel()
    assert floor["bytes"] == 2 * (2 * q.numel() + seen) + 4 * batch * heads * queries
