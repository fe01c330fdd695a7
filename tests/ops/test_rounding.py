"""Where values are rounded, to the bit: the order of operations that csrc/math promises, against exact
fractions and against operations that round one by one."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fraction(value):
    return Fraction(float(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rotation_and_norm_round_like_separate_operations(dtype):
    """Bit for bit what separate operations of PyTorch give: two products and their sum; the norm's scale,
    then the weight."""
    x = normal(2, 6, 3, 16).to(dtype)
    cos, sin = torch.rand(2, 1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    table = torch.stack((cos, sin), -1).reshape(1, 48, 2)  # one axis: a row per token and pair
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = cos[:, :, None], sin[:, :, None]
    expected = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    assert_equal_bits(rf.rope(x, angles=table, axes=[6, 8, 0]), expected)

    # Sums of squares of small integers are exact in any order.
    x = torch.randint(-7, 8, (2, 6, 3, 16), generator=torch.Generator().manual_seed(2)).to(dtype)
    weight, eps = normal(16).to(dtype), 1e-3
    mean = (x.square().sum(-1, keepdim=True) / 16 + eps).numpy()
    # NumPy's root is rounded correctly, PyTorch's is not everywhere
    scale = torch.from_numpy(1 / np.sqrt(mean))
    assert_equal_bits(
        rf.rope(x, angles=None, axes=[], weight=weight, norm="head", eps=eps), x * scale * weight
    )


def nearest_float32(exact):
    """A fraction rounded to float32, to nearest even."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda f: (abs(fraction(f) - exact), int(f.view(np.uint32)) % 2))


def test_a_float32_average_is_two_fused_steps():
    """keep s + (tail s + take x), with alpha = keep + tail: one product is rounded, and each sum once."""
    alpha = 0.9
    keep, take = np.float32(alpha), np.float32(1.0 - alpha)
    tail = np.float32(alpha - float(keep))
    cache, state = normal(1, 2, 4, 64).bfloat16(), normal(1, 1, 4, 64, seed=1).float()
    before, expected = state.flatten().tolist(), []
    for s, x in zip(before, cache[:, 1].flatten().tolist(), strict=True):
        inner = nearest_float32(
            fraction(tail) * fraction(s) + fraction(nearest_float32(fraction(take) * fraction(x)))
        )
        expected.append(nearest_float32(fraction(keep) * fraction(s) + fraction(inner)))
    rf.ema_evict(
        cache,
        cache.clone(),
        state,
        None,
        state.clone(),
        schedule=torch.tensor([[0, 1, 1]], dtype=torch.int32),
        turns=torch.zeros(1, 2, 0, 2),
        alpha=alpha,
        frame_tokens=1,
        state="float32",
    )
    assert_equal_bits(state.flatten(), torch.from_numpy(np.array(expected)))


def test_a_turn_is_a_fused_step_and_only_the_angle_zero_is_none():
    """x cos - (y sin), x sin + (y cos) with the product in parentheses rounded; half a turn changes every
    sign."""
    k = normal(1, 1, 1, 64).float()
    for angle in (0.3, 2.0, None):
        cosine, sine = (
            (np.float32(math.cos(angle)), np.float32(math.sin(angle))) if angle else np.float32((-1, 0))
        )
        out, pairs = k.clone(), k.view(32, 2).tolist()
        rf.ema_evict(
            out,
            k.clone(),
            k.clone(),
            schedule=torch.zeros(1, 2, dtype=torch.int32),
            alpha=0.5,
            frame_tokens=1,
            turns=torch.tensor([float(cosine), float(sine)]).expand(1, 1, 32, 2).contiguous(),
        )
        c, s = fraction(cosine), fraction(sine)
        expected = []
        for x, y in pairs:
            down, up = (fraction(nearest_float32(fraction(y) * f)) for f in (s, c))
            expected += [nearest_float32(fraction(x) * c - down), nearest_float32(fraction(x) * s + up)]
        assert_equal_bits(out.flatten(), torch.from_numpy(np.array(expected)))


