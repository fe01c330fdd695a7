"""rope_append and rope: oracle against the golden set and against formulas written independently, the op
against the oracle, the contract (what is written, what is refused), and life as a PyTorch op."""

import json
import math
import re

import mpmath  # a dependency of torch (through sympy)
import pytest
import torch

import rf_kernels as rf
from helpers.golden_cases import parametrize
from helpers.rope_append_case import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    clones,
    compare,
    inputs,
    normal,
    random_bits,
    rope_of,
)
from rf_kernels.reference import rope_append as ref
from rf_kernels.testing import assert_equal_bits, fingerprint

# ---- inputs ------------------------------------------------------------------------------------------------


# ---- golden set --------------------------------------------------------------------------------------------


def golden_runs(case):
    """(prefix, RoPE, positions, rotated tokens) of every run of a golden rope case; pad tokens behind them
    pass through."""
    for run in case.hyper["runs"]:
        frames, rows, columns = run["grid"]
        wan = rf.RoPE3D.wan(run["head_dim"], base=case.hyper["theta"])
        assert list(wan.pairs) == run["pairs_t_h_w"]
        start = run["start_frame"]
        yield (
            f"r{run['id']}",
            wan,
            [range(start, start + frames), range(rows), range(columns)],
            frames * rows * columns,
        )


