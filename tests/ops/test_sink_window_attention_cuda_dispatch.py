"""The CUDA side of sink_window_attention without a GPU: its C++ runs on tensors that say they live on CUDA.

The library's code is the real one (dispatch key CUDA, op.cpp, portable.cpp, portable_cuda.cpp, the calls
through the stable dispatcher); PyTorch's CUDA kernels are stood in for by float64 mathematics under the
demands that those kernels make.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

import rf_kernels as rf
from helpers.attention_case import DENSE, INF, SINGLE_UNIT, WHOLE, make, make_case, run_with_grads, sdpa
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle
from rf_kernels.testing import assert_within_eager

# With a real device the library's own kernels would be handed these tensors' CPU memory.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for CUDA where there is none")


def attention(q, k, v, scale, bias=0.0):
    """[B, H, S, D], grouped heads: output in the dtype of q and natural-log LSE in float."""
    q64, k64, v64 = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    logits = q64 @ k64.repeat_interleave(group, 1).transpose(-1, -2) * scale + bias
    out = torch.softmax(logits, -1) @ v64.repeat_interleave(group, 1)
    return out.to(q.dtype), logits.logsumexp(-1).float()


def attention_backward(grad_out, q, k, v, out, lse, scale, bias=0.0):
    """The formula of the flash backward: P from the LSE that it is given, whoever computed it."""
    batch, kv_heads, tokens, dim = k.shape
    group = q.shape[1] // kv_heads
    g, q64, o = (t.double() for t in (grad_out, q, out))
    k64, v64 = (t.double().repeat_interleave(group, 1) for t in (k, v))
    assert not bool((lse == -INF).any()), "exp(-inf + inf) is NaN"
    p = torch.exp(q64 @ k64.transpose(-1, -2) * scale + bias - lse.double().unsqueeze(-1))
    ds = p * (g @ v64.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
    dk, dv = (
        t.view(batch, kv_heads, group, tokens, dim).sum(2)
        for t in (ds.transpose(-1, -2) @ q64, p.transpose(-1, -2) @ g)
    )
    return (ds @ k64).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def check_flash(q, k, v):
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.shape[3] % 8 == 0 and q.shape[3] <= 256 and q.shape[1] % k.shape[1] == 0
    assert all(t.stride(3) == 1 and t.shape[2] > 0 for t in (q, k, v))


def flash(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, **unused
):
    """This one takes [B, S, H, D]."""
    check_flash(*(t.transpose(1, 2) for t in (q, k, v)))
    assert cum_q is None and cum_k is None and (max_q, max_k) == (q.shape[1], k.shape[1])
    assert dropout_p == 0 and not is_causal and not return_debug_mask and not any(unused.values())
    out, lse = attention(*(t.transpose(1, 2) for t in (q, k, v)), scale)
    out = out.masked_fill((lse == -INF).unsqueeze(-1), 0.0)  # an empty softmax, and a NaN: an LSE of +inf
    lse = lse.masked_fill((lse == -INF) | lse.isnan(), INF)
    empty = torch.empty(0, dtype=torch.int64)
    return out.transpose(1, 2).contiguous(), lse, empty, empty, empty


def flash_backward(
    grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    check_flash(q, k, v)
    assert cum_q is None and cum_k is None and (max_q, max_k) == (q.shape[2], k.shape[2])
    assert dropout_p == 0 and not is_causal and lse.is_contiguous() and lse.dtype == torch.float32
    assert lse.shape == q.shape[:3] and grad_out.shape == out.shape == q.shape
    return attention_backward(grad_out, q, k, v, out, lse, scale)


def check_efficient(q, k, v, bias):
    """Returns the bias in float64. Its rows are aligned to 16 bytes, as the kernels demand."""
    assert q.dtype == k.dtype == v.dtype and (bias is not None or q.dtype == torch.float32)
    aligned = 16 // q.itemsize
    assert q.shape[3] % aligned == 0 and q.shape[1] == k.shape[1] == v.shape[1]  # no grouped heads
    assert all(t.stride(3) == 1 and t.stride(2) % aligned == 0 for t in (q, k, v))
    if bias is None:
        return 0.0
    assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
    assert bias.stride(3) == 1 and all(bias.stride(d) % aligned == 0 for d in range(3))
    assert not k.isnan().any() and not v.isnan().any() and not (bias == -INF).all(-1).any()
    return bias.double()


def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    bias = check_efficient(q, k, v, bias)
    assert compute_log_sumexp and dropout_p == 0 and not is_causal
    out, lse = attention(q, k, v, scale, bias)
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("inf"))
    padded[:, :, : lse.shape[2]] = lse
    return out, padded, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def efficient_backward(
    grad_out, q, k, v, bias, out, lse, seed, offset, dropout_p, wanted, is_causal=False, *, scale=None
):
    bias = check_efficient(q, k, v, bias)
    assert dropout_p == 0 and not is_causal and list(wanted) == [True, True, True, False]
    assert lse.shape[2] % 32 == 0 and lse.shape[2] - q.shape[2] < 32 and lse.is_contiguous()
    grads = attention_backward(grad_out, q, k, v, out, lse[:, :, : q.shape[2]], scale, bias)
    return *grads, torch.empty(0)


KERNELS = {
    "aten::_flash_attention_forward": flash,
    "aten::_scaled_dot_product_flash_attention_backward": flash_backward,
    "aten::_scaled_dot_product_efficient_attention": efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": efficient_backward,
}


class OnCuda(torch.Tensor):
    """A CPU tensor that says it lives on CUDA: ops of this library run their CUDA implementation, others run
    on the CPU inside."""

    calls = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda",
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rf_kernels":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        cls.calls.append(func._schema.name)
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        results = KERNELS.get(func._schema.name, func)(*args, **kwargs)
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, results)


def on_cuda(*tensors):
    OnCuda.calls.clear()
    return [OnCuda(t) for t in tensors]


def backward(grad_out, q, k, v, out, lse, options):
    """The backward op as autograd calls it (its engine refuses CUDA tensors where there is no CUDA)."""
    o = {"kv_tokens": None, "chunk_ends": None, "num_sink_tokens": 0, "num_window_tokens": None, **options}
    rows, tokens = o["kv_tokens"], None
    if not isinstance(rows, torch.Tensor):
        rows, tokens = None, rows
    return torch.ops.rf_kernels.sink_window_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        tokens,
        q.shape[-1] ** -0.5,
        o["chunk_ends"],
        o["num_sink_tokens"],
        o["num_window_tokens"],
        rows,
        o.get("kv_bias"),
    )


CASES = [
    pytest.param(case, id=name)
    for name, case in {**DENSE, **WHOLE, **SINGLE_UNIT}.items()
    if name not in ("wide_head", "nothing_visible")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_within_eager(case, dtype):
    inputs, options = make_case(dtype, case)
    grad_out = torch.randn_like(inputs[0])
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    eager = run_with_grads(sdpa, inputs, options, grad_out)
    q, k, v = on_cuda(*inputs)
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    backend = "torch_efficient" if dtype == torch.float32 else "torch_flash"
    dispatch = rf.last_dispatch()
    assert dispatch[:3] == ("sink_window_attention", backend, True) and dispatch.reason
    grads = backward(OnCuda(grad_out), q, k, v, out, lse, options)
    assert rf.last_dispatch().backend == backend
    for ours, truth, theirs in zip((out, *grads), exact, eager, strict=True):
        assert ours.is_contiguous()
        assert_within_eager(ours.inner, truth, theirs)
    _, exact_lse = oracle(*(t.double() for t in inputs), **options, return_lse=True)
    _, eager_lse = oracle(*inputs, **options, return_lse=True)
    assert_within_eager(lse.inner, exact_lse, eager_lse.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["multi_query", "streaming"])
def test_values_of_fewer_columns(case, dtype):
    (q, k, v), options = make_case(dtype, {**DENSE, **WHOLE}[case])
    inputs = (q, k, v[..., :21].contiguous())
    grad_out = torch.randn(*q.shape[:3], 21).to(dtype)
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    eager = run_with_grads(sdpa, inputs, options, grad_out)
    there = on_cuda(*inputs)
    out, lse = rf.sink_window_attention(*there, **options, return_lse=True)
    grads = backward(OnCuda(grad_out), *there, out, lse, options)
    for ours, truth, theirs in zip((out, *grads), exact, eager, strict=True):
        assert ours.is_contiguous()
        assert_within_eager(ours.inner, truth, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(2, 2, 13), (4, 2, 128)], ids=str)
def test_rows_of_their_own(heads, dtype):
    """Masked, with zeros for what lies behind a row's end; the host sees no length, which is clamped."""
    inputs = make(dtype, 5, 9, 21, *heads)
    own = torch.tensor([4, 0, 21, -3, 30], dtype=torch.int32)
    clamped = own.clamp(0, 21)
    for b, n in enumerate(clamped.tolist()):
        inputs[1][b, n:], inputs[2][b, n:] = float("nan"), INF
    grad_out = torch.randn_like(inputs[0])
    options = {"kv_tokens": clamped}
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    eager = run_with_grads(oracle, inputs, options, grad_out)
    q, k, v, rows, grad = on_cuda(*inputs, own, grad_out)
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=rows, return_lse=True)
    assert rf.last_dispatch()[:3] == ("sink_window_attention", "torch_efficient", True)
    grads = backward(grad, q, k, v, out, lse, {"kv_tokens": rows})
    for ours, truth, theirs in zip((out, *grads), exact, eager, strict=True):
        assert ours.is_contiguous()
        assert_within_eager(ours.inner, truth, theirs)
    _, exact_lse = oracle(*(t.double() for t in inputs), **options, return_lse=True)
    _, eager_lse = oracle(*inputs, **options, return_lse=True)
    assert_within_eager(lse.inner, exact_lse, eager_lse.float())
    for b, n in enumerate(clamped.tolist()):
        assert not any(g.inner[b, n:].any() for g in grads[1:])
    assert not {"aten::_local_scalar_dense", "aten::item"} & set(OnCuda.calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [17, (4, 0, 21)], ids=str)
