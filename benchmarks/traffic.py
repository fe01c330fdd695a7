"""Bytes that a launch of a memory-bound op moves between memory and chip, counted from the structure of its
CUDA kernel.

Beside the least that the job can move (``floors.py``), the count includes what a kernel adds to it: tables,
weights, schedules, workspaces, rows that nothing needs, passes over memory that does not fit on the chip.
What many blocks read (a table, a weight) and what a block reads again at once (a token that was looked at for
non-finite values) counts once: it is in a cache by then. ``tests/harness/test_bytes.py`` holds the counts
against the floors, and against the accesses of the kernels' bodies run on the host.
"""

from dataclasses import dataclass

import torch

from rf_kernels.positions import table_dtype


def rope_append(
    *,
    batch: int,
    tokens: int,
    frames: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    angles: int,
    norm: bool = True,
    weight_bytes: int | None = None,
) -> dict[str, int]:
    """``rows``: q, k, v read and written. ``shared``: the table of ``angles`` pairs, the weights of a norm
    over the model width (``weight_bytes`` an element), the slots: read by every token's block, moved once."""
    rows = 2 * batch * tokens * (q_heads + 2 * kv_heads) * head_dim * dtype.itemsize
    weights = norm * (q_heads + kv_heads) * head_dim * (weight_bytes or dtype.itemsize)
    return {"rows": rows, "shared": angles * 2 * table_dtype(dtype).itemsize + weights + frames * 4}


def ema_evict(
    *,
    batch: int,
    frame_tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    counts: list[int],
    state: str = "compensated",
    temporal_pairs: int = 0,
) -> dict[str, int]:
    """``rows``: caches and states. ``shared``: schedule, turns and alpha (one number).

    Args:
        counts: sources of each sink frame (of every sample), none of them initialised by the call.
    """
    size, half = dtype.itemsize, dtype.itemsize == 2
    if half and state == "float32":
        state_bytes = 4
    else:
        state_bytes = 2 * size if half and state == "compensated" else size
    per_element = 0
    for count in counts:
        keys = count * size + state_bytes + size  # sources, state, the slot from the state
        values = 0
        if count > 0:
            keys += state_bytes
            # The value slot is hi of the state; beside a float32 state it is written alone.
            values = count * size + 2 * state_bytes + (size if half and state == "float32" else 0)
        per_element += keys + values
    frames, sources = len(counts), max(counts)
    shared = (
        frames * ((2 + sources) * 4 + (sources + 1) * temporal_pairs * 2 * table_dtype(dtype).itemsize) + 8
    )
    return {"rows": batch * frame_tokens * heads * head_dim * per_element, "shared": shared}


@dataclass(frozen=True)
class Chip:
    """What decides between one launch of ``dmd_gradient`` and two (``plan_resident`` of its launch.cu)."""

    processors: int = 132
    shared_bytes_a_block: int = 227 * 1024
    shared_bytes: int = 228 * 1024  # of a processor; a block takes 1024 more than it asks for


H200 = Chip()
TILE = 2048  # elements that dmd_gradient reduces together


def resident(elements: int, samples: int, dtype: torch.dtype, chip: Chip = H200) -> bool:
    """Whether the differences of all tiles stay in shared memory between the two passes."""
    accumulator = table_dtype(dtype).itemsize
    tiles = samples * -(-elements // TILE)
    for blocks in (2, 1):
        each = -(-tiles // (blocks * chip.processors))
        needed = each * TILE * accumulator + 1024  # the arrays of the reductions: less than 1 KiB
        if needed <= chip.shared_bytes_a_block and blocks * (needed + 1024) <= chip.shared_bytes:
            return True
    return False


def dmd_gradient(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    prediction_dtype: torch.dtype | None = None,
    *,
    fake_uncond: bool = False,
    real_uncond: bool = True,
    flow: bool = False,
    normalize: bool = True,
    weight_elements: int = 0,
    mask_elements: int = 0,
    chip: Chip = H200,
) -> dict[str, int]:
    """``rows``: inputs, weight and mask, gradient. ``again``: predictions read a second time, where the
    differences do not fit on the chip. ``shared``: the partial sums of tiles and samples, written and
    read."""
    samples, elements = shape[0], torch.Size(shape[1:]).numel()
    accumulator, size = table_dtype(dtype).itemsize, dtype.itemsize
    predictions = (2 + fake_uncond + real_uncond) * (prediction_dtype or dtype).itemsize
    rows = predictions + size * (1 + normalize)  # x is read for the normaliser alone
    rows += (flow and normalize) * (prediction_dtype or dtype).itemsize
    broadcast = weight_elements * accumulator + mask_elements
    again = 0 if resident(elements, samples, dtype, chip) else samples * elements * predictions
    tiles = samples * -(-elements // TILE)
    # Two sums and a peak of accumulator size (a second sum in pass 2), a count for each block; per sample
    # four results and a flag.
    shared = (
        2 * (4 * tiles * accumulator + 2 * chip.processors * 8) + samples * (4 * accumulator + 2 * 4) + 64
    )
    return {"rows": samples * elements * rows + broadcast, "again": again, "shared": shared}
