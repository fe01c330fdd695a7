"""64-bit indexing: right at 2^31 - 1, 2^31 + 1 and 2^32 + 1 elements.

Tensors are views of anonymous memory maps, whose pages exist once they are written: a cache of 2^32 + 1
elements costs the pages of the slots that a call touches. Each view ends at the last element of its map, so
its largest offset is the size named, less one; at most three maps of full size exist at once, and the peak of
resident memory is checked. The result must be, to the bit, that of the same call on small tensors, which is
compared with the oracle. What writes all of a full-size result (``rope``, ``dmd_gradient``) is run at 2^31 +
1 elements and a little more, where that fits in the memory allowed.
"""

import gc
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import rf_kernels as rf
from helpers.promise_tools import assert_all_equal_bits
from rf_kernels.reference import ema_evict as ref_ema
from rf_kernels.reference import rope_append as ref_rope
from rf_kernels.reference.sink_window_attention import sink_window_attention as ref_attention
from rf_kernels.testing import assert_equal_bits, assert_within_eager

ROOT = Path(__file__).resolve().parents[2]
SIZES = pytest.mark.parametrize(
    "elements", [2**31 - 1, 2**31 + 1, 2**32 + 1], ids=["2^31-1", "2^31+1", "2^32+1"]
)
DTYPE = torch.bfloat16
RESIDENT_LIMIT = 6 * 2**30
COMPILER = shutil.which("c++") or shutil.which("g++")


def status(field):
    """A line of /proc/self/status, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.fixture(autouse=True)
def resident_memory():
    """The peak of resident memory of the test stays below the limit."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < RESIDENT_LIMIT


def lazy(elements, dtype=DTYPE):
    """Zeros that take no memory before they are written."""
    pages = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


BATCH, HEADS, DIM, FRAME = 2, 2, 16, 4
ROW = HEADS * DIM


def cache_of(elements):
    """[2, T, H, D]: two dense samples, the first at the start of the map, the second at its end."""
    tokens = elements // BATCH // ROW // FRAME * FRAME
    buffer = lazy(elements)
    view = torch.as_strided(buffer, (BATCH, tokens, HEADS, DIM), (elements - tokens * ROW, ROW, DIM, 1))
    assert view[-1, -1, -1, -1].data_ptr() == buffer[-1].data_ptr()
    return view


def frames_of(cache, slots):
    return torch.cat([cache[:, s * FRAME : (s + 1) * FRAME] for s in slots], 1)