def test_a_bias_of_keys(tokens, dtype):
    """One row of it has no key that is not hidden."""
    inputs = make(dtype, 3, 9, 21, 4, 2, 24)
    bias = torch.randn(3, 21)
    bias[:, 3], bias[2] = -INF, -INF
    if isinstance(tokens, tuple):
        tokens = torch.tensor(tokens, dtype=torch.int32)
    grad_out, options = torch.randn_like(inputs[0]), {"kv_tokens": tokens, "kv_bias": bias}
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    eager = run_with_grads(oracle, inputs, options | {"kv_bias": bias.to(dtype)}, grad_out)
    q, k, v, device_bias, grad = on_cuda(*inputs, bias, grad_out)
    given = {
        "kv_tokens": OnCuda(tokens) if isinstance(tokens, torch.Tensor) else tokens,
        "kv_bias": device_bias,
    }
    out, lse = rf.sink_window_attention(q, k, v, **given, return_lse=True)
    assert rf.last_dispatch()[:3] == ("sink_window_attention", "torch_efficient", True)
    grads = backward(grad, q, k, v, out, lse, given)
    for ours, truth, theirs in zip((out, *grads), exact, eager, strict=True):
        assert ours.is_contiguous()
        assert_within_eager(ours.inner, truth, theirs)
    assert not out.inner[2].any() and (lse.inner[2] == -INF).all()


