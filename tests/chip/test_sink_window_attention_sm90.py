"""The Hopper forward kernel on the functional model of the chip, against float64."""

import dataclasses

import numpy as np
import pytest
import torch

from chip import build
from chip.harness import (
    BIAS,
    DENSE,
    POLICIES,
    ROWS,
    WHOLE,
    Case,
    Inputs,
    check,
    make_inputs,
    oracle,
    rows_of,
    run,
)
from rf_kernels.testing import assert_equal_bits


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", DENSE)
def test_dense_prefix(name, policy):
    """Slots beyond the prefix hold NaN in every case."""
    check(make_inputs(DENSE[name]), policy=policy)


@pytest.mark.parametrize(
    "variant", ["bf16_128", "fp16_128", "bf16_64", "fp16_64", "bf16_64_polynomial", "fp16_64_polynomial"]
)
@pytest.mark.parametrize("sizes", [(200, 611), (193, 129), (64, 513)], ids=str)
def test_dtypes_and_head_dims(variant, sizes):
    check(make_inputs(Case(*sizes, heads=2, variant=variant)), policy="tma_late", seed=2)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_sequence(name):
    check(make_inputs(dataclasses.replace(WHOLE[name], num_sms=5)), policy="random", seed=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_whole_sequence_under_every_policy(policy):
    check(make_inputs(WHOLE["sink and window"]), policy=policy, seed=4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_their_own(name, policy):
    """What lies behind a row's end is NaN."""
    check(make_inputs(ROWS[name]), policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", BIAS)
def test_a_bias_of_keys(name, policy):
    """Some are -inf, and NaN lies behind a row's end."""
    check(make_inputs(BIAS[name]), policy=policy)


def test_a_bias_of_zero_changes_no_bit():
    inputs = make_inputs(DENSE["waves and a split rest"])
    case = dataclasses.replace(inputs.case, variant="bf16_128_rows")
    zeros = torch.zeros(case.batch, case.kv_tokens)
    for a, b in zip(
        run(inputs)[:2], run(dataclasses.replace(inputs, case=case, kv_bias=zeros))[:2], strict=True
    ):
        assert_equal_bits(a, b)


def test_a_query_whose_keys_are_all_hidden_is_the_empty_sum():
    inputs = make_inputs(BIAS["a bias at odd ends"])
    inputs.kv_bias[0] = float("-inf")
    out, lse, _ = run(inputs)
    assert not out[0].any() and (lse[0] == float("-inf")).all() and lse[1].isfinite().all()


@pytest.mark.parametrize("name", ["ends of all kinds", "grouped heads", "head_dim 64", *BIAS])
def test_a_deterministic_row_has_the_bits_of_the_row_alone(name):
    """In the plain kernel."""
    inputs = make_inputs(dataclasses.replace((ROWS | BIAS)[name], deterministic=True))
    out, lse, _ = run(inputs)
    for b, row in enumerate(rows_of(inputs)):
        if row.case.kv_tokens == 0:
            assert not out[b].any() and (lse[b] == float("-inf")).all()
            continue
        alone = run(row)
        assert_equal_bits(out[b : b + 1], alone[0])
        assert_equal_bits(lse[b : b + 1], alone[1])


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), 3e38])
def test_what_lies_behind_a_row_changes_no_bit(poison):
    clean = make_inputs(ROWS["an empty row between"])
    other = dataclasses.replace(clean, k=clean.k.clone(), v=clean.v.clone())
    for b, n in enumerate(clean.case.valid):
        other.k[b, n:], other.v[b, n:] = poison, poison
    for a, b in zip(run(clean)[:2], run(other)[:2], strict=True):
        assert_equal_bits(a, b)


def test_whole_sequence_of_one_chunk_is_dense():
    """The same bits: one chunk whose window is all keys."""
    dense = make_inputs(Case(300, 300, capacity=300))
    whole = dataclasses.replace(
        dense, case=dataclasses.replace(dense.case, chunk_ends=(300,), num_window_tokens=300)
    )
    for a, b in zip(run(dense)[:2], run(whole)[:2], strict=True):
        assert_equal_bits(a, b)


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), 3e38, float("nan")])
def test_slots_that_are_not_valid_change_no_bit(poison):
    clean = make_inputs(Case(100, 200, capacity=400))
    other = dataclasses.replace(clean, k=clean.k.clone(), v=clean.v.clone())
    for inputs, value in ((clean, 0.0), (other, poison)):
        inputs.k[:, 200:] = value
        inputs.v[:, 200:] = value
    for a, b in zip(run(clean)[:2], run(other)[:2], strict=True):
        assert_equal_bits(a, b)


