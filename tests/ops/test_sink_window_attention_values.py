"""Values of fewer columns than the keys: a tensor of their own, or columns of the keys themselves, as where
one latent is both (VideoMLA, arXiv 2605.30351)."""

import pytest
import torch
import torch._dynamo.testing
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import rf_kernels as rf
from helpers.attention_case import INF, make, run_with_grads, sdpa
from helpers.refusals import refused
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager, max_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS = torch.tensor([0, 1, 23, 40], dtype=torch.int32)
# B, Nq, T, Hq, Hkv, D; columns that are values; options. One latent for all heads, odd sizes, one column,
# all but one, heads of their own, every option.
CASES = {
    "latent": ((2, 19, 70, 12, 1, 224), (32, 224), {"kv_tokens": 53}),
    "first columns": ((1, 37, 61, 3, 3, 13), (0, 5), {"kv_tokens": 61}),
    "one column": ((2, 9, 40, 4, 2, 16), (15, 16), {"kv_tokens": 33}),
    "all but one": ((1, 1, 90, 2, 2, 64), (1, 64), {"kv_tokens": 77}),
    "rows of their own": ((4, 11, 40, 4, 1, 24), (8, 24), {"kv_tokens": ROWS}),
    "bias": ((2, 11, 40, 4, 2, 24), (3, 20), {"kv_tokens": 40, "kv_bias": torch.linspace(-2, 2, 40)}),
    "whole sequence": (
        (2, 60, 60, 4, 1, 48),
        (16, 48),
        {"chunk_ends": [7, 20, 33, 34, 60], "num_sink_tokens": 9, "num_window_tokens": 15},
    ),
    "nothing visible": ((1, 5, 7, 2, 1, 12), (4, 12), {"kv_tokens": 0}),
}
NAMES = pytest.mark.parametrize("name", CASES)
WAYS = pytest.mark.parametrize("way", ["columns", "apart"])


def case_of(name, dtype):
    """q, k, the values as columns of k, the options and a gradient."""
    shape, (begin, end), options = CASES[name]
    q, k, _ = make(dtype, *shape)
    g = torch.Generator().manual_seed(1)
    grad_out = torch.randn(*q.shape[:3], end - begin, generator=g, dtype=torch.float64).to(dtype)
    return q, k, k[..., begin:end], options, grad_out


def wide(name, q, k):
    """The same call with values as wide as the keys, and the columns that count."""
    _, (begin, end), options = CASES[name]
    return rf.sink_window_attention(q, k, k.clone(), **options)[..., begin:end]


def eager(q, k, v, **options):
    if "kv_bias" in options or isinstance(options.get("kv_tokens"), torch.Tensor):
        return oracle(q, k, v, **options)  # einsum and softmax of the dtype
    return sdpa(q, k, v, **options) if options.get("kv_tokens") != 0 else oracle(q, k, v, **options)


@NAMES
def test_oracle_takes_values_of_their_own_width(name):
    q, k, v, options, _ = case_of(name, torch.float64)
    assert max_error(oracle(q, k, v, **options), eager(q, k, v, **options)) < 1e-14


