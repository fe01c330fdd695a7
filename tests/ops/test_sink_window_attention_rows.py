"""Rows of their own: sink_window_attention with a number of valid keys for each sample of the batch."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

import rf_kernels as rf
from helpers.attention_case import INF, make, run_with_grads, sdpa
from helpers.refusals import refused
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager, fingerprint, max_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# B, Nq, T, Hq, Hkv, D and the rows: none, one, some, all; odd sizes; rows that MKL would not read in place
CASES = {
    "every kind": ((4, 19, 40, 4, 2, 32), (0, 1, 23, 40)),
    "odd": ((3, 37, 61, 3, 3, 13), (53, 7, 61)),
    "one row": ((1, 33, 70, 2, 1, 64), (45,)),
    "one query": ((3, 1, 600, 2, 2, 128), (513, 0, 77)),
}
NAMES = pytest.mark.parametrize("name", CASES)


def rows(*tokens):
    return torch.tensor(tokens, dtype=torch.int32)


def case_of(name, dtype, seed=0):
    shape, own = CASES[name]
    inputs = make(dtype, *shape, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    return inputs, rows(*own), torch.randn(inputs[0].shape, generator=g, dtype=torch.float64).to(dtype)


def run(inputs, own, grad_out, **options):
    """Output, LSE and the three gradients of the op."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = rf.sink_window_attention(*leaves, kv_tokens=own, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)]


def eager(q, k, v, *, kv_tokens):
    """Masked SDPA; a row without keys sees a key of zeros, which is no row of PyTorch's."""
    mask = torch.arange(k.shape[1]) < kv_tokens[:, None]
    none = (kv_tokens == 0)[:, None, None, None]
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    seen = (mask | none[:, :, 0, 0])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v.masked_fill(none, 0.0), attn_mask=seen).transpose(1, 2)