@pytest.mark.parametrize("q_scale", [1e-3, 30.0, 300.0])
def test_logits_of_any_size(q_scale):
    """Softmax from uniform to one-hot: logits up to several thousand."""
    check(make_inputs(Case(100, 400, q_scale=q_scale)))


@pytest.mark.parametrize("variant", ["bf16_128", "fp16_64"])
@pytest.mark.parametrize("rise", [7.9, 8.1, 16.0, 100.0])
def test_a_maximum_that_rises_by(rise, variant):
    """Each tile's largest score is `rise` (base 2) above the last one's: below 8 a row keeps its reference,
    and weights reach 2^8; a second such rise moves it."""
    inputs = make_inputs(Case(64, 704, num_sms=1, variant=variant))
    dim = inputs.case.head_dim
    inputs.q[:], inputs.k[:, :704] = 0.0, 0.0
    inputs.q[..., 0] = 1.0
    step = rise / (inputs.softmax_scale * 1.4426950408889634)
    for tile, row in enumerate(range(650, -1, -100)):
        inputs.k[:, row, :, 0] = tile * step
    inputs.k[:, :704, :, 1 : dim // 2] = torch.randn(
        1, 704, 1, dim // 2 - 1, generator=torch.Generator().manual_seed(1)
    )
    inputs.q[:, ::2, :, 1] = 0.25
    check(inputs)


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours():
    """The warp votes on rescaling, each row decides for itself: rows 3, 20, 40 amid rows that rescale, and
    amid rows that do not."""
    calm = make_inputs(Case(64, 900, num_sms=1))
    wild = dataclasses.replace(calm, q=calm.q * 40)
    rows = [3, 20, 40]
    wild.q[:, rows] = calm.q[:, rows]
    for a, b in zip(run(calm)[:2], run(wild)[:2], strict=True):
        if a.dim() == 3:
            a, b = a.transpose(1, 2), b.transpose(1, 2)
        assert_equal_bits(a[:, rows], b[:, rows])
        assert not torch.equal(a, b)


def test_exponentials_by_polynomial():
    """Rounded to bfloat16 they err by no more than the special function unit's, which are exact within 2 ulp
    of float32."""
    x = np.r_[np.linspace(-30, 8, 2_000_001), np.linspace(-126, -30, 200_001)].astype(np.float32)
    exact = torch.from_numpy(np.exp2(x.astype(np.float64)))

    def error(values):
        rounded = torch.from_numpy(values.astype(np.float32)).bfloat16().double()
        return float((rounded / exact - 1).abs().max())

    polynomial = build.load().exp2_polynomial(x)
    assert error(polynomial) <= error(exact.numpy() * (1 + 2.0**-22))
    assert float((torch.from_numpy(polynomial).double() / exact - 1).abs().max()) < 2.9e-4
    edges = build.load().exp2_polynomial(np.float32([-np.inf, -1e30, -127, 0, 1, 8, np.nan]))
    assert edges[:-1].tolist() == [0, 0, 0, 1, 2, 256] and np.isnan(edges[-1])


def test_a_score_that_is_nan_stays_nan_whoever_computes_its_exponential():
    """Key 0 is in a block of the polynomial, key 8 in one of the special function unit."""
    for key in (0, 8):
        inputs = make_inputs(Case(70, 300, num_sms=1, variant="bf16_64_polynomial"))
        inputs.k[:, key, :, 0] = float("nan")
        out, lse, _ = run(inputs)
        assert out.isnan().all() and lse.isnan().all()


