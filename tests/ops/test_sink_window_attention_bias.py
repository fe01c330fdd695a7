"""A bias of keys: sink_window_attention with a float32 added to the logits of each key."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import rf_kernels as rf
from helpers.attention_case import INF, make, run_with_grads
from helpers.refusals import refused
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager, fingerprint, max_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# B, Nq, T, Hq, Hkv, D; kv_tokens; whether each sample has a bias of its own
CASES = {
    "one bias for all": ((2, 19, 40, 4, 2, 32), 33, False),
    "a bias each": ((3, 37, 61, 3, 3, 13), 61, True),
    "rows of their own": ((4, 11, 70, 4, 1, 64), (70, 0, 1, 45), True),
    "one query": ((2, 1, 90, 2, 2, 128), 77, False),
}
NAMES = pytest.mark.parametrize("name", CASES)


def case_of(name, dtype):
    """Inputs, options and a gradient. Some keys are hidden, and behind what is seen the bias is NaN."""
    shape, tokens, own = CASES[name]
    inputs = make(dtype, *shape)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[0], shape[2], generator=g)
    bias[:, 5::7] = -INF
    for b, n in enumerate(tokens if isinstance(tokens, tuple) else shape[0] * (tokens,)):
        bias[b, n:] = float("nan")
    if isinstance(tokens, tuple):
        tokens = torch.tensor(tokens, dtype=torch.int32)
    grad_out = torch.randn(inputs[0].shape, generator=g, dtype=torch.float64).to(dtype)
    return inputs, {"kv_tokens": tokens, "kv_bias": bias if own else bias[0]}, grad_out


def run(inputs, options, grad_out):
    """Output, LSE and the three gradients of the op."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = rf.sink_window_attention(*leaves, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)]


def eager(q, k, v, *, kv_tokens, kv_bias):
    """SDPA with a mask of the dtype of q, as a user writes it."""
    lengths = torch.as_tensor(kv_tokens).expand(len(q))
    seen = torch.arange(k.shape[1]) < lengths[:, None]
    mask = torch.where(seen, kv_bias, -INF).to(q.dtype).masked_fill((lengths == 0)[:, None], 0.0)
    none = (lengths == 0)[:, None, None, None]
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    v = v.masked_fill(none, 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)


@NAMES
def test_oracle_is_masked_sdpa(name):
    inputs, options, _ = case_of(name, torch.float64)
    assert max_error(oracle(*inputs, **options), eager(*inputs, **options)) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_values_and_gradients_within_eager(name, dtype):
    inputs, options, grad_out = case_of(name, dtype)
    out, lse, *grads = run(inputs, options, grad_out)
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    theirs = run_with_grads(eager, inputs, options, grad_out)
    # Sums in another order than eager's, and the exponential of PyTorch's kernel for float32.
    ulps = {torch.float64: 16, torch.float32: 8}.get(dtype, 2)
    for ours, truth, other in zip((out, *grads), exact, theirs, strict=True):
        assert_within_eager(ours, truth, other, ulps=ulps)
    _, exact_lse = oracle(*(t.double() for t in inputs), **options, return_lse=True)
    _, eager_lse = oracle(*inputs, **options, return_lse=True)
    assert_within_eager(lse, exact_lse, eager_lse.to(lse.dtype), ulps=ulps)


