"""Every Triton kernel, compiled ahead of time for GPUs that are not there: no spills, shared memory that the
GPU has, and 16-byte accesses in the memory-bound ops (the rules of `benchmarks/audit`)."""

import importlib

import pytest
import torch

import rf_kernels as rf

pytest.importorskip("triton")
from helpers import triton_compiled  # noqa: E402
from helpers.triton_compiled import SHARED, TARGETS, compiling  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton_compiled.triton.knobs.runtime.interpret, reason="in Triton's interpreter nothing is compiled"
)
HALF = torch.bfloat16
N = 4680  # tokens of a chunk of three frames at 480 x 832


def kernels_of(op):
    return importlib.import_module(f"rf_kernels.triton.{op}")


def compiled(target, op, *args, name=None):
    with compiling(target) as kernels:
        getattr(kernels_of(op), name or op)(*args)
    assert kernels
    return {kernel.name: kernel for kernel in kernels}


def rope_append_arguments(dtype, layout="adjacent"):
    rope = rf.RoPE3D.wan(128)
    angles, axes = rope.table([range(3), range(30), range(52)], dtype=dtype)
    q, k, v = (torch.empty(1, N, 12, 128, dtype=dtype) for _ in range(3))
    caches = [torch.empty(1, 3 * N, 12, 128, dtype=dtype) for _ in range(2)]
    weight, slots = torch.ones(1536, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    code = {"adjacent": 0, "half": 1}[layout]
    return q, k, v, *caches, slots, angles, axes, code, weight, weight, 1, 1e-6, torch.empty_like(q)


def ema_evict_arguments(dtype, state):
    n, sinks = 1560, 3
    caches = [torch.empty(1, 12 * n, 12, 128, dtype=dtype) for _ in range(2)]
    wide = {0: dtype, 1: torch.float32, 2: dtype}[state]
    k_state = torch.empty(1, sinks * n, 12, 128, dtype=wide)
    low = torch.empty(1, sinks * n, 12, 128, dtype=dtype) if state == 0 else None
    v_state = None if state == 2 else torch.empty_like(k_state)
    schedule, turns = torch.zeros(sinks, 4, dtype=torch.int32), torch.zeros(sinks, 3, 22, 2)
    alpha, skipped = torch.tensor(0.999, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    return *caches, k_state, low, v_state, schedule, turns, alpha, n, [0, 1, 2], state, True, skipped


def dmd_gradient_arguments(dtype):
    x, *predictions = (torch.empty(2, 21, 16, 60, 104, dtype=dtype) for _ in range(4))
    outputs = [torch.empty_like(x), torch.empty(()), *(torch.empty(2) for _ in range(3))]
    outputs += [torch.zeros((), dtype=torch.int64), torch.empty(())]
    fake, real, uncond = predictions
    weight = torch.empty(2)
    options = (None, None, weight, None, True, 0.0, 0.0, NAN_SAMPLE, MEAN, True)
    return x, fake, real, None, uncond, 0.0, 3.0, *options, *outputs


NAN_SAMPLE, MEAN = 1, 0  # codes of the registered op


def assert_wide(kernel, stores, narrow_stores=0):
    """All data in 16-byte accesses: at least ``stores`` of them, and no others but ``narrow_stores`` single
    numbers."""
    wide = [bits for bits in kernel.stores if bits == 128]
    assert len(wide) >= stores and len(kernel.stores) - len(wide) <= narrow_stores, kernel
    assert sum(bits == 128 for bits in kernel.loads) >= len(wide), kernel


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_memory_bound_ops(target, dtype):
    for layout in ("adjacent", "half"):
        found = compiled(target, "rope_append", *rope_append_arguments(dtype, layout))
        assert_wide(found["_append"], 2)
        assert_wide(found["_rope"], 1)
        assert not any(kernel.spills for kernel in found.values())
    for state in (0, 1, 2) if dtype.itemsize == 2 else (2,):
        kernel = compiled(target, "ema_evict", *ema_evict_arguments(dtype, state))["_evict"]
        assert_wide(kernel, 3)
        assert not kernel.spills
    found = compiled(target, "dmd_gradient", *dmd_gradient_arguments(dtype))
    assert list(found) == ["_measure", "_normalise", "_finish", "_sum_up"]  # the number of launches is fixed
    assert_wide(found["_finish"], 1, narrow_stores=2)  # a tile's two sums
    assert sum(bits == 128 for bits in found["_measure"].loads) >= 4  # x, fake, real, real_uncond
    assert not any(kernel.spills for kernel in found.values())


# Bytes (registers on AMD) that a thread of the attention kernels may spill: a handful for sm_120 and gfx942,
# and in wide heads. Float32 has three products where half precision has one, and their operands beside them.
def spills_allowed(target, dtype, head_dim):
    if dtype == torch.float32:
        return 64 if head_dim <= 128 else 160  # 16 x 16 tiles are the smallest that a dot product takes
    return 0 if target in ("sm_80", "sm_90", "sm_100") and head_dim <= 128 else 32


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(HALF, d) for d in (64, 128, 256)]
    + [(torch.float16, 128)]
    + [(torch.float32, d) for d in (64, 128, 256)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, dtype, head_dim):
    q, out, grad_q = (torch.empty(1, N, 12, head_dim, dtype=dtype) for _ in range(3))
    k, v, grad_k, grad_v = (torch.empty(1, 3 * N, 12, head_dim, dtype=dtype) for _ in range(4))
    lse, options = torch.empty(1, 12, N), (3 * N, head_dim**-0.5, None, 0, None, None, None)
    found = compiled(target, "sink_window_attention", q, k, v, *options, out, lse)
    backward = (out, q, k, v, out, lse, *options, grad_q, grad_k, grad_v)
    found |= compiled(target, "sink_window_attention", *backward, name="sink_window_attention_backward")
    assert list(found) == ["_forward", "_backward_q", "_backward_kv"]
    for kernel in found.values():
        assert kernel.spills <= spills_allowed(target, dtype, head_dim), kernel
        assert kernel.shared <= SHARED[target], kernel
