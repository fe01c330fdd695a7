"""ema_evict: the oracle against an independent recursion, the op against the oracle, and what the op
promises."""

import itertools
import os

import numpy as np
import pytest
import torch

import rf_kernels as rf
from helpers.ema_evict_case import (
    DTYPES,
    HALF,
    LAYOUTS,
    STATES,
    WAN,
    Case,
    eager,
    equal,
    joined,
    op_arguments,
    turn_table,
)
from rf_kernels.reference.ema_evict import ema_evict as reference
from rf_kernels.testing import assert_equal_bits, assert_within_eager, relative_l2

# ---- the formula -------------------------------------------------------------------------------------------


def turned(x, rope, frames):
    """Complex multiplication, written independently of the oracle: temporal pairs of x [..., D] at
    ``frames``."""
    x = x.clone()
    x0, y0, step = rope.temporal_dims
    for i, w in enumerate(rope.frequencies(rope.temporal_axis)):
        a, b = x0 + i * step, y0 + i * step
        z = torch.complex(x[..., a], x[..., b]) * torch.polar(
            torch.tensor(1.0).double(), torch.tensor(w * frames)
        )
        x[..., a], x[..., b] = z.real, z.imag
    return x


def stream(raw_k, raw_v, *, sink_frames, window, chunk, alpha, rope, dtype, state, function, held=()):
    """Feed un-rotated frames [frames, n, H, D] through a ring of rotated keys, chunk by chunk, as design of
    the cache has it.

    Returns the written tensors, the final shift, and the number of calls.
    """
    frames, n = raw_k.shape[:2]
    slots, S = sink_frames + window, sink_frames
    k = torch.zeros(1, slots * n, *raw_k.shape[2:], dtype=dtype)
    v = torch.zeros_like(k)
    precision = state if dtype in HALF else "published"
    k_state = torch.zeros(
        1, S * n, *raw_k.shape[2:], dtype=torch.float32 if precision == "float32" else dtype
    )
    k_lo = torch.zeros_like(k_state) if precision == "compensated" else None
    v_state = torch.zeros_like(k_state) if precision != "published" else None
    slot = lambda f: f if f < S else S + (f - S) % window  # noqa: E731
    calls = shift = 0
    for begin in range(0, frames, chunk):
        end = min(begin + chunk, frames)
        shift = max(0, end - slots)
        if shift:
            leaving = [[] for _ in range(S)]
            for f in range(max(begin, slots), end):
                if (f - window - S) % S not in held:
                    leaving[(f - window - S) % S].append(f - window)
            width = max(map(len, leaving))
            plan = [[int(calls == 0), len(e), *map(slot, e), *[0] * (width - len(e))] for e in leaving]
            deltas = [[*(j - f for f in e), *[0] * (width - len(e)), shift] for j, e in enumerate(leaving)]
            function(
                k,
                v,
                k_state,
                k_lo,
                v_state,
                schedule=torch.tensor(plan, dtype=torch.int32).reshape(S, 2 + width),
                turns=turn_table(rope, deltas, dtype),
                alpha=alpha,
                frame_tokens=n,
                temporal=rope.temporal_dims,
                state=state,
            )
            calls += 1
        for f in range(begin, end):
            rows = slice(slot(f) * n, (slot(f) + 1) * n)
            k[0, rows] = turned(raw_k[f], rope, f).to(dtype)
            v[0, rows] = raw_v[f].to(dtype)
    return (k, v, k_state, k_lo, v_state, None), shift, calls


def recursion(raw, *, sink_frames, window, alpha, held=()):
    """sink <- alpha sink + (1 - alpha) evicted on un-rotated float64 frames: the paper's formula, frame by
    frame."""
    state = raw[:sink_frames].clone()
    for e in range(sink_frames, raw.shape[0] - window):
        j = (e - sink_frames) % sink_frames
        if j not in held:
            state[j] = alpha * state[j] + (1 - alpha) * raw[e]
    return state.flatten(0, 1)