def test_large_values_and_identical_keys():
    inputs = make_inputs(Case(100, 400))
    inputs.k[:, :400] = inputs.k[:, :1]  # uniform weights: the mean of V
    inputs.v[:, 0] = 1e30
    inputs.v[:, 1] = -1e30
    out, lse, _ = run(inputs)
    expected, expected_lse = oracle(inputs)
    scale = 1e30 / 400
    assert float((out.double() - expected).abs().max()) <= scale * 2**-7
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_scores_of_minus_infinity():
    """A key tile whose scores are all -inf has no weight, whether it comes first or not; a row of them is
    the empty sum."""
    inputs = make_inputs(Case(10, 400, num_sms=1))
    inputs.q[:] = inputs.q.abs() + 0.5
    for rows in (slice(0, 176), slice(176, 352), slice(352, 400)):
        k = inputs.k.clone()
        k[:, rows] = float("-inf")
        check(dataclasses.replace(inputs, k=k))
    inputs.k[:, :400] = float("-inf")
    out, lse, _ = run(inputs)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_strides_as_they_come():
    """Views of one packed projection; heads in another order than memory."""
    packed = torch.randn(2, 300, 3, 4, 128, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    q, k, v = packed.unbind(2)
    case = Case(300, 300, batch=2, heads=4, capacity=300, num_sms=5)
    check(Inputs(case, q, k, v, 128**-0.5))
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    check(Inputs(case, *by_head, 128**-0.5))


@pytest.mark.parametrize(
    "case", [DENSE["every CTA splits"], DENSE["a tile over many CTAs"], WHOLE["unequal chunks"]], ids=str
)
def test_launches_are_bitwise_equal(case):
    """Whatever lands when: the schedule fixes the order of every sum."""
    inputs = make_inputs(case)
    first = run(inputs, policy="random", seed=0)
    for seed, policy in enumerate(POLICIES, 1):
        again = run(
            dataclasses.replace(inputs, case=dataclasses.replace(case, resident=seed)),
            policy=policy,
            seed=seed,
        )
        assert_equal_bits(first[0], again[0])
        assert_equal_bits(first[1], again[1])


def test_only_calls_that_cut_tiles_have_a_workspace():
    """A launch zeroes ticket and flags alone, and nothing where no tile is cut: then no CTA takes a ticket
    either."""
    cut = Case(200, 611, heads=2)
    *_, stats = run(make_inputs(cut))
    assert stats["zeroed"] == 128 + 128 and stats["workspace"] == stats["zeroed"] + 3 * 8 * 4 * 32 * (64 + 4)
    for whole in (
        dataclasses.replace(cut, deterministic=True),
        Case(128 * 3, 611),
        Case(65, 200, num_sms=16),
    ):
        out, lse, stats = run(make_inputs(whole))
        assert stats["workspace"] == stats["zeroed"] == 0
        assert not out.isnan().any() and not lse.isnan().any()


def test_deterministic_mode_depends_on_the_keys_alone():
    """A sample gives the same bits on 1, 3 and 16 CTAs, alone and in a batch, as the only head and among
    others."""
    case = Case(130, 611, batch=2, heads=2, capacity=648, deterministic=True, num_sms=3)
    inputs = make_inputs(case)
    expected = run(inputs)
    for sms in (1, 16):
        out = run(
            Inputs(dataclasses.replace(case, num_sms=sms), inputs.q, inputs.k, inputs.v, inputs.softmax_scale)
        )
        assert_equal_bits(expected[0], out[0])
        assert_equal_bits(expected[1], out[1])
    one = dataclasses.replace(case, batch=1, heads=1)
    for b in range(2):
        for h in range(2):
            pick = (slice(b, b + 1), slice(None), slice(h, h + 1))
            out = run(Inputs(one, inputs.q[pick], inputs.k[pick], inputs.v[pick], inputs.softmax_scale))
            assert_equal_bits(expected[0][pick], out[0])


def test_every_element_is_written_once():
    """The model reports two unordered writers; the count shows that nothing else was written."""
    case = Case(300, 500, batch=2, heads=2, deterministic=True)
    *_, stats = run(make_inputs(case))
    assert stats["global_written"] == 2 * 300 * 2 * (128 * 2 + 4)


REFUSED = {
    "scale": (dict(softmax_scale=0.0), "softmax_scale"),
    "negative scale": (dict(softmax_scale=-1.0), "softmax_scale"),
    "stride": (
        dict(k=torch.zeros(1, 400, 1, 132, dtype=torch.bfloat16)[..., :128]),
        "multiples of 8 elements",
    ),
    "alignment": (dict(q=torch.zeros(1, 100, 1, 136, dtype=torch.bfloat16)[..., 4:132]), "16-byte aligned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_take_is_refused_with_a_reason(name):
    change, reason = REFUSED[name]
    inputs = dataclasses.replace(make_inputs(Case(100, 400)), **change)
    with pytest.raises(ValueError, match=reason):
        run(inputs)


def test_a_real_cache_at_one_head():
    """The keys of nine frames of 1,560 tokens, a few queries of the last."""
    check(make_inputs(Case(130, 14040, capacity=14040, num_sms=7)), policy="tma_late")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case",
    [
        Case(1560, 14040, capacity=14040, num_sms=17),
        Case(300, 6240, capacity=14040, num_sms=7),
        Case(1560, 704, heads=12, num_sms=132),
        Case(1560, 1409, heads=3, num_sms=132, resident=40),
        Case(1560, 1409, heads=3, num_sms=132, variant="bf16_64"),
        Case(
            2340,
            2340,
            chunk_ends=tuple(range(390, 2341, 390)),
            num_sink_tokens=390,
            num_window_tokens=780,
            heads=2,
            num_sms=132,
        ),
    ],
    ids=str,
)
def test_real_sizes(case):
    """A real frame of queries, a ring that is half full, and the grid of an H100."""
    check(make_inputs(case), policy="random")


@pytest.fixture(scope="module", autouse=True)
def built():
    build.load()
