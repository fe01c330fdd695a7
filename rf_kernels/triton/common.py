"""What the Triton kernels share: rounding to the storage type, tiles of pairs, and how a kernel is
launched."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on the CPU). Fixed when triton is imported:
    TRITON_INTERPRET=1."""
    return triton.knobs.runtime.interpret


INTERPRET = tl.constexpr(interpreted())


def next_power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def head_tile(heads: int, head_dim: int, elements: int) -> tuple[int, int]:
    """(heads, dims) of a tile that covers a head's dims, and as many heads as fit in ``elements``; powers of
    two."""
    dims = next_power(head_dim)
    return min(next_power(heads), max(1, elements // dims)), dims


def target():
    """What kernels are compiled for (backend, arch, warp_size); None for the interpreter."""
    return None if interpreted() else triton.runtime.driver.active.get_current_target()


def lanes() -> int:
    """Threads of a warp: 32, or 64 on AMD's compute GPUs."""
    return target().warp_size if target() else 32


def warps(elements: int, each: int) -> int:
    """Warps of a program so that each thread has ``each`` elements of its tile: 1 to 8."""
    return max(1, min(8, elements // (lanes() * each)))


class Tile(NamedTuple):
    """Of a memory-bound kernel: elements of a program's tile, and of a thread."""

    elements: int
    each: int


def tuned_for() -> dict[str, str]:
    """What a choice of tiles holds for, beside the kernel: it decides speed and bits."""
    gpu = target()
    return {"arch": f"{gpu.backend} {gpu.arch}" if gpu else "interpreter", "triton": triton.__version__}


@functools.cache
def tuned() -> dict[str, dict]:
    """What `make tuning TRITON=1` found, kernel -> config, from the file that RF_TRITON_CONFIG names; nothing
    without it."""
    path = os.environ.get("RF_TRITON_CONFIG")
    if not path:
        return {}
    found = json.loads(Path(path).read_text())
    if found["for"] != tuned_for():
        raise ValueError(
            f"RF_TRITON_CONFIG: {path} is for {found['for']}, this is {tuned_for()}: tune again, or unset it"
        )
    return found["configs"]


def config_of(kernel: str, fixed):
    """The config of ``kernel``: ``fixed``, unless another was asked for."""
    return type(fixed)(**tuned()[kernel]) if kernel in tuned() else fixed


def launch(kernel, grid: tuple[int, ...], tensor: torch.Tensor, *args, **constants) -> None:
    """Start ``kernel`` on the device of ``tensor``, on its current stream. Products are not contracted with
    sums unless ``constants`` says so: where a rounding happens is part of what an op promises."""
    constants.setdefault("enable_fp_fusion", False)
    if tensor.is_cpu:  # the interpreter
        kernel[grid](*args, **constants)
        return
    with torch.cuda.device(tensor.device):
        kernel[grid](*args, **constants)


# The interpreter's own casts between float32 and bfloat16 drop the low bits and get subnormal numbers wrong:
# there both directions are done on the bits.


@triton.jit
def widen(value):
    """A value in a storage type as float32; exact."""
    if INTERPRET and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 value in storage type ``dtype``, to nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, rounded, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def pair_mask(inside, dims, PAIRS: tl.constexpr, JOINED: tl.constexpr):
    """The mask for ``load_pairs``: heads ``inside`` [heads], and the first ``dims`` dims (JOINED) or pairs of
    a head."""
    return inside[:, None] & (tl.arange(0, 2 * PAIRS if JOINED else PAIRS)[None, :] < dims)


@triton.jit
def load_pairs(row, head, first, second, mask, PAIRS: tl.constexpr, JOINED: tl.constexpr):
    """Pairs (x, y) of some heads of a token as float32, [heads, PAIRS] each; zero where the mask is not set.

    ``row`` points to the token, ``head`` [heads] leads to a head in it. JOINED: pair i is dims (first + 2i,
    first + 2i + 1), and both are read in one access; else it is (first + i, second + i)."""
    dim = tl.arange(0, 2 * PAIRS if JOINED else PAIRS)[None, :]
    if JOINED:
        both = tl.load(row + head[:, None] + (first + dim), mask=mask, other=0.0)
        x, y = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    else:
        x = tl.load(row + head[:, None] + (first + dim), mask=mask, other=0.0)
        y = tl.load(row + head[:, None] + (second + dim), mask=mask, other=0.0)
    return widen(x), widen(y)


@triton.jit
def store_pairs(row, head, first, second, mask, PAIRS: tl.constexpr, JOINED: tl.constexpr, x, y):
    """The counterpart of ``load_pairs``: x and y are float32, and rounded here."""
    dtype: tl.constexpr = row.dtype.element_ty
    dim = tl.arange(0, 2 * PAIRS if JOINED else PAIRS)[None, :]
    x, y = round_to(x, dtype), round_to(y, dtype)
    if JOINED:
        both = tl.reshape(tl.join(x, y), (x.shape[0], 2 * PAIRS))
        tl.store(row + head[:, None] + (first + dim), both, mask=mask)
    else:
        tl.store(row + head[:, None] + (first + dim), x, mask=mask)
        tl.store(row + head[:, None] + (second + dim), y, mask=mask)