def test_the_logarithm_of_a_count_stands_for_so_many_equal_keys():
    """What TempCache does with duplicates."""
    q, k, v = make(torch.float64, 1, 5, 9, 2, 2, 8)
    times = torch.tensor([1, 3, 1, 2, 1, 1, 4, 1, 1])
    merged = rf.sink_window_attention(q, k, v, kv_tokens=9, kv_bias=times.float().log())
    k, v = (t.repeat_interleave(times, 1) for t in (k, v))
    assert max_error(merged, rf.sink_window_attention(q, k, v, kv_tokens=15)) < 1e-7  # log() is of float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_a_row_has_the_bits_of_the_row_alone(name, dtype, threads):
    inputs, options, grad_out = case_of(name, dtype)
    tokens = torch.as_tensor(options["kv_tokens"]).expand(len(inputs[0])).tolist()
    for n in (1, 3):
        threads(n)
        together = run(inputs, options, grad_out)
        for b, valid in enumerate(tokens):
            bias = options["kv_bias"].expand(len(tokens), -1)[b]
            one = [t[b : b + 1] for t in (*inputs, grad_out)]
            alone = run(one[:3], {"kv_tokens": valid, "kv_bias": bias}, one[3])
            for a, c in zip(together, alone, strict=True):
                assert_equal_bits(a[b : b + 1], c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_whose_keys_are_all_hidden_is_the_empty_sum(dtype):
    inputs, options, grad_out = case_of("a bias each", dtype)
    options["kv_bias"][1] = -INF
    out, lse, *grads = run(inputs, options, grad_out)
    assert not out[1].any() and (lse[1] == -INF).all() and not any(g[1].any() for g in grads)
    assert all(t.isfinite().all() and t[0].any() for t in (out, *grads))
    assert max_error(oracle(*(t.double() for t in inputs), **options)[1], out[1].double()) == 0


def test_a_transposed_bias():
    inputs, options, grad_out = case_of("a bias each", torch.float32)
    strided = options | {"kv_bias": options["kv_bias"].T.contiguous().T}
    for a, b in zip(run(inputs, strided, grad_out), run(inputs, options, grad_out), strict=True):
        assert_equal_bits(a, b)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in make(torch.float64, 2, 2, 5, 2, 1, 3)]
    bias = torch.tensor([[0.5, -1.0, -INF, 2.0, 0.0], [1.0, 1.0, 1.0, -3.0, 0.25]])
    assert torch.autograd.gradcheck(
        lambda *x: rf.sink_window_attention(*x, kv_tokens=4, kv_bias=bias, softmax_scale=0.7), leaves
    )


def test_opcheck():
    inputs, options, grad_out = case_of("one bias for all", torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    plain, bias = (options["kv_tokens"], 0.3, None, 0, None), options["kv_bias"]
    ours = torch.ops.rf_kernels.sink_window_attention.default
    torch.library.opcheck(ours, (*leaves, *plain, False, None, bias))
    out, lse = rf.sink_window_attention(*inputs, **options, softmax_scale=0.3, return_lse=True)
    saved = [t.detach() for t in (grad_out, *inputs, out, lse)]
    backward = torch.ops.rf_kernels.sink_window_attention_backward.default
    torch.library.opcheck(backward, (*saved, *plain, None, bias))


def test_compiled_once_for_all_values():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, n, b: rf.sink_window_attention(q, k, v, kv_tokens=n, kv_bias=b),
        fullgraph=True,
        backend=counter,
    )
    inputs, options, _ = case_of("rows of their own", torch.float32)
    for factor in (1.0, 0.5):
        bias = options["kv_bias"] + math.log(factor)
        expected = rf.sink_window_attention(*inputs, kv_tokens=options["kv_tokens"], kv_bias=bias)
        assert_equal_bits(compiled(*inputs, options["kv_tokens"], bias), expected)
    assert counter.frame_count == 1


WRONG = {
    "float64": torch.zeros(9, dtype=torch.float64),
    "bfloat16": torch.zeros(9, dtype=torch.bfloat16),
    "too short": torch.zeros(7),
    "another batch": torch.zeros(3, 9),
    "one row": torch.zeros(1, 9),
    "of heads": torch.zeros(2, 4, 9),
    "no dimension": torch.zeros(()),
    "elsewhere": torch.zeros(9, device="meta"),
    "with a gradient": torch.zeros(9, requires_grad=True),
    "a list": 9 * [0.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bias_is_refused(name):
    tensors = make(torch.float32, 2, 6, 9, 4, 2, 8)
    before = fingerprint(*tensors)
    refused(lambda: rf.sink_window_attention(*tensors, kv_tokens=7, kv_bias=WRONG[name]), "kv_bias")
    assert fingerprint(*tensors) == before


def test_whole_sequences_have_no_bias():
    q, k, v = make(torch.float32, 2, 6, 6, 2, 2, 8)
    refused(lambda: rf.sink_window_attention(q, k, v, chunk_ends=[6], kv_bias=torch.zeros(6)), "kv_bias")