def test_a_turn_in_float64_is_fused_as_well():
    k = normal(1, 1, 1, 64)
    cosine, sine = torch.tensor(0.3, dtype=torch.float64).cos(), torch.tensor(0.3, dtype=torch.float64).sin()
    out, (c, s), expected = k.clone(), (fraction(cosine), fraction(sine)), []
    turns = torch.stack((cosine, sine)).expand(1, 1, 32, 2).contiguous()
    plan = torch.zeros(1, 2, dtype=torch.int32)
    rf.ema_evict(out, k.clone(), k.clone(), schedule=plan, turns=turns, alpha=0.5, frame_tokens=1)
    for x, y in k.view(32, 2).tolist():  # float() of a fraction rounds to nearest even
        down, up = (fraction(float(fraction(y) * f)) for f in (s, c))
        expected += [float(fraction(x) * c - down), float(fraction(x) * s + up)]
    assert_equal_bits(out.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_sets_of_keys_are_merged_in_float32_and_rounded_once(dtype):
    """Uniform weights over two sink rows that are all `a` and three window rows that are all `b`: 0.4 a + 0.6
    b within half a unit."""
    a, b = (normal(512, seed=seed).to(dtype) for seed in (0, 1))
    q = k = torch.zeros(1, 8, 2, 256, dtype=dtype)
    v = torch.ones(1, 8, 2, 256, dtype=dtype)
    v[0, :2], v[0, 5:] = a.view(2, 256), b.view(2, 256)
    out = rf.sink_window_attention(q, k, v, chunk_ends=[5, 8], num_sink_tokens=2, num_window_tokens=3)
    exact = 0.4 * a.double() + 0.6 * b.double()
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    error = (out[0, 5:].double().flatten(1) - exact).abs() / unit
    assert error.max() < 0.55  # the kernel's log-sum-exp is off by up to 2^-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_difference_that_is_the_largest_number_is_finite(dtype):
    limit, zero = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    options = rf.DMDOptions(normalize=False, reduction="none")
    gradient, aux = rf.dmd_gradient(zero, fake=limit, real=zero, options=options, return_aux=True)
    assert aux.dropped == 0
    assert_equal_bits(gradient, limit)


def test_gradients_of_keys_that_many_chunks_see_are_summed_in_float32():
    """Every query but the first sees the sink row and itself with weight 1/2; a sum in bfloat16 would stay at
    128."""
    tokens = 513
    q, k, v = (torch.zeros(1, tokens, 1, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    ends = list(range(1, tokens + 1))
    out = rf.sink_window_attention(q, k, v, chunk_ends=ends, num_sink_tokens=1, num_window_tokens=1)
    out.sum().backward()
    assert v.grad[0, 0, 0].tolist() == 16 * [256.0]  # 1 + 512 / 2, rounded once
    assert v.grad[0, 1:].unique().tolist() == [0.5]


def test_bfloat16_has_one_nan():
    """Whatever NaN comes in, what rounding to bfloat16 makes of it is 0x7FFF, as on the GPU."""
    data = (
        torch.tensor([0x7F81, 0x7FC0, 0xFFC1, 0xFFFF] * 4, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
    )
    found = [
        rf.rope(data.view(1, 1, 1, 16), angles=None, axes=[], weight=torch.ones(16).bfloat16(), norm="head")
    ]
    for state in ("compensated", "published"):  # vectors of eight, and one element at a time
        for width in (16, 15):
            k, v = (data[:width].expand(1, 2, 1, width).contiguous() for _ in range(2))
            rest = (
                (torch.zeros_like(k[:, :1]), torch.zeros_like(k[:, :1]))
                if state == "compensated"
                else (None, None)
            )
            rf.ema_evict(
                k,
                v,
                k[:, :1].clone(),
                *rest,
                schedule=torch.tensor([[0, 1, 1]], dtype=torch.int32),
                alpha=0.5,
                turns=torch.zeros(1, 2, 0, 2),
                frame_tokens=1,
                state=state,
                on_nonfinite="propagate",
            )
            found += [k[:, :1], v[:, :1]]
    for result in found:
        assert set(result.reshape(-1).view(torch.int16).tolist()) == {0x7FFF}