@parametrize("rope")
@pytest.mark.parametrize("path", [ref.rope, rf.rope], ids=["oracle", "op"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden(case, path, dtype):
    for prefix, rope, positions, tokens in golden_runs(case):
        x, expected = (case.tensors[f"{prefix}.{name}"][:, :tokens] for name in "xy")
        angles, axes = rope.table(positions, dtype=dtype)
        case.tolerance(dtype).check(path(x.to(dtype), angles=angles, axes=axes), expected.to(dtype), prefix)


@parametrize("rope")
def test_golden_bfloat16(case):
    """The published path rotates bf16 in float64 and rounds once, we in float32: the last bit may differ, and
    seldom does."""
    for prefix, rope, positions, tokens in golden_runs(case):
        x = case.tensors[f"{prefix}.x"][:, :tokens].to(torch.bfloat16)
        expected = case.tensors[f"{prefix}.y_bf16"][:, :tokens]
        angles, axes = rope.table(positions, dtype=torch.bfloat16)
        y = rf.rope(x, angles=angles, axes=axes)
        # float32 arithmetic misses by < 2^-22 of the pair's length, 2^-13 of a bf16 unit: that decides few
        # roundings. Any further rounding to bf16 on the way would change a quarter of them.
        assert (y != expected).double().mean() < 0.01
        torch.testing.assert_close(y.double(), expected.double(), rtol=2**-7, atol=1e-6)


@parametrize("rope")
def test_golden_tables(case):
    """The cosines and sines themselves, at the rows that the set names."""
    for head_dim in {run["head_dim"] for run in case.hyper["runs"]}:
        wan = rf.RoPE3D.wan(head_dim, base=case.hyper["theta"])
        for part, name in enumerate(("cos", "sin")):
            expected = case.tensors[f"table_d{head_dim}.{name}"]
            rows = json.loads(re.search(r"\[[\d, ]+\]", case.entry["meaning"][f"table_d{head_dim}.cos"])[0])
            assert len(expected) == len(rows)
            ours = torch.cat([torch.from_numpy(wan.axis_table(a, rows))[..., part] for a in range(3)], dim=1)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


# ---- the oracle, against formulas that share nothing with it -----------------------------------------------


def rotated_by_hand(x, pairs, bases, layout, positions):
    """One scalar at a time: x [N, H, D], positions [N][axes]; complex numbers, angles by math.pow."""
    out = x.clone()
    total = sum(pairs)
    for t in range(x.shape[0]):
        for axis, count in enumerate(pairs):
            before = sum(pairs[:axis])
            for i in range(count):
                turn = complex(
                    math.cos(a := positions[t][axis] * math.pow(bases[axis], -i / count)), math.sin(a)
                )
                p = before + i
                where = {"adjacent": (2 * p, 2 * p + 1), "half": (p, p + total)}
                dim_x, dim_y = where.get(layout, (2 * before + i, 2 * before + count + i))
                for h in range(x.shape[1]):
                    z = complex(x[t, h, dim_x], x[t, h, dim_y]) * turn
                    out[t, h, dim_x], out[t, h, dim_y] = z.real, z.imag
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_rotation_by_hand(layout):
    pairs, grid = (3, 0, 2), (2, 3, 2)
    rope = rope_of(pairs, layout)
    positions = [[11, 12], [0, 1, 2], [4, 9]]
    x = normal(1, 12, 2, 13)
    angles, axes = rope.table(positions, dtype=torch.float64)
    assert axes[0::3] == list(grid)
    token_positions = [[f, r, c] for f in positions[0] for r in positions[1] for c in positions[2]]
    expected = rotated_by_hand(x[0], pairs, rope.bases, layout, token_positions)
    for path in (ref.rope, rf.rope):
        torch.testing.assert_close(
            path(x, angles=angles, axes=axes, layout=layout)[0], expected, rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("norm", ["model", "head"])
def test_oracle_norm_is_torch_rms_norm(norm):
    x = normal(2, 5, 3, 8)
    weight = normal(24 if norm == "model" else 8, seed=1)
    if norm == "model":
        expected = torch.nn.functional.rms_norm(x.flatten(2), (24,), weight, 1e-3).view_as(x)
    else:
        expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-3)
    for path in (ref.rope, rf.rope):
        y = path(x, angles=None, axes=[], weight=weight, norm=norm, eps=1e-3)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


def test_slots_with_a_stride():
    """Every other entry of a longer plan, shared and per sample."""
    args, keywords = inputs(torch.float32)
    for slots in (torch.tensor([4, 0, 1, 2, 0, 3]), torch.tensor([[4, 0, 1, 2, 0, 3], [0, 0, 2, 1, 3, 4]])):
        slots = slots.to(torch.int32)[..., ::2]
        ours, plain = clones(args), clones(args)
        rf.rope_append(*ours, **keywords | {"slots": slots})
        rf.rope_append(*plain, **keywords | {"slots": slots.contiguous()})
        for a, b in zip(ours, plain, strict=True):
            assert_equal_bits(a, b)


def test_rows_of_angles_that_lie_apart_are_refused():
    args, keywords = inputs(torch.float32)
    apart = torch.stack((keywords["angles"], keywords["angles"]), 2).flatten(1, 2)[:, ::2]
    with pytest.raises(rf.ArgumentError, match=r"`angles`: expected contiguous rows"):
        rf.rope_append(*args, **keywords | {"angles": apart})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_temporal_dims_are_those_that_the_temporal_axis_turns(layout, axis):
    """By a quarter turn of every temporal pair: x becomes y, and y becomes -x, where `temporal_dims` says,
    and nowhere else."""
    rope = rf.RoPE(pairs=(3, 2, 4), bases=(1.0,) * 3, layout=layout, temporal_axis=axis)
    table, axes = rope.table([[0], [0], [0]], dtype=torch.float64)
    table[..., 0], table[..., 1] = 1.0, 0.0
    row, pairs = axes[3 * axis + 2], rope.temporal_pairs
    table[:, row : row + pairs] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.arange(1.0, 21.0, dtype=torch.float64).view(1, 1, 1, 20)
    expected, (x0, y0, step) = x.clone(), rope.temporal_dims
    for i in range(pairs):
        a, b = x0 + i * step, y0 + i * step
        expected[..., a], expected[..., b] = -x[..., b], x[..., a]
    assert torch.equal(rf.rope(x, angles=table, axes=axes, layout=layout), expected)


def test_a_temporal_axis_is_one_of_the_axes():
    for axis in (-1, 3):
        with pytest.raises(rf.ArgumentError, match="temporal_axis"):
            rf.RoPE(pairs=(3, 2, 4), bases=(1.0,) * 3, temporal_axis=axis)


def test_rotation_keeps_relative_positions():
    """Logits of rotated q and k depend on the difference of their frames alone: why a key need be rotated
    only once."""
    rope = rf.RoPE3D.wan(32)
    q, k = normal(1, 1, 1, 32, seed=1), normal(1, 1, 1, 32, seed=2)

    def logit(frame_q, frame_k):
        at = [rope.table([[f], [3], [4]], dtype=torch.float64) for f in (frame_q, frame_k)]
        return (
            (rf.rope(q, angles=at[0][0], axes=at[0][1]) * rf.rope(k, angles=at[1][0], axes=at[1][1]))
            .sum()
            .item()
        )

    assert logit(7, 2) == pytest.approx(logit(1005, 1000), abs=1e-12)
    assert abs(logit(7, 2) - logit(8, 2)) > 1e-3


# ---- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [0, 1, 1023, 10**6, 10**8])
def test_angles_are_exact_at_any_frame(frame):
    """float32 tables within 2^-24 of the real number, by 60-digit arithmetic; also through the op (x = (1, 0)
    reads them off)."""
    rope = rf.RoPE3D.wan(128)
    angles, axes = rope.table([[frame], [51], [0]], dtype=torch.float32)
    with mpmath.workdps(60):
        exact = []
        for axis, position in enumerate((frame, 51, 0)):
            count = rope.pairs[axis]
            for i in range(count):
                angle = position * mpmath.power(10000, -mpmath.mpf(i) / count)
                exact.append([mpmath.cos(angle), mpmath.sin(angle)])
        for found, expected in zip(angles[0].tolist(), exact, strict=True):
            assert max(abs(f - e) for f, e in zip(found, expected, strict=True)) <= mpmath.mpf(2) ** -24
    unit = torch.zeros(1, 1, 1, 128)
    unit[..., 0::2] = 1
    assert torch.equal(rf.rope(unit, angles=angles, axes=axes).view(64, 2), angles[0])


# ---- the op against the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_against_oracle(shape, layout, norm, dtype):
    compare(dtype, SHAPES[shape] | dict(layout=layout, norm=norm))


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_against_oracle_at_full_size(dtype):
    compare(dtype, dict(batch=1, grid=(3, 30, 52), heads=(12, 12), dim=128, pairs=(22, 21, 21)))


def float32_kinds():
    """Float32 of every kind: each upper half with lower halves at, just above and just below the ties of both
    half precisions."""
    lower = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64
    )
    bits = (torch.arange(1 << 16).unsqueeze(1) << 16) + lower
    return bits.to(torch.int32).view(-1).view(torch.float32)


def assert_rounded(actual, exact):
    """What PyTorch rounds ``exact`` to, bit for bit; NaN stays NaN, whatever its payload."""
    nan = exact.isnan()
    assert bool(actual[nan].isnan().all())
    assert_equal_bits(actual[~nan], exact[~nan].to(actual.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_float32_is_rounded_to_nearest_even(dtype):
    """A row of ones has norm 1, so the op rounds the weights alone: in vectors, and in tails of every length
    below one."""
    weight = float32_kinds()
    for dim in (weight.numel(), 4097, 7):
        heads = weight.numel() // dim
        row = weight[: heads * dim]
        ones = torch.ones(1, 1, heads, dim, dtype=dtype)
        out = rf.rope(ones, angles=None, axes=[], weight=row, norm="model", eps=0.0)
        assert_rounded(out.flatten(), row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_do_changes_no_bit(dtype):
    """Neither norm nor rotation: half precision goes through float32 and comes back, infinities and subnormal
    numbers included."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 1, -1, 1)
    x = x.view(torch.float16) if dtype == torch.float16 else x.to(dtype)
    for dim in (1, 8, 13, 64):
        rows = x.flatten()[: (1 << 16) // dim * dim].view(1, 1, -1, dim)
        out = rf.rope(rows, angles=None, axes=[], norm=None)
        assert_equal_bits(out.isnan(), rows.isnan())
        assert_equal_bits(out[~rows.isnan()], rows[~rows.isnan()])


def test_values_are_copied_bit_for_bit():
    for dtype in DTYPES:
        args, keywords = inputs(dtype)
        args[2] = random_bits(*args[2].shape, dtype=dtype, seed=5)
        rf.rope_append(*args, **keywords)
        n = args[0].shape[1] // 3
        for f, slot in enumerate(keywords["slots"].tolist()):
            assert_equal_bits(args[4][:, slot * n : (slot + 1) * n], args[2][:, f * n : (f + 1) * n])


def test_rope_is_the_q_of_rope_append():
    for dtype in DTYPES:
        args, keywords = inputs(dtype)
        shared = {name: keywords[name] for name in ("angles", "axes", "layout", "norm", "eps")}
        q = rf.rope(args[0], weight=keywords["q_weight"], **shared)
        assert_equal_bits(q, rf.rope_append(*args, **keywords))


def test_positions_and_slots_per_sample():
    rope = rope_of((6, 5, 5))
    args, keywords = inputs(torch.float32, batch=3)
    frames = [[2, 3, 4], [10, 11, 12], [0, 5, 9]]
    keywords["angles"], keywords["axes"] = rope.table([frames, range(2), range(4)], dtype=torch.float32)
    keywords["slots"] = torch.tensor([[0, 1, 2], [2, 4, 0], [3, 0, 1]], dtype=torch.int32)
    one_by_one = clones(args)
    q = rf.rope_append(*args, **keywords)
    for b in range(3):
        alone = [t[b : b + 1] for t in one_by_one]
        angles, axes = rope.table([frames[b], range(2), range(4)], dtype=torch.float32)
        assert_equal_bits(
            q[b : b + 1],
            rf.rope_append(*alone, **keywords | dict(slots=keywords["slots"][b], angles=angles, axes=axes)),
        )
    for a, b in zip(args[3:], one_by_one[3:], strict=True):
        assert_equal_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype):
    """q, k, v out of one projection, caches and heads inside of larger buffers, a transposed [B, H, N, D]:
    the same bits."""
    args, keywords = inputs(dtype, heads=(3, 3))
    plain = clones(args)
    expected = rf.rope_append(*plain, **keywords)
    fused = torch.cat(args[:3], dim=2)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[:3]]
    split = fused.split(3, dim=2)
    pools = [
        random_bits(t.shape[0], t.shape[1] + 3, step * t.shape[2], t.shape[3] + 5, dtype=dtype)
        for step, t in zip((2, 3), args[3:], strict=True)
    ]
    # Of one kind, and mixed: each tensor must be read and written by its own strides.
    for q, k, v in (
        split,
        transposed,
        (split[0], transposed[1], args[2]),
        (args[0], split[1], transposed[2]),
    ):
        caches = [p[:, 1:-2, ::step, 3:-2] for step, p in zip((2, 3), pools, strict=True)]
        for cache, old in zip(caches, args[3:], strict=True):
            cache.copy_(old)
        assert_equal_bits(rf.rope_append(q, k, v, *caches, **keywords), expected)
        for cache, other in zip(caches, plain[3:], strict=True):
            assert_equal_bits(cache, other)


def test_weights_in_float32_beside_half_precision_data():
    args, keywords = inputs(torch.bfloat16)
    wide = keywords | {name: keywords[name].float() for name in ("q_weight", "k_weight")}
    assert_equal_bits(rf.rope_append(*clones(args), **keywords), rf.rope_append(*clones(args), **wide))
    # No bf16 number: it must have been read as float32.
    fine = keywords | dict(q_weight=keywords["q_weight"].float() * (1 + 2**-7 * 0.9))
    assert not torch.equal(rf.rope_append(*clones(args), **keywords), rf.rope_append(*clones(args), **fine))


def test_each_tensor_is_normalised_only_with_its_weight():
    args, keywords = inputs(torch.float32)
    none = rf.rope_append(*clones(args), **keywords | dict(q_weight=None, k_weight=None))
    assert_equal_bits(rf.rope_append(*clones(args), **keywords | dict(q_weight=None)), none)
    assert not torch.equal(rf.rope_append(*clones(args), **keywords), none)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(dtype, threads):
    args, keywords = inputs(dtype, grid=(3, 16, 16), heads=(3, 3), dim=32)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        mine = clones(args)
        results.append((rf.rope_append(*mine, **keywords), *mine[3:]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal_bits(a, b)


@pytest.mark.parametrize(
    "empty", [dict(batch=0), dict(grid=(3, 0, 4)), dict(grid=(0, 2, 4)), dict(heads=(0, 0))], ids=str
)
def test_empty(empty):
    args, keywords = inputs(torch.float32, **empty)
    before = fingerprint(*args[3:])
    assert rf.rope_append(*args, **keywords).shape == args[0].shape
    assert fingerprint(*args[3:]) == before
    shared = {name: keywords[name] for name in ("angles", "axes")}
    assert rf.rope(args[0], **shared).shape == args[0].shape


def test_keys_without_queries():
    """Hq = 0 fills a cache with text or reference keys; Hkv = 0 only rotates queries."""
    args, keywords = inputs(torch.float32)
    full = clones(args)
    rf.rope_append(*full, **keywords)
    keys = clones(args)
    rf.rope_append(args[0][:, :, :0], *keys[1:], **keywords | dict(q_weight=None))
    assert_equal_bits(keys[3], full[3])
    none = [t[:, :, :0] for t in args[1:]]
    assert_equal_bits(
        rf.rope_append(args[0], *none, **keywords | dict(k_weight=None)),
        rf.rope_append(*clones(args), **keywords),
    )