@WAYS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing visible"])
def test_values_and_gradients_within_eager(name, dtype, way):
    """Three gradients, those of v being its own, wherever its memory is."""
    q, k, v, options, grad_out = case_of(name, dtype)
    if way == "apart":
        v = v.clone()
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = rf.sink_window_attention(*leaves, **options, return_lse=True)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    assert all(t.is_contiguous() for t in found) and found[3].shape == v.shape
    exact = run_with_grads(oracle, [t.double() for t in (q, k, v)], options, grad_out)
    theirs = run_with_grads(eager, (q, k, v), options, grad_out)
    ulps = {torch.float64: 16, torch.float32: 8}.get(dtype, 2)  # sums in another order than eager's
    for ours, truth, other in zip(found, exact, theirs, strict=True):
        assert_within_eager(ours, truth, other, ulps=ulps)
    _, exact_lse = oracle(*(t.double() for t in (q, k, v)), **options, return_lse=True)
    _, eager_lse = oracle(q, k, v, **options, return_lse=True)
    assert_within_eager(lse, exact_lse, eager_lse.to(lse.dtype), ulps=ulps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@NAMES
def test_columns_of_the_keys_have_the_bits_of_a_copy(name, dtype):
    q, k, v, options, _ = case_of(name, dtype)
    out = rf.sink_window_attention(q, k, v, **options)
    assert_equal_bits(out, wide(name, q, k).contiguous())
    assert out.is_contiguous() and out.shape == (*q.shape[:3], v.shape[3])


def test_columns_of_the_keys_are_not_copied():
    """In a layer of a cache, one latent for all heads; of a copy elsewhere, and of other rows of k, v is."""
    _, k, _ = make(torch.float32, 2, 8, 96, 4, 1, 224)
    q = torch.randn(2, 64, 4, 224)
    buffer = torch.full((2, 3, 96, 1, 224), float("nan"))
    buffer[:, 1] = k
    k = buffer[:, 1]

    def padded(v):
        with profile(record_shapes=True) as log:
            out = rf.sink_window_attention(q, k, v, kv_tokens=80)
        assert_equal_bits(out, rf.sink_window_attention(q, k, v.clone(), kv_tokens=80))
        return any("pad" in e.name for e in log.function_events)

    assert not padded(k[..., 32:]) and not padded(k[..., :192]) and not padded(k[..., 5:6])
    assert padded(k[..., 32:].clone()) and padded(buffer[:, 0, ..., 32:].nan_to_num())
    other = buffer[:, 1].as_strided(
        (2, 96, 1, 192), buffer[:, 1].stride(), buffer[:, 1].storage_offset() + 33
    )
    assert not torch.equal(other, k[..., 32:])  # the last column is the next token's first
    with profile() as log:
        rf.sink_window_attention(q, k[:, :95], other[:, :95], kv_tokens=80)
    assert any("pad" in e.name for e in log.function_events)


@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing visible"])
def test_gradients_of_columns_add_up_to_those_of_the_latent(name):
    """One leaf is keys and values: its gradient is the sum of both."""
    q, k, _, options, grad_out = case_of(name, torch.float64)
    _, (begin, end), _ = CASES[name]

    def both(attend):
        leaves = [t.detach().requires_grad_() for t in (q, k)]
        out = attend(*leaves, leaves[1][..., begin:end], **options)
        return torch.autograd.grad(out, leaves, grad_out)

    for ours, truth in zip(both(rf.sink_window_attention), both(oracle), strict=True):
        assert max_error(ours, truth) < 1e-12


@WAYS
@pytest.mark.parametrize("options", [{"kv_tokens": 4}, {"chunk_ends": [2, 6], "num_sink_tokens": 1}], ids=str)
def test_gradcheck(options, way):
    q, k, v = (t.requires_grad_() for t in make(torch.float64, 1, 6, 6, 4, 1, 5))
    inputs = (q, k) if way == "columns" else (q, k, v[..., :3].detach().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, k, v=None: rf.sink_window_attention(
            q, k, k[..., 2:] if v is None else v, softmax_scale=0.7, **options
        ),
        inputs,
    )


def test_poison_behind_the_valid_tokens_changes_no_bit():
    for way in ("columns", "apart"):
        q, k, v, options, _ = case_of("latent", torch.bfloat16)
        clean = rf.sink_window_attention(q, k, v, **options)
        k = k.clone()
        k[:, 53:] = float("nan")
        v = k[..., 32:] if way == "columns" else k[..., 32:].clone()
        assert_equal_bits(rf.sink_window_attention(q, k, v, **options), clean)


@pytest.mark.parametrize("shape", [(0, 3, 7, 2, 1, 8), (2, 0, 7, 2, 2, 8), (2, 3, 0, 2, 1, 8)])
def test_empty(shape):
    q, k, _ = (t.requires_grad_() for t in make(torch.float32, *shape))
    out, lse = rf.sink_window_attention(q, k, k[..., 3:], kv_tokens=shape[2], return_lse=True)
    assert out.shape == (*q.shape[:3], 5) and not out.any() and bool((lse == -INF).all())
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (q, k)), (q, k), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("wrong", ["wider", "no column", "heads", "tokens"])
def test_refusals(wrong):
    q, k, _ = make(torch.float32, 2, 6, 9, 4, 2, 8)
    v = {
        "wider": torch.zeros(2, 9, 2, 9),
        "no column": k[..., :0],
        "heads": k[:, :, :1, 2:],
        "tokens": k[:, 1:, :, 2:],
    }[wrong]
    refused(lambda: rf.sink_window_attention(q, k, v, kv_tokens=6), "v")


@WAYS
def test_opcheck_and_compiled(way):
    q, k, v, _, grad_out = case_of("rows of their own", torch.float32)
    v = v if way == "columns" else v.clone()
    options = (40, 0.3, None, 0, None)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.rf_kernels.sink_window_attention.default, (*leaves, *options))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=40, softmax_scale=0.3, return_lse=True)
    backward = torch.ops.rf_kernels.sink_window_attention_backward.default
    torch.library.opcheck(backward, (grad_out, q, k, v, out, lse, *options))

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: rf.sink_window_attention(q, k, k[..., 8:], kv_tokens=40), fullgraph=True, backend="eager"
    )
    assert_equal_bits(compiled(q, k), rf.sink_window_attention(q, k, k[..., 8:], kv_tokens=40))


def test_the_flop_counter_counts_what_is_asked_for():
    """Products with 224 channels for the logits, with 192 for the output."""
    q, k, v, options, _ = case_of("latent", torch.float32)
    with FlopCounterMode(display=False) as counter:
        rf.sink_window_attention(q, k, v, **options)
    assert counter.get_total_flops() == 2 * 2 * 12 * 19 * 53 * (224 + 192)
