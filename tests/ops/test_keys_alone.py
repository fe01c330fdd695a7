"""rope_append and ema_evict without values: where keys and values are one latent, there are keys alone."""

import pytest
import torch

import rf_kernels as rf
from helpers.ema_evict_case import DTYPES, HALF, LAYOUTS, STATES, Case, equal, op_arguments
from helpers.refusals import refused
from helpers.rope_append_case import LAYOUTS as ORDERS
from helpers.rope_append_case import SHAPES, clones, inputs
from rf_kernels.reference.ema_evict import ema_evict as evict_oracle
from rf_kernels.reference.rope_append import rope_append as append_oracle
from rf_kernels.testing import assert_equal_bits

LATENT = dict(batch=1, grid=(2, 3, 2), heads=(12, 1), dim=224, pairs=(6, 5, 5))
PRECISIONS = [(d, s) for d in DTYPES for s in (STATES if d in HALF else STATES[-1:])]
every_precision = pytest.mark.parametrize("dtype, state", PRECISIONS, ids=str)


@pytest.mark.parametrize("function", [append_oracle, rf.rope_append], ids=["oracle", "op"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("shape", [LATENT, *SHAPES.values()], ids=["latent", *SHAPES])
def test_append(shape, layout, dtype, function):
    """Queries and keys have the bits that they have beside values."""
    args, keywords = inputs(dtype, **shape, layout=layout)
    both = clones(args)
    expected = function(*both, **keywords)
    q, k, _, k_cache, _ = args
    assert_equal_bits(function(q, k, None, k_cache, None, **keywords), expected)
    assert_equal_bits(k_cache, both[3])


@pytest.mark.parametrize("missing", ["v", "v_cache"])
def test_append_takes_both_or_none(missing):
    (q, k, v, k_cache, v_cache), keywords = inputs(torch.float32)
    values = {"v": v, "v_cache": v_cache} | {missing: None}
    before = k_cache.clone()
    refused(lambda: rf.rope_append(q, k, values["v"], k_cache, values["v_cache"], **keywords), missing)
    assert_equal_bits(k_cache, before)


@pytest.mark.parametrize("function", [evict_oracle, rf.ema_evict], ids=["oracle", "op"])
@every_precision
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evict(layout, dtype, state, function):
    """Several sources, one, none, init; keys have the bits that they have beside values."""
    schedule = [[[0, 3, 3, 6, 4], [1, 2, 5, 7, 0]], [[1, 0, 0, 0, 0], [0, 1, 4, 0, 0]]]
    case = Case(dtype, state, rope=LAYOUTS[layout], schedule=schedule, window=6, n=3)
    k, _, k_state, k_lo, _, _ = case.run(function)
    case.v = case.v_state = None
    found = case.run(function)
    equal(found[:5], (k, None, k_state, k_lo, None))
    assert not torch.equal(found[0], case.k)


@pytest.mark.parametrize("function", [evict_oracle, rf.ema_evict], ids=["oracle", "op"])
def test_evict_skips_keys_that_are_not_finite(function):
    case = Case(torch.bfloat16, "compensated")
    case.v = case.v_state = None
    clean = case.run(function)
    case.k[1, 3 * 5 + 2, 0, 7] = float("nan")  # a token of the frame in slot 3, in sample 1
    found = case.run(function)
    assert int(found[5]) == 1 and int(clean[5]) == 0
    other = torch.ones(case.k.shape[:2], dtype=torch.bool)
    other[1, [2, 3 * 5 + 2]] = False
    assert_equal_bits(found[0][other], clean[0][other])
    assert not torch.equal(found[2][1, 2], clean[2][1, 2]) and bool(found[2].isfinite().all())


@every_precision
def test_evict_refuses_a_state_of_values_that_are_not_there(dtype, state):
    case = Case(dtype, state)
    case.v, case.v_state = None, torch.zeros_like(case.k_state)
    refused(case.run, "v_state")


def test_opcheck():
    (q, k, _, k_cache, _), keywords = inputs(torch.float32)
    o = keywords | {"layout": 0, "norm": 1}
    names = ("slots", "angles", "axes", "layout", "q_weight", "k_weight", "norm", "eps")
    ours = torch.ops.rf_kernels.rope_append.default
    torch.library.opcheck(ours, (q, k, None, k_cache, None, *(o[name] for name in names)))
    case = Case(torch.bfloat16, "compensated")
    case.v = case.v_state = None
    torch.library.opcheck(torch.ops.rf_kernels.ema_evict.default, op_arguments(case))


def test_compiled():
    args, keywords = inputs(torch.float32)
    q, k, _, k_cache, _ = args
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, cache: rf.rope_append(q, k, None, cache, None, **keywords) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    cache = k_cache.clone()
    found = compiled(q, k, cache)
    assert_equal_bits(found, 2 * rf.rope_append(q, k, None, k_cache, None, **keywords))
    assert_equal_bits(cache, k_cache)