def assert_untouched_around(cache, slots):
    """The frames beside the slots, and those where an offset of 32 bits would have ended up, are still
    zero."""
    last = cache.shape[1] // FRAME - 1
    beside = {s + d for s in slots for d in (-1, 1)}
    wrapped = {(s * FRAME * ROW % 2**bits) // (FRAME * ROW) for s in slots for bits in (31, 32)}
    for s in (beside | wrapped) - set(slots):
        if 0 <= s <= last:
            assert not bool(frames_of(cache, [s]).any()), f"slot {s} of {last + 1}"


@pytest.mark.heavy
@SIZES
def test_rope_append(elements):
    k_cache, v_cache = cache_of(elements), cache_of(elements)
    last = k_cache.shape[1] // FRAME - 1
    slots = [0, last // 2, last - 2, last]
    q, k, v = (randn(BATCH, 4 * FRAME, HEADS, DIM, seed=i) for i in range(3))
    angles, axes = rf.RoPE3D.wan(DIM).table([range(4), range(2), range(2)])
    options = {"angles": angles, "axes": axes, "q_weight": randn(ROW, seed=4), "k_weight": randn(ROW, seed=5)}
    out = rf.rope_append(q, k, v, k_cache, v_cache, slots=torch.tensor(slots, dtype=torch.int32), **options)

    small = [torch.zeros(BATCH, 4 * FRAME, HEADS, DIM, dtype=DTYPE) for _ in range(2)]
    order = torch.arange(4, dtype=torch.int32)
    expected = rf.rope_append(q, k, v, *small, slots=order, **options)
    assert_all_equal_bits([out, frames_of(k_cache, slots), frames_of(v_cache, slots)], [expected, *small])
    assert_untouched_around(k_cache, slots)
    assert_untouched_around(v_cache, slots)

    def oracle(to):
        k_part, v_part = (torch.zeros_like(t).to(to) for t in small)
        wide = {name: t.to(to) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        ref_rope.rope_append(q.to(to), k.to(to), v.to(to), k_part, v_part, slots=order, **wide)
        return k_part

    assert_within_eager(frames_of(k_cache, slots), oracle(torch.float64), oracle(DTYPE))


@pytest.mark.heavy
@SIZES
def test_ema_evict(elements):
    k_cache, v_cache = cache_of(elements), cache_of(elements)
    last = k_cache.shape[1] // FRAME - 1
    slots = [0, 1, last // 2, last - 1, last]  # two sink frames and three sources
    content = [randn(BATCH, 5 * FRAME, HEADS, DIM, seed=i) for i in range(2)]
    for cache, numbers in zip((k_cache, v_cache), content, strict=True):
        for i, s in enumerate(slots):
            cache[:, s * FRAME : (s + 1) * FRAME] = numbers[:, i * FRAME : (i + 1) * FRAME]
    turns = torch.from_numpy(rf.RoPE3D.wan(DIM).temporal_table([3, -2, 5])).float()[None].repeat(2, 1, 1, 1)
    options = {
        "turns": turns,
        "alpha": 0.9,
        "frame_tokens": FRAME,
        "temporal": rf.RoPE3D.wan(DIM).temporal_dims,
    }

    def run(op, k, v, sources):
        states = [torch.zeros(BATCH, 2 * FRAME, HEADS, DIM, dtype=DTYPE) for _ in range(3)]
        schedule = [[1, 2, sources[0], sources[2]], [1, 1, sources[1], 0]]
        op(k, v, *states, schedule=torch.tensor(schedule, dtype=torch.int32), **options)
        return states

    found = run(rf.ema_evict, k_cache, v_cache, slots[2:])
    small = [t.clone() for t in content]
    expected = run(rf.ema_evict, *small, [2, 3, 4])
    assert_all_equal_bits([frames_of(k_cache, slots), frames_of(v_cache, slots), *found], [*small, *expected])
    assert_untouched_around(k_cache, slots)
    assert_untouched_around(v_cache, slots)
    oracle = [t.clone() for t in content]
    run(ref_ema.ema_evict, *oracle, [2, 3, 4])
    for ours, theirs in zip(small, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


def giant(elements, numbers):
    """The same numbers, tokens and heads as far apart as ``elements`` allow (heads spread over half the way
    to the next token)."""
    batch, tokens, heads, dim = numbers.shape
    token_stride = 2 * (elements - dim) // (2 * tokens - 1)
    head_stride = (elements - dim - (tokens - 1) * token_stride) // (heads - 1)
    # less than the number of heads
    offset = elements - dim - (tokens - 1) * token_stride - (heads - 1) * head_stride
    view = torch.as_strided(lazy(elements), numbers.shape, (elements, token_stride, head_stride, 1), offset)
    return view.copy_(numbers)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [{"kv_tokens": 7}, {"chunk_ends": [3, 5, 9], "num_sink_tokens": 2, "num_window_tokens": 4}],
    ids=["dense", "whole"],
)
@SIZES
def test_attention_by_giant_strides(elements, options):
    numbers = [randn(1, 9, h, DIM, seed=i) for i, h in enumerate((4, 2, 2))]
    grad_out = randn(1, 9, 4, DIM, seed=3)

    def run(function, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out, lse = function(*leaves, **options, return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    small = run(rf.sink_window_attention, numbers)
    assert_all_equal_bits(run(rf.sink_window_attention, [giant(elements, t) for t in numbers]), small)
    exact, eager = run(ref_attention, [t.double() for t in numbers]), run(ref_attention, numbers)
    for i in (0, 2, 3, 4):
        assert_within_eager(small[i], exact[i], eager[i])


@pytest.mark.heavy
@SIZES
def test_rope_by_giant_strides(elements):
    numbers = randn(1, 6, 2, DIM)
    angles, axes = rf.RoPE3D.wan(DIM).table([range(3), range(1), range(2)])
    x = giant(elements, numbers)
    assert_equal_bits(rf.rope(x, angles=angles, axes=axes), rf.rope(numbers, angles=angles, axes=axes))


@pytest.mark.heavy
def test_rope_writes_beyond_2_to_31():
    """Dense: the result, 2^31 + 4096 elements, is the one full-size tensor that is resident."""
    tokens, heads, dim = 2**19 + 1, 32, 128
    x = lazy(tokens * heads * dim).view(1, tokens, heads, dim)
    sampled = [0, 1, 2**18, 2**19 - 1, 2**19]
    numbers = randn(1, len(sampled), heads, dim)
    x[:, sampled] = numbers
    axes = [tokens, 1, 0]
    angles = torch.zeros(1, tokens, 2)
    angles[..., 1] = 1.0  # every first pair turns by a right angle: (a, b) -> (-b, a)
    out = rf.rope(x, angles=angles, axes=axes)
    expected = numbers.clone()
    expected[..., 0], expected[..., 1] = -numbers[..., 1], numbers[..., 0]
    assert torch.equal(out[:, sampled], expected)
    for token in (2, 2**18 - 1, 2**18 + 1, 2**19 - 2):
        assert not bool(out[:, token].any())


@pytest.mark.heavy
@pytest.mark.parametrize("elements", [2**31 - 1, 2**31 + 1], ids=["2^31-1", "2^31+1"])
def test_dmd_gradient(elements):
    """Dense, and so two maps and one resident result; x is the fake prediction as well."""
    x, real = lazy(elements).view(1, -1), lazy(elements).view(1, -1)
    sampled = torch.tensor([0, 2**30, 2**31 - 4097, elements - 2, elements - 1])
    fakes, reals = (
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).to(DTYPE),
        torch.tensor([4.0, 4.0, 4.0, 4.0, 4.0]).to(DTYPE),
    )
    x[0, sampled], real[0, sampled] = fakes, reals
    options = rf.DMDOptions(normalize=False, reduction="none")
    gradient, aux = rf.dmd_gradient(x, fake=x, real=real, options=options, return_aux=True)
    assert torch.equal(gradient[0, sampled], fakes - reals)
    assert not bool(gradient[0, sampled[1:] - 2].any()) and not bool(gradient[0, 1:4096].any())
    assert float(aux.loss) == float((fakes - reals).double().square().sum() / 2)
    assert float(aux.gradient_norm) == pytest.approx(
        float((fakes - reals).double().abs().sum() / elements), rel=1e-6
    )
    assert int(aux.dropped) == 0


def test_address_functions(tmp_path):
    """The functions of csrc/math and csrc/rope_append that kernels form addresses with, and the types of all
    strides."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: the address functions cannot be built as host code")
    program = tmp_path / "address_math"
    flags = [
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=undefined",
        "-fno-sanitize-recover",
    ]
    subprocess.run(
        [COMPILER, *flags, f"-I{ROOT}", str(ROOT / "tests/contracts/address_math.cpp"), "-o", str(program)],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