@pytest.mark.parametrize("function", [reference, rf.ema_evict], ids=["oracle", "op"])
@pytest.mark.parametrize(
    "sink_frames, window, chunk, frames, held",
    [
        (3, 6, 3, 30, ()),
        (1, 4, 1, 20, ()),
        (2, 5, 4, 26, ()),
        (1, 6, 5, 31, ()),
        (3, 6, 2, 24, ()),
        (3, 5, 3, 27, (1,)),
    ],
    ids=["F=S", "F=S=1", "F>S", "many_per_sink_frame", "F<S", "held"],
)
def test_rotations_commute_with_the_average(function, sink_frames, window, chunk, frames, held):
    generator = torch.Generator().manual_seed(3)
    raw_k, raw_v = (torch.randn(frames, 4, 2, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    options = dict(sink_frames=sink_frames, window=window, alpha=0.8, held=held)
    out, shift, calls = stream(
        raw_k,
        raw_v,
        chunk=chunk,
        rope=WAN,
        dtype=torch.float64,
        state="published",
        function=function,
        **options,
    )
    assert calls > 3 and shift == frames - sink_frames - window
    expected_k, expected_v = recursion(raw_k, **options), recursion(raw_v, **options)
    by_frame = expected_k.unflatten(0, (sink_frames, 4))
    state = torch.cat([turned(by_frame[j], WAN, j) for j in range(sink_frames)])
    read = torch.cat([turned(by_frame[j], WAN, j + shift) for j in range(sink_frames)])
    n_sink = sink_frames * 4
    assert relative_l2(out[2][0], state) < 1e-14
    assert relative_l2(out[0][0, :n_sink], read) < 1e-14
    assert relative_l2(out[1][0, :n_sink], expected_v) < 1e-15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES)
def test_within_eager(dtype, state, layout):
    case = Case(dtype, state, rope=LAYOUTS[layout])
    out = case.run()
    oracle = case.wide()
    naive = [case.k.clone(), case.v.clone(), case.k_state.to(dtype)]
    eager(*naive, **case.options)
    n_sink = naive[2].shape[1]
    for got, want, plain in zip(
        (out[0], out[1], joined(case, out)[2].to(dtype)), oracle, (naive[0], naive[1], naive[2]), strict=False
    ):
        assert_within_eager(got, want, plain)
    # The state, in its own precision: each of two evictions may round the state once (u) and the arithmetic a
    # few times (2^-24).
    u = {"compensated": torch.finfo(dtype).eps ** 2, "float32": 0.0}.get(state if dtype in HALF else "", None)
    if u is not None:
        # lo's subnormal grid
        u = max(u, 2.0**-25 if dtype == torch.float16 and state == "compensated" else 0.0)
        for got, want in zip(joined(case, out)[2:], oracle[2:], strict=True):
            assert float((got - want).abs().max()) <= 2 * (u + 8 * 2.0**-24) * float(
                want.abs().max().clamp(min=1)
            )
    assert_equal_bits(out[0][:, n_sink:], case.k[:, n_sink:])  # nothing but the sink slots is written
    assert_equal_bits(out[1][:, n_sink:], case.v[:, n_sink:])
    assert rf.last_dispatch()[:2] == ("ema_evict", os.environ.get("RF_BACKEND", "cpu"))


def test_temporal_pairs_anywhere_in_the_head():
    """Two runs or neighbours, at multiples of a vector and between, side by side and apart, up to the end of
    the head."""
    for head_dim, step in itertools.product((16, 24, 40, 64, 96, 200), (1, 2)):
        for pairs, x0 in itertools.product((1, 4, 7, 8, 12, 20, 33, 64), (0, 3, 4, 8, 32)):
            least = x0 + (pairs if step == 1 else 1)
            places = (least, least + 3, -(-least // 8) * 8, head_dim - pairs) if step == 1 else (least,)
            for y0 in {y for y in places if y >= least and y + (pairs - 1) * step < head_dim}:
                rope = rf.RoPE((pairs,), (1e4,), "half")
                case = Case(torch.float64, "published", rope=rope, head_dim=head_dim, batch=1, n=1, heads=2)
                found, expected = (
                    case.run(function, temporal=(x0, y0, step)) for function in (rf.ema_evict, reference)
                )
                for a, b in zip(found[:3], expected[:3], strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_exactly_representable_inputs_are_equal():
    """Small integers, alpha in quarters, turns by multiples of 90 degrees: no rounding but that of the stored
    values."""
    rng = np.random.default_rng(11)
    for trial in range(120):
        dtype, state = DTYPES[trial % 4], STATES[trial // 4 % 3]
        S, window, n, E = rng.integers(1, 4), rng.integers(1, 7), rng.integers(1, 4), rng.integers(0, 4)
        layout = list(LAYOUTS)[trial % len(LAYOUTS)]
        pool = rng.permutation(window) + S
        plan = []
        for _ in range(S):
            count = int(min(rng.integers(0, E + 1), len(pool)))
            plan.append([int(rng.integers(0, 2)), count, *pool[:count].tolist(), *[0] * (E - count)])
            pool = pool[count:]
        case = Case(
            dtype, state, rope=LAYOUTS[layout], n=int(n), window=int(window), schedule=plan, seed=trial
        )
        for t in case.tensors:
            if t is not None:
                t.copy_(torch.from_numpy(rng.integers(-8, 9, t.shape)))
        if case.k_lo is not None:
            case.k_lo.zero_()
            case.v_state.zero_()
        quarters = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]]).to(case.options["turns"].dtype)
        case.options["turns"] = quarters[
            torch.from_numpy(rng.integers(0, 4, case.options["turns"].shape[:-1]))
        ]
        case.options["alpha"] = float(rng.integers(0, 5)) / 4
        for got, want in zip(case.run(), case.run(reference), strict=True):
            if got is not None:
                assert torch.equal(got, want), (trial, dtype, state, layout)


# ---- state precisions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.999, 0.9, 1 / 3, 0.0, 1.0])
def test_published_is_bit_exact(dtype, alpha):
    # float32 and float64 are published under every name
    state = "published" if dtype in HALF else "compensated"
    case = Case(dtype, state, n=64, heads=2)
    case.options["turns"] = (
        torch.tensor([1.0, 0.0]).to(case.options["turns"].dtype).expand(2, 3, 4, 2).contiguous()
    )
    k, v, k_state, *_ = case.run(alpha=alpha)
    for j, (init, count, *sources) in enumerate(case.options["schedule"].tolist()):
        rows = slice(64 * j, 64 * (j + 1))
        for before, start, after in ((case.k, case.k_state, k), (case.v, case.v, v)):
            sink_tokens = (before if init else start)[:, rows]
            for e in sources[:count]:
                sink_tokens = alpha * sink_tokens + (1 - alpha) * before[:, 64 * e : 64 * (e + 1)]
            assert_equal_bits(after[:, rows], sink_tokens)
        assert_equal_bits(k[:, rows], k_state[:, rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES)
def test_alpha_one_keeps_and_alpha_zero_replaces(dtype, state):
    case = Case(dtype, state, schedule=[[1, 1, 2], [1, 1, 4]])
    kept = case.run(alpha=1.0)
    assert_equal_bits(kept[1], case.v)
    assert_equal_bits(kept[2].to(dtype), case.k[:, :10])
    replaced = case.run(alpha=0.0)
    assert_equal_bits(replaced[1][:, :5], case.v[:, 10:15])
    assert_equal_bits(replaced[1][:, 5:10], case.v[:, 20:25])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_alpha_zero_takes_every_value_as_it_is(dtype):
    """Every finite number of a half precision, subnormal ones among them (but zero: 0 * state + -0 is 0)."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every.where(every.isfinite() & (every != 0), 1.0).view(1, 1, 512, 128)
    k, v = (torch.cat((torch.zeros_like(every), every), 1) for _ in range(2))
    schedule, turns = torch.tensor([[0, 1, 1]], dtype=torch.int32), torch.zeros(1, 2, 0, 2)
    options = dict(schedule=schedule, turns=turns, alpha=0.0, frame_tokens=1, state="published")
    rf.ema_evict(k, v, None, None, None, **options)
    assert_equal_bits(k[:, :1], every)
    assert_equal_bits(v[:, :1], every)


def test_no_temporal_pairs_means_no_turn():
    """Slot and state are the same bits, and the state of the keys can be left to the slot, as for values."""
    for dtype, state in itertools.product(DTYPES, STATES):
        case = Case(dtype, state, rope=LAYOUTS["none"])
        case.k_state.copy_(case.k[:, :10])
        if case.k_lo is not None:
            case.k_lo.zero_()
        case.k[0, 0, 0, 0] = case.k_state[0, 0, 0, 0] = -0.0
        out = case.run()
        assert_equal_bits(out[0][:, :10], out[2].to(dtype))
        if dtype in HALF and state == "float32":
            continue  # this state is never the slot
        case.k_state = None
        again = case.run()
        equal((again[0], again[1], again[3], again[4]), (out[0], out[1], out[3], out[4]))


def test_identity_turn_keeps_every_bit():
    case = Case(torch.float32, "published", schedule=[[1, 0], [1, 0]])
    case.options["turns"] = torch.tensor([1.0, 0.0]).expand(2, 1, 4, 2).contiguous()
    special = torch.tensor([-0.0, -1.0, 0.0, float("inf"), float("nan"), -0.0, 1e-45, -1e-45])
    case.k[..., :8] = special
    out = case.run()
    assert_equal_bits(out[0], case.k)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_state_is_rounded_once_and_to_nearest_even(dtype):
    """A key slot that is written from its state: float32 of every kind (lower halves around the ties of both
    half precisions)."""
    lower = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64
    )
    exact = (
        ((torch.arange(1 << 16).unsqueeze(1) << 16) + lower)
        .to(torch.int32)
        .view(torch.float32)
        .view(1, 1, 1024, -1)
    )
    k, v = torch.ones(exact.shape, dtype=dtype), torch.ones(exact.shape, dtype=dtype)
    rf.ema_evict(
        k,
        v,
        exact.clone(),
        None,
        torch.zeros_like(exact),
        schedule=torch.zeros(1, 2, dtype=torch.int32),
        turns=torch.zeros(1, 1, 0, 2),
        alpha=0.5,
        frame_tokens=1,
        state="float32",
    )
    nan = exact.isnan()
    assert bool(k[nan].isnan().all())
    assert_equal_bits(k[~nan], exact[~nan].to(dtype))
    assert bool((v == 1).all())


@pytest.mark.parametrize("state", STATES)
def test_a_state_of_minus_zero_stays_one(state):
    case = Case(torch.bfloat16, state, rope=LAYOUTS["none"], schedule=[[0, 0], [0, 0]])
    case.k_state.fill_(-0.0)
    if case.k_lo is not None:
        case.k_lo.zero_()
    assert_equal_bits(case.run()[0][:, :10], torch.full_like(case.k[:, :10], -0.0))


def autoregressive(frames, shape, *, rho, generator):
    """Unit-variance AR(1) frames: consecutive frames resemble each other, as those of a video do."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    out = [x]
    for _ in range(frames - 1):
        x = rho * x + (1 - rho**2) ** 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_thousand_evictions(dtype):
    """alpha = 0.999: the state within 3e-4, what attention reads within 2.5e-3 of the float64 recursion on
    un-rotated frames."""
    generator = torch.Generator().manual_seed(5)
    evictions, window = 1000, 4
    # Representable in the dtype, as a cache's values are; the keys are rounded once more when they are
    # rotated.
    raw_k, raw_v = (
        autoregressive(1 + window + evictions, (6, 2, 32), rho=0.9, generator=generator).to(dtype).double()
        for _ in range(2)
    )
    rope = rf.RoPE3D.wan(32)
    options = dict(sink_frames=1, window=window, alpha=0.999)
    expected_k, expected_v = (recursion(raw, **options) for raw in (raw_k, raw_v))
    for state in STATES:
        out, shift, calls = stream(
            raw_k, raw_v, chunk=1, rope=rope, dtype=dtype, state=state, function=rf.ema_evict, **options
        )
        assert calls == evictions == shift
        k, v, k_state, v_state = (t[0] for t in joined(None, out))
        errors = relative_l2(v_state, expected_v), relative_l2(k_state, expected_k)
        if state == "published":  # the contrast: in bf16 the sink hardly leaves its first frame
            assert min(errors) > (1.0 if dtype == torch.bfloat16 else 0.05)
            continue
        assert max(errors) < 3e-4
        assert relative_l2(v[:6], expected_v) < 2.5e-3
        assert relative_l2(k[:6], turned(expected_k, rope, shift)) < 2.5e-3


def test_static_frames_do_not_drift():
    """10,000 re-phasings: the state keeps its bits, and the slot is never further from exact than one
    rounding."""
    dtype = torch.bfloat16
    case = Case(dtype, "compensated", schedule=[[1, 0]], n=3, batch=1, heads=2, window=1)
    options = {k: v for k, v in case.options.items() if k != "skipped"}
    turns = turn_table(WAN, np.arange(10_001)[:, None, None], dtype)
    exact = case.k[0, :3].double()
    rf.ema_evict(*case.tensors, **{**options, "turns": turns[1]})
    before = [t.clone() for t in (case.k_state, case.k_lo, case.v, case.v_state)]
    hold = {**options, "schedule": torch.tensor([[0, 0]], dtype=torch.int32)}
    errors = []
    for shift in range(2, 10_001):
        rf.ema_evict(*case.tensors, **{**hold, "turns": turns[shift]})
        if shift % 250 == 0:
            errors.append(relative_l2(case.k[0, :3], turned(exact, WAN, shift)))
    equal((case.k_state, case.k_lo, case.v, case.v_state), before)
    assert max(errors) < torch.finfo(dtype).eps / 2  # half a unit in the last place, for ever
    late, early = np.mean(errors[-10:]), np.mean(errors[:10])
    assert late < 1.2 * early


# ---- the NaN rule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where, value", [("k", float("nan")), ("v", float("inf")), ("k", float("-inf"))])
def test_nonfinite_source_tokens_are_skipped(dtype, where, value):
    case = Case(dtype, "compensated")
    clean = case.run()
    # Token 2 of frame 4, the second source of sink frame 0 of sample 1; the last element of the last head.
    getattr(case, where)[1, 4 * 5 + 2, -1, -1] = value
    out = case.run()
    assert out[-1].item() == 1
    without = case.run(schedule=torch.tensor([[0, 1, 3, 4], [1, 1, 6, 0]], dtype=torch.int32))
    for got, normal, fewer in zip(out[:5], clean, without, strict=False):
        if got is None:
            continue
        for b, token in itertools.product(range(2), range(10)):
            want = fewer if (b, token) == (1, 2) else normal
            assert_equal_bits(got[b, token], want[b, token])
            assert got[b, token].isfinite().all()
    assert case.run(reference)[-1].item() == 1


def test_counter_accumulates_and_is_optional():
    case = Case(torch.float32, "published")
    case.v[:, 15:25, 0, 3] = float("nan")  # all tokens of both sources of sink frame 0
    case.skipped.fill_(100)
    assert case.run()[-1].item() == 100 + 2 * 2 * 5
    copies = [None if t is None else t.clone() for t in case.tensors]
    rf.ema_evict(*copies, **{**case.options, "skipped": None})
    assert copies[0].isfinite().all() and copies[1][:, :10].isfinite().all()


@pytest.mark.parametrize("state", STATES)
def test_propagate(state):
    case = Case(torch.bfloat16, state)
    case.k[0, 15, 1, 14] = float("nan")  # not a temporal dim
    case.v[1, 31, 2, 0] = float("inf")
    out = case.run(on_nonfinite="propagate")
    assert out[-1].item() == 0
    assert (~out[0][:, :10].isfinite()).nonzero().tolist() == [[0, 0, 1, 14]]
    assert (~out[1][:, :10].isfinite()).nonzero().tolist() == [[1, 6, 2, 0]]


# ---- schedules, memory, threads ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("count", [2, 7, 33, 70])  # 32 sources make a group of the kernel
@pytest.mark.parametrize("init", [0, 1])
def test_several_evictions_are_a_sequence_of_one(state, count, init):
    plan = [[init, count, *range(1, 1 + count)]]
    case = Case(torch.bfloat16, state, schedule=plan, window=count, n=2)
    case.k[0, 2 * min(count, 9), 0, 0] = float("nan")
    together = case.run()
    turns = case.options["turns"]
    for i in range(count):
        step = torch.stack([turns[:, i], turns[:, -1]], 1).contiguous()
        one = torch.tensor([[init if i == 0 else 0, 1, 1 + i]], dtype=torch.int32)
        rf.ema_evict(*case.tensors, **{**case.options, "schedule": one, "turns": step})
    equal(together, [*case.tensors, case.skipped])
    assert case.skipped.item() == 1


def test_held_frames_keep_their_state():
    for state in STATES:
        case = Case(torch.float16, state, schedule=[[0, 0, 0], [0, 1, 4]])
        out = case.run()
        equal((out[1][:, :5],), (case.v[:, :5],))
        for got, before in zip(out[2:5], case.tensors[2:], strict=True):
            if got is not None:
                assert_equal_bits(got[:, :5], before[:, :5])
        assert not torch.equal(out[0][:, :5], case.k[:, :5])  # but its keys are re-phased


@pytest.mark.parametrize("state", STATES)
def test_schedules_per_sample_and_neighbours(state):
    shared = [[0, 1, 3, 0], [1, 2, 6, 4]]
    other = [[1, 2, 4, 5], [0, 0, 0, 0]]
    case = Case(torch.bfloat16, state, schedule=[shared, other, shared], batch=3)
    case.k[1, 7] = float("nan")  # a neighbour's trouble
    out = case.run()
    for b in range(3):
        alone = Case(torch.bfloat16, state, schedule=[shared, other, shared], batch=3)
        alone.k, alone.v, alone.k_state, alone.k_lo, alone.v_state = (
            None if t is None else t[b : b + 1].clone() for t in case.tensors
        )
        options = dict(schedule=case.options["schedule"][b], turns=case.options["turns"][b])
        for got, want in zip(out[:5], alone.run(**options)[:5], strict=True):
            if got is not None:
                assert_equal_bits(got[b : b + 1], want)


def test_alpha_per_frame_and_per_token():
    case = Case(torch.float64, "published")
    per_token = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = case.run(alpha=per_token)
    for j, t in itertools.product(range(2), range(5)):
        single = case.run(alpha=float(per_token[j, t]))
        for i in range(3):
            assert_equal_bits(out[i][:, 5 * j + t], single[i][:, 5 * j + t])
    per_frame = torch.tensor([0.25, 0.75], dtype=torch.float64)
    equal(case.run(alpha=per_frame), case.run(alpha=per_frame[:, None].expand(2, 5)))
    equal(case.run(alpha=torch.tensor(0.9, dtype=torch.float64)), case.run(alpha=0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strided_caches(dtype):
    """A layer of [layers, B, T, H, D] and a [B, H, T, D] buffer give the bits of a contiguous cache; all else
    keeps its bytes."""
    case = Case(dtype, "compensated")
    want = case.run()
    layers = torch.full((3, *case.k.shape), 7.0, dtype=dtype)
    layers[1] = case.k
    heads_first = case.v.transpose(1, 2).contiguous()
    rest = [None if t is None else t.clone() for t in case.tensors[2:]]
    rf.ema_evict(layers[1], heads_first.transpose(1, 2), *rest, **case.options)
    equal((layers[1], heads_first.transpose(1, 2), *rest), want[:5])
    assert bool((layers[0] == 7).all()) and bool((layers[2] == 7).all())


def test_bits_do_not_depend_on_threads(threads):
    case = Case(torch.bfloat16, "compensated", n=300, heads=8)
    case.k[0, 1000:1100, 3, 2] = float("nan")
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(case.run())
    for other in results[1:]:
        equal(results[0], other)


def test_nothing_to_do():
    for schedule, batch in ((torch.zeros(0, 2, dtype=torch.int32), 2), ([[0, 1, 1]], 0)):
        case = Case(torch.float32, "published", batch=batch, schedule=[[0, 1, 1]])
        changes = dict(schedule=torch.as_tensor(schedule, dtype=torch.int32))
        if changes["schedule"].shape[0] == 0:
            changes["turns"] = torch.zeros(0, 1, 4, 2)
            case.k_state = case.k_state[:, :0]
        equal(case.run(**changes)[:2], (case.k, case.v))


# ---- a citizen of PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, state", [(torch.bfloat16, "compensated"), (torch.float32, "published")], ids=str
)
def test_opcheck(dtype, state):
    torch.library.opcheck(torch.ops.rf_kernels.ema_evict, op_arguments(Case(dtype, state)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_compile(backend):
    case = Case(torch.bfloat16, "compensated")

    def step(k, v, k_state, k_lo, v_state, skipped, schedule, turns):
        options = {**case.options, "skipped": skipped, "schedule": schedule, "turns": turns}
        rf.ema_evict(k * 1, v * 1, k_state, k_lo, v_state, **options)  # also through a temporary
        rf.ema_evict(k, v, k_state, k_lo, v_state, **options)
        return k.sum()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    inputs = (case.options["schedule"], case.options["turns"])
    plain = [t.clone() for t in (*case.tensors, case.skipped)]
    traced = [t.clone() for t in plain]
    step(*plain, *inputs)
    compiled(*traced, *inputs)
    equal(plain, traced)


def test_refuses_gradients():
    case = Case(torch.float32, "published")
    case.v.requires_grad_()
    with pytest.raises(rf.ArgumentError, match="v_cache"):
        rf.ema_evict(*case.tensors, **case.options)
    with torch.no_grad():
        rf.ema_evict(*case.tensors, **case.options)