def test_keys_of_a_model_are_not_copied():
    """Head dim 128, half precision, grouped heads, a prefix of the cache: the kernel gets views."""
    q, k, v = on_cuda(*make(torch.bfloat16, 2, 24, 50, 4, 2, 128))
    rf.sink_window_attention(q, k, v, kv_tokens=43)
    assert OnCuda.calls.count("aten::_flash_attention_forward") == 1
    assert not {"aten::copy_", "aten::clone", "aten::cat", "aten::constant_pad_nd"} & set(OnCuda.calls)


def test_no_key_is_the_empty_sum():
    q, k, v = on_cuda(*make(torch.bfloat16, 2, 5, 7, 2, 2, 8))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=0, return_lse=True)
    assert bool((out.inner == 0).all()) and bool((lse.inner == -float("inf")).all())
    grads = backward(
        OnCuda(torch.ones(2, 5, 2, 8, dtype=torch.bfloat16)), q, k, v, out, lse, {"kv_tokens": 0}
    )
    assert all(bool((g.inner == 0).all()) for g in grads)
    assert not set(KERNELS) & set(OnCuda.calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dense", "whole"])
def test_a_query_without_any_weight_is_the_empty_sum(mode, dtype):
    """Each kernel says it in its own way: flash out = 0 and lse = +inf, efficient NaN and -inf. A NaN stays
    one."""
    seen = (
        dict(kv_tokens=24)
        if mode == "dense"
        else dict(chunk_ends=[8, 16, 24], num_sink_tokens=2, num_window_tokens=5)
    )
    inputs = make(dtype, 1, 24, 24, 2, 2, 8)
    inputs[0].zero_()
    inputs[1][..., 0] = -1e30
    inputs[0][:, 9, :, 0] = 1e30  # logits of -inf
    inputs[0][:, 11] = float("nan")
    q, k, v = on_cuda(*inputs)
    out, lse = rf.sink_window_attention(q, k, v, **seen, return_lse=True)
    others = [i for i in range(24) if i not in (9, 11)]
    assert not bool(out.inner[:, 9].any()) and bool((lse.inner[..., 9] == -INF).all())
    assert bool(out.inner[:, 11].isnan().all()) and bool(lse.inner[..., 11].isnan().all())
    assert bool(out.inner[:, others].isfinite().all()) and bool(lse.inner[..., others].isfinite().all())
    grad_out = torch.zeros_like(inputs[0])
    grad_out[:, 9] = 1.0
    inputs[0][:, 11] = 0.0
    grads = backward(OnCuda(grad_out), q, k, v, out, OnCuda(lse.inner.nan_to_num(nan=0.0, neginf=-INF)), seen)
    assert not bool(grads[2].inner.any())


def test_float64_is_refused_with_the_reason():
    with pytest.raises(rf.ArgumentError, match="argument `q`: expected .*float64.*, found float64"):
        rf.sink_window_attention(*on_cuda(*make(torch.float64, 1, 4, 6, 2, 2, 8)), kv_tokens=6)
    assert not set(KERNELS) & set(OnCuda.calls)


def test_devices_must_agree():
    q, k, v = make(torch.float32, 1, 4, 6, 2, 2, 8)
    with pytest.raises(rf.ArgumentError, match="argument `k`: expected a tensor on cuda:.*, found cpu"):
        rf.sink_window_attention(*on_cuda(q), k, v, kv_tokens=6)


def test_strict_refuses_the_fallback(monkeypatch):
    monkeypatch.setenv("RF_STRICT", "1")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="RF_STRICT=1 forbids the fallback"):
            rf.sink_window_attention(*on_cuda(*make(dtype, 1, 4, 6, 2, 2, 8)), kv_tokens=6)
        assert not set(KERNELS) & set(OnCuda.calls)
    rf.sink_window_attention(
        *make(torch.float32, 1, 4, 6, 2, 2, 8), kv_tokens=6
    )  # the CPU's own backend is no fallback


def test_the_fallback_says_why_hopper_was_not_taken():
    """Half precision without a Hopper device: PyTorch's kernels, and a reason that names the device, the
    build or its runtime."""
    rf.sink_window_attention(*on_cuda(*make(torch.bfloat16, 1, 4, 6, 2, 2, 128)), kv_tokens=6)
    dispatch = rf.last_dispatch()
    assert dispatch.backend == "torch_flash" and dispatch.fallback
    assert "Hopper" in dispatch.reason or "CUDA runtime of this build" in dispatch.reason