@NAMES
def test_oracle_is_masked_sdpa(name):
    inputs, own, _ = case_of(name, torch.float64)
    out, lse = oracle(*inputs, kv_tokens=own, return_lse=True)
    assert max_error(out, eager(*inputs, kv_tokens=own)) < 1e-14
    for b, n in enumerate(own.tolist()):
        one = [t[b : b + 1] for t in inputs]
        assert_equal_bits(lse[b : b + 1], oracle(*one, kv_tokens=n, return_lse=True)[1])
        if n:
            assert max_error(out[b : b + 1], sdpa(*one, kv_tokens=n)) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_values_and_gradients_within_eager(name, dtype):
    inputs, own, grad_out = case_of(name, dtype)
    found = run(inputs, own, grad_out)
    exact = run_with_grads(oracle, [t.double() for t in inputs], {"kv_tokens": own}, grad_out)
    theirs = run_with_grads(eager, inputs, {"kv_tokens": own}, grad_out)
    out, lse, *grads = found
    ulps = 16 if dtype == torch.float64 else 2  # sums of float64 in another order than eager's
    for ours, truth, other in zip((out, *grads), exact, theirs, strict=True):
        assert_within_eager(ours, truth, other, ulps=ulps)
    _, exact_lse = oracle(*(t.double() for t in inputs), kv_tokens=own, return_lse=True)
    _, eager_lse = oracle(*inputs, kv_tokens=own, return_lse=True)
    assert_within_eager(lse, exact_lse, eager_lse.to(lse.dtype), ulps=ulps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_a_row_has_the_bits_of_the_row_alone(name, dtype, threads):
    """Whatever the others are, and at every number of threads."""
    inputs, own, grad_out = case_of(name, dtype)
    for n in (1, 3):
        threads(n)
        together = run(inputs, own, grad_out)
        for b, tokens in enumerate(own.tolist()):
            one = [t[b : b + 1] for t in (*inputs, grad_out)]
            for a, alone in zip(together, run(one[:3], tokens, one[3]), strict=True):
                assert_equal_bits(a[b : b + 1], alone)


@pytest.mark.parametrize("poison", [float("nan"), -INF, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_what_lies_behind_a_row_changes_no_bit(name, dtype, poison):
    inputs, own, grad_out = case_of(name, dtype)
    clean = run(inputs, own, grad_out)
    poisoned = [inputs[0], inputs[1].clone(), inputs[2].clone()]
    for b, n in enumerate(own.tolist()):
        poisoned[1][b, n:], poisoned[2][b, n:] = poison, poison
        assert not clean[3][b, n:].any() and not clean[4][b, n:].any()
    for a, b in zip(run(poisoned, own, grad_out), clean, strict=True):
        assert_equal_bits(a, b)


def test_a_row_without_keys_is_the_empty_sum():
    inputs, own, grad_out = case_of("every kind", torch.float32)
    out, lse, *grads = run(inputs, own, grad_out)
    assert not out[0].any() and (lse[0] == -INF).all()
    assert not any(g[0].any() for g in grads) and all(g[1:].any() for g in grads)


@pytest.mark.parametrize("shape", [(0, 3, 7, 2, 2, 8), (2, 0, 7, 2, 2, 8), (2, 3, 0, 2, 1, 8)])
def test_empty(shape):
    q, k, v = make(torch.float32, *shape)
    own = torch.zeros(shape[0], dtype=torch.int32)
    out, lse, *grads = run((q, k, v), own, torch.zeros_like(q))
    assert out.shape == q.shape and not out.any() and lse.shape == (shape[0], shape[3], shape[1])
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)


def test_strided_lengths():
    inputs, own, grad_out = case_of("odd", torch.float32)
    strided = torch.stack([own, own + 1], 1)[:, 0]
    for a, b in zip(run(inputs, strided, grad_out), run(inputs, own, grad_out), strict=True):
        assert_equal_bits(a, b)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in make(torch.float64, 3, 2, 5, 2, 1, 3)]
    assert torch.autograd.gradcheck(
        lambda *x: rf.sink_window_attention(*x, kv_tokens=rows(3, 0, 5), softmax_scale=0.7), leaves
    )


def test_lengths_written_between_forward_and_backward_are_noticed():
    inputs, own, _ = case_of("odd", torch.float32)
    out = rf.sink_window_attention(inputs[0].requires_grad_(), *inputs[1:], kv_tokens=own)
    own += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_opcheck():
    inputs, own, grad_out = case_of("every kind", torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    options = (None, 0.3, None, 0, None)
    torch.library.opcheck(torch.ops.rf_kernels.sink_window_attention.default, (*leaves, *options, False, own))
    out, lse = rf.sink_window_attention(*inputs, kv_tokens=own, softmax_scale=0.3, return_lse=True)
    saved = [t.detach() for t in (grad_out, *inputs, out, lse)]
    backward = torch.ops.rf_kernels.sink_window_attention_backward.default
    torch.library.opcheck(backward, (*saved, *options, own))


def test_compiled_once_for_all_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, n: rf.sink_window_attention(q, k, v, kv_tokens=n) * 2, fullgraph=True, backend=counter
    )
    inputs, _, grad_out = case_of("odd", torch.float32)
    for own in (rows(53, 7, 61), rows(0, 61, 2), rows(1, 1, 1)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = compiled(*leaves, own)
        expected, _, *grads = run(inputs, own, 2 * grad_out)
        assert_equal_bits(out, 2 * expected)
        for a, b in zip(torch.autograd.grad(out, leaves, grad_out), grads, strict=True):
            assert_equal_bits(a, b)
    assert counter.frame_count == 1


WRONG = {
    "negative": rows(3, -1),
    "beyond": rows(10, 3),
    "int64": torch.tensor([3, 4]),
    "float": torch.tensor([3.0, 4.0]),
    "bool": torch.tensor([True, False]),
    "too few": rows(3),
    "too many": rows(3, 4, 5),
    "two dimensions": rows(3, 4)[:, None],
    "elsewhere": torch.empty(2, dtype=torch.int32, device="meta"),
    "a list": [3, 4],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lengths_are_refused(name):
    tensors = make(torch.float32, 2, 6, 9, 4, 2, 8)
    before = fingerprint(*tensors)
    refused(lambda: rf.sink_window_attention(*tensors, kv_tokens=WRONG[name]), "kv_tokens")
    assert fingerprint(*tensors) == before


def test_whole_sequences_have_no_rows_of_their_own():
    q, k, v = make(torch.float32, 2, 6, 6, 2, 2, 8)
    refused(lambda: rf.sink_window_attention(q, k, v, kv_tokens=rows(6, 6), chunk_ends=[6]), "kv_tokens")
    ours = torch.ops.rf_kernels.sink_window_attention.default
    with pytest.raises(RuntimeError, match="argument `kv_tokens`: expected .+, found two of them"):
        ours(q, k, v, 6, 0.3, None, 0, None, False, rows(6, 6))
