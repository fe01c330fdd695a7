"""sink_window_attention on CPU: against the oracle, the oracle against masked SDPA, and what the op promises
to the bit."""

import itertools
import math
import random

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import rf_kernels as rf
from helpers.attention_case import (
    DENSE,
    HALF_LSE,
    INF,
    SEEING,
    SINGLE_UNIT,
    WHOLE,
    make,
    make_case,
    run_with_grads,
    sdpa,
    visible,
)
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager, fingerprint, max_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run_bits(inputs, options, grad_out):
    """Output, LSE and the three gradients of the op."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = rf.sink_window_attention(*leaves, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)]


CASES = [pytest.param(case, id=name) for name, case in {**DENSE, **WHOLE}.items()]


@pytest.mark.parametrize("case", SEEING)
def test_oracle_is_masked_sdpa(case):
    inputs, options = make_case(torch.float64, case)
    q, k, _ = inputs
    out, lse = oracle(*inputs, **options, return_lse=True)
    assert max_error(out, sdpa(*inputs, **options)) < 1e-14
    logits = (
        torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
        * q.shape[-1] ** -0.5
    )
    hidden = ~visible(q.shape[1], k.shape[1], **options)
    assert max_error(lse, logits.masked_fill(hidden, -INF).logsumexp(-1)) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEEING)
def test_values_and_gradients_within_eager(case, dtype):
    inputs, options = make_case(dtype, case)
    grad_out = torch.randn(
        inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)
    exact = run_with_grads(oracle, [t.double() for t in inputs], options, grad_out)
    eager = run_with_grads(sdpa, inputs, options, grad_out)
    for ours, truth, theirs in zip(
        run_with_grads(rf.sink_window_attention, inputs, options, grad_out), exact, eager, strict=True
    ):
        assert_within_eager(ours, truth, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_lse(case, dtype):
    inputs, options = make_case(dtype, case)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    _, lse = rf.sink_window_attention(*inputs, **options, return_lse=True)
    _, exact = oracle(*(t.double() for t in inputs), **options, return_lse=True)
    _, eager = oracle(*inputs, **options, return_lse=True)
    assert lse.dtype == lse_dtype and lse.is_contiguous()
    assert_within_eager(lse, exact, eager.to(lse_dtype))


def test_last_dispatch_names_the_backend():
    inputs, options = make_case(torch.float32, DENSE["odd"])
    rf.sink_window_attention(*inputs, **options)
    assert rf.last_dispatch() == ("sink_window_attention", "cpu", False, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_cache_are_read_in_place(dtype):
    """k and v as a cache has them (a layer of one buffer), q as a fused projection has it: same bits, nothing
    copied but the LSE."""
    q, k, v = make(dtype, 2, 40, 50, 4, 4, 32)
    buffer = torch.full((2, 3, 50, 2, 4, 32), float("nan"), dtype=dtype)  # B, layer, T, (k, v), H, D
    buffer[:, 1, :, 0], buffer[:, 1, :, 1] = k, v
    fused = torch.full((2, 40, 3, 4, 32), float("nan"), dtype=dtype)
    fused[:, :, 1] = q
    with profile(record_shapes=True) as log:
        out = rf.sink_window_attention(fused[:, :, 1], buffer[:, 1, :, 0], buffer[:, 1, :, 1], kv_tokens=43)
    assert_equal_bits(out, rf.sink_window_attention(q, k, v, kv_tokens=43))
    assert out.is_contiguous()
    copies = [
        e.input_shapes[0]
        for e in log.function_events
        if e.name in ("aten::copy_", "aten::cat", "aten::clone")
    ]
    assert all(shape == [2, 4, 40] for shape in copies), copies


def test_expanded_heads_and_batch():
    q, k, v = make(torch.float32, 3, 8, 20, 4, 1, 16)
    wide = [t[:1].expand(3, -1, 4, -1) for t in (k, v)]
    assert_equal_bits(
        rf.sink_window_attention(q, *wide, kv_tokens=20),
        rf.sink_window_attention(
            q, *(t[:1].expand(3, -1, -1, -1).contiguous() for t in (k, v)), kv_tokens=20
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_key_is_the_empty_sum(dtype):
    q, k, v = (t.requires_grad_() for t in make(dtype, 2, 5, 7, 2, 2, 8))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=0, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -INF).all())
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), (q, k, v)))
    (q, k, v), options = make_case(dtype, WHOLE["nothing_visible"])
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -INF).all())


@pytest.mark.parametrize(
    "shape", [(2, 0, 7, 2, 2, 8), (0, 3, 7, 2, 2, 8), (2, 0, 0, 2, 1, 8), (1, 3, 7, 0, 0, 8)]
)
def test_empty(shape):
    q, k, v = (t.requires_grad_() for t in make(torch.float32, *shape))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=k.shape[1], return_lse=True)
    assert out.shape == q.shape and lse.shape == (shape[0], shape[3], shape[1])
    for grad, leaf in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == leaf.shape and bool((grad == 0).all())
    if shape[1] == shape[2]:
        assert rf.sink_window_attention(q, k, v, chunk_ends=[]).shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_answers(dtype):
    """One key: its value to the bit. Identical keys: the mean of exactly representable values."""
    q, k, v = make(dtype, 2, 9, 12, 2, 2, 16)
    assert_equal_bits(
        rf.sink_window_attention(q, k, v, kv_tokens=1), v[:, :1].expand(-1, 9, -1, -1).contiguous()
    )
    same = k[:, :1].expand_as(k).contiguous()
    steps = torch.arange(8, dtype=dtype).view(1, 8, 1, 1).expand(2, 8, 2, 16).contiguous()
    out, lse = rf.sink_window_attention(
        q, same, F.pad(steps, (0, 0, 0, 0, 0, 4)), kv_tokens=8, return_lse=True
    )
    assert bool((out == 3.5).all())
    _, one = rf.sink_window_attention(q, same, v, kv_tokens=1, return_lse=True)
    assert max_error(lse, one.double() + torch.log(torch.tensor(8.0, dtype=torch.float64))) < (
        1e-6 if dtype in (torch.float64, torch.float32) else HALF_LSE
    )


@pytest.mark.parametrize("mode", ["dense", "whole"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits(size, mode):
    """Logits of +-size: no overflow; all weight goes to the largest. Eager float32 is as exact as its logits
    are."""
    (q, k, v), options = make_case(torch.float32, DENSE["odd"] if mode == "dense" else WHOLE["ragged"])
    q = q * size
    exact, exact_lse = oracle(q.double(), k.double(), v.double(), **options, return_lse=True)
    eager, eager_lse = oracle(q, k, v, **options, return_lse=True)
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    assert_within_eager(out, exact, eager)
    assert_within_eager(lse, exact_lse, eager_lse)


@pytest.mark.parametrize("order", ["stream", "ring"])
def test_whole_sequence_is_streaming_with_a_static_sink(order):
    """Chunk by chunk over a buffer of sink and ring, whose slots keep no order, gives the whole-sequence
    result."""
    n, frames, sink_frames, window_frames, per_chunk = 5, 12, 2, 4, 2
    q, k, v = make(torch.float64, 2, frames * n, frames * n, 4, 2, 16)
    ends = [n * f for f in range(per_chunk, frames + 1, per_chunk)]
    whole, whole_lse = rf.sink_window_attention(
        q,
        k,
        v,
        chunk_ends=ends,
        num_sink_tokens=sink_frames * n,
        num_window_tokens=window_frames * n,
        return_lse=True,
    )
    slots = sink_frames + window_frames
    cache_k, cache_v = (
        torch.full((2, slots * n, 2, 16), float("nan"), dtype=torch.float64) for _ in range(2)
    )
    for end in range(per_chunk, frames + 1, per_chunk):
        for f in range(end - per_chunk, end):
            slot = f if f < sink_frames else sink_frames + (f - sink_frames) % window_frames
            cache_k[:, slot * n : (slot + 1) * n] = k[:, f * n : (f + 1) * n]
            cache_v[:, slot * n : (slot + 1) * n] = v[:, f * n : (f + 1) * n]
        valid = min(end, slots) * n
        seen_k, seen_v = cache_k, cache_v
        if order == "stream":  # the same keys in the order of the stream
            newest = range(max(sink_frames, end - window_frames), end)
            keep = [i for f in (*range(min(sink_frames, end)), *newest) for i in range(f * n, (f + 1) * n)]
            seen_k, seen_v = k[:, keep], v[:, keep]
        rows = slice((end - per_chunk) * n, end * n)
        out, lse = rf.sink_window_attention(q[:, rows], seen_k, seen_v, kv_tokens=valid, return_lse=True)
        assert max_error(whole[:, rows], out) < 1e-14
        assert max_error(whole_lse[:, :, rows], lse) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_poison_behind_the_valid_tokens_changes_no_bit(dtype):
    tokens = 19
    q, k, v = make(dtype, 2, 33, tokens, 4, 2, 16)
    grad_out = torch.randn_like(q)
    for kv_tokens in range(tokens + 1):
        clean = run_bits([q, k, v], {"kv_tokens": kv_tokens}, grad_out)
        for poison in (float("nan"), -INF, min(3e38, torch.finfo(dtype).max)):
            poisoned = [q, k.clone(), v.clone()]
            poisoned[1][:, kv_tokens:] = poison
            poisoned[2][:, kv_tokens:] = poison
            for a, b in zip(run_bits(poisoned, {"kv_tokens": kv_tokens}, grad_out), clean, strict=True):
                assert_equal_bits(a, b)
        for grad in clean[3:]:
            assert bool((grad[:, kv_tokens:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poison_outside_sink_and_window_changes_no_later_bit(dtype):
    """Whole sequence: keys that a chunk does not see are not read for it."""
    (q, k, v), options = make_case(dtype, WHOLE["ragged"])
    clean, clean_lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    k, v = k.clone(), v.clone()
    # behind the sink (9), before the window of the last three chunks
    k[:, 10:19], v[:, 10:19] = float("nan"), INF
    out, lse = rf.sink_window_attention(q, k, v, **options, return_lse=True)
    assert_equal_bits(out[:, 34:], clean[:, 34:])
    assert_equal_bits(lse[:, :, 34:], clean_lse[:, :, 34:])
    assert_equal_bits(out[:, :7], clean[:, :7])
    assert bool(out[:, 7:20].isnan().any())  # their own chunk does see them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["batch_grouped", "tile_edges", "one_head", "one_key_head", "one_query", "streaming", "ragged"]
)
def test_bits_do_not_depend_on_threads(name, dtype, threads):
    inputs, options = make_case(dtype, {**DENSE, **WHOLE, **SINGLE_UNIT}[name])
    grad_out = torch.randn_like(inputs[0])
    results = []
    for n in (1, 2, 4, 2):
        threads(n)
        results.append(run_bits(inputs, options, grad_out))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_equal_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["dense", "whole"])
def test_bits_do_not_depend_on_the_neighbours(mode, dtype):
    """A sample alone, first, or last among others whose values are NaN: the same bits."""
    if mode == "dense":
        case, options = make_case(dtype, (1, 37, 61, 4, 2, 20, 53))
    else:
        case, options = make_case(dtype, (1, 60, 4, 2, 20, [7, 20, 33, 34, 60], 9, 15))
    grad_out = torch.randn_like(case[0])
    alone = run_bits(case, options, grad_out)
    for place, batch in itertools.product((0, 1, 2), (3,)):
        crowd = [torch.full((batch, *t.shape[1:]), float("nan"), dtype=dtype) for t in (*case, grad_out)]
        for t, sample in zip(crowd, (*case, grad_out), strict=True):
            t[place] = sample[0]
        for a, b in zip(run_bits(crowd[:3], options, crowd[3]), alone, strict=True):
            assert_equal_bits(a[place], b[0])


@pytest.mark.parametrize("case", [(1, 3, 6, 4, 2, 3, 4), (1, 6, 2, 1, 3, [2, 3, 6], 1, 2)])
def test_gradcheck(case):
    inputs, options = make_case(torch.float64, case)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: rf.sink_window_attention(*x, softmax_scale=0.7, **options), leaves
    )


def test_gradients_only_where_asked():
    (q, k, v), options = make_case(torch.float32, WHOLE["ragged"])
    everything = run_bits([q, k, v], options, torch.ones_like(q))
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((q, k, v))]
        rf.sink_window_attention(*leaves, **options).sum().backward()
        assert_equal_bits(leaves[i].grad, everything[2 + i])
        assert all(t.grad is None for j, t in enumerate(leaves) if j != i)


def test_lse_and_second_derivatives_are_refused():
    q, k, v = (t.requires_grad_() for t in make(torch.float64, 1, 4, 6, 2, 2, 8))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=k.shape[1], return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.autograd.grad(grad.sum(), k)


def test_a_cache_written_between_forward_and_backward_is_noticed():
    q, k, v = make(torch.float32, 1, 4, 6, 2, 2, 8)
    out = rf.sink_window_attention(q.requires_grad_(), k, v, kv_tokens=6)
    k[:, 0] = 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_at_random_shapes_threads_and_places(dtype, threads):
    """Odd head dims, few rows and rows that no cache line divides: each sample at each place and thread count
    as by itself."""
    choose = random.Random(7)
    for seed in range(12):
        heads = choose.choice([1, 1, 2, 3, 4])
        shape = (
            choose.randint(1, 90),
            choose.randint(1, 600),
            heads,
            choose.choice([1, heads]),
            choose.randint(1, 80),
        )
        crowd, options = make_case(dtype, (3, *shape, choose.randint(1, shape[1])), seed=seed)
        grad_out = torch.randn_like(crowd[0])
        threads(1)
        alone = [
            run_bits([t[b : b + 1].clone() for t in crowd], options, grad_out[b : b + 1].clone())
            for b in range(3)
        ]
        for n in (1, 2, 4):
            threads(n)
            for i, t in enumerate(run_bits(crowd, options, grad_out)):
                assert_equal_bits(t, torch.cat([sample[i] for sample in alone]))


OPCHECK = [DENSE["odd"], (2, 9, 20, 4, 2, 8, 0), WHOLE["ragged"], WHOLE["nothing_visible"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64])
def test_an_expanded_gradient_is_one_with_memory(tokens, dtype):
    """What sum() hands back has stride 0 in every dimension."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, tokens, 3, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    out = rf.sink_window_attention(*leaves, kv_tokens=tokens)
    expanded = torch.autograd.grad(
        out, leaves, torch.ones((), dtype=dtype).expand(out.shape), retain_graph=True
    )
    for a, b in zip(expanded, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        assert_equal_bits(a, b)


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case):
    (q, k, v), o = make_case(torch.float32, case)
    options = (
        o.get("kv_tokens"),
        0.3,
        o.get("chunk_ends"),
        o.get("num_sink_tokens", 0),
        o.get("num_window_tokens"),
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for deterministic in ((), (True,)):  # left at its default, and given
        torch.library.opcheck(
            torch.ops.rf_kernels.sink_window_attention.default, (*leaves, *options, *deterministic)
        )
    out, lse = rf.sink_window_attention(q, k, v, softmax_scale=0.3, **o, return_lse=True)
    saved = [t.detach() for t in (torch.ones_like(out), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.rf_kernels.sink_window_attention_backward.default, (*saved, *options))


def compile_counted(fn, backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=counter), counter


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_does_not_recompile_per_length(backend):
    q, k, v = make(torch.float32, 1, 12, 40, 2, 2, 16)
    compiled, counter = compile_counted(
        lambda q, k, v, n: rf.sink_window_attention(q, k, v, kv_tokens=n) * 2, backend
    )
    for n in (3, 7, 12, 25, 33, 40):
        assert_equal_bits(compiled(q, k, v, n), rf.sink_window_attention(q, k, v, kv_tokens=n) * 2)
    assert counter.frame_count <= 2  # once with the length as a constant, once with it as a symbol


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd", "ragged"])
def test_compile_with_gradients(name, backend):
    inputs, options = make_case(torch.float32, {**DENSE, **WHOLE}[name])
    compiled, _ = compile_counted(
        lambda q, k, v: rf.sink_window_attention(q, k, v, **options, return_lse=True), backend
    )
    leaves, plain = ([t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
    (out, lse), (out2, lse2) = compiled(*leaves), rf.sink_window_attention(*plain, **options, return_lse=True)
    assert_equal_bits(out, out2)
    assert_equal_bits(lse, lse2)
    out.sum().backward()
    out2.sum().backward()
    for a, b in zip(leaves, plain, strict=True):
        assert_equal_bits(a.grad, b.grad)


def bad_calls():
    q, k, v = make(torch.float32, 2, 6, 9, 4, 2, 8)
    whole = make(torch.float32, 1, 6, 6, 2, 2, 8)
    return {
        "q_dim": ("q", (q[0], k, v), {}),
        "q_dtype": ("q", (q.int(), k.int(), v.int()), {}),
        "q_head_dim": ("q", tuple(t.new_zeros(1, 2, 1, 257) for t in (q, k, v)), {}),
        "q_no_head_dim": ("q", tuple(t[..., :0] for t in (q, k, v)), {}),
        "q_stride": ("q", (q.transpose(1, 3).contiguous().transpose(1, 3), k, v), {}),
        "q_overlap": ("q", (q[:, :1].expand(-1, 6, -1, -1), k, v), {}),
        "k_dim": ("k", (q, k[0], v), {}),
        "k_dtype": ("k", (q, k.double(), v), {}),
        "k_batch": ("k", (q, k[:1], v), {}),
        "k_head_dim": ("k", (q, k[..., :4], v), {}),
        "k_heads": ("k", (q, k[:, :, :1].expand(-1, -1, 3, -1), v), {}),
        "k_no_heads": ("k", (q, k[:, :, :0], v[:, :, :0]), {}),
        "k_stride": ("k", (q, k.transpose(1, 3).contiguous().transpose(1, 3), v), {}),
        "k_overlap": ("k", (q, k[:, :1].expand(-1, 9, -1, -1), v), {}),
        "v_dim": ("v", (q, k, v[0]), {}),
        "v_dtype": ("v", (q, k, v.half()), {}),
        "v_tokens": ("v", (q, k, v[:, :8]), {}),
        "v_heads": ("v", (q, k, v[:, :, :1]), {}),
        "v_stride": ("v", (q, k, v.transpose(1, 3).contiguous().transpose(1, 3)), {}),
        "kv_tokens_negative": ("kv_tokens", (q, k, v), {"kv_tokens": -1}),
        "kv_tokens_beyond": ("kv_tokens", (q, k, v), {"kv_tokens": 10}),
        "scale_zero": ("softmax_scale", (q, k, v), {"softmax_scale": 0.0}),
        "scale_negative": ("softmax_scale", (q, k, v), {"softmax_scale": -1.0}),
        "scale_nan": ("softmax_scale", (q, k, v), {"softmax_scale": float("nan")}),
        "scale_inf": ("softmax_scale", (q, k, v), {"softmax_scale": INF}),
        "dense_with_sink": ("num_sink_tokens", (q, k, v), {"num_sink_tokens": 2}),
        "dense_with_window": ("num_window_tokens", (q, k, v), {"num_window_tokens": 2}),
        "whole_keys": ("k", (q, k, v), {"chunk_ends": [6]}),
        "whole_kv_tokens": ("kv_tokens", whole, {"chunk_ends": [6], "kv_tokens": 6}),
        "whole_short": ("chunk_ends", whole, {"chunk_ends": [2, 5]}),
        "whole_long": ("chunk_ends", whole, {"chunk_ends": [2, 7]}),
        "whole_descending": ("chunk_ends", whole, {"chunk_ends": [4, 2, 6]}),
        "whole_repeated": ("chunk_ends", whole, {"chunk_ends": [3, 3, 6]}),
        "whole_zero": ("chunk_ends", whole, {"chunk_ends": [0, 6]}),
        "whole_empty": ("chunk_ends", whole, {"chunk_ends": []}),
        "sink_negative": ("num_sink_tokens", whole, {"chunk_ends": [6], "num_sink_tokens": -1}),
        "window_negative": ("num_window_tokens", whole, {"chunk_ends": [6], "num_window_tokens": -1}),
    }


BAD = bad_calls()


@pytest.mark.parametrize("name", BAD)
def test_wrong_calls_are_refused(name):
    argument, tensors, options = BAD[name]
    before = fingerprint(*tensors)
    with pytest.raises(
        rf.ArgumentError,
        match=rf"^rf_kernels\.sink_window_attention: argument `{argument}`: expected .+, found .+",
    ):
        rf.sink_window_attention(*tensors, **options)
    assert fingerprint(*tensors) == before


# ---- queries for which every logit is -inf -----------------------------------------------------------------


def unseeing(dtype, how):
    """q, k, v [1, 24, 2, 8] and what of the keys is seen: query 9 sees nothing in keys 0..7 (`first`), or in
    no key (`all`)."""
    q, k, v = make(dtype, 1, 24, 24, 2, 2, 8)
    hidden = slice(0, 8) if how.startswith("first") else slice(None)
    if how.endswith("keys"):
        k[:, hidden] = -INF
        q.abs_().add_(0.5)
    else:  # finite numbers whose product overflows
        large = 1e30 if dtype != torch.float64 else 1e300
        if dtype == torch.float16:
            pytest.skip("no two float16 numbers have a product beyond float32")
        q.zero_()
        k[..., 0] = 0
        q[:, 9, :, 0], k[:, hidden, :, 0] = large, -large
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["first keys", "first product"])
def test_an_interval_without_weight_changes_nothing(how, dtype):
    """The sink of queries 16..23 has no weight: what they see is their window alone, to the last bit of the
    merge."""
    q, k, v = unseeing(dtype, how)
    q[:, 16:] = q[:, 9:10]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, lse = rf.sink_window_attention(
        q, k, v, chunk_ends=[16, 24], num_sink_tokens=8, num_window_tokens=8, return_lse=True
    )
    alone, alone_lse = rf.sink_window_attention(q[:, 16:], k[:, 16:], v[:, 16:], kv_tokens=8, return_lse=True)
    assert_equal_bits(out[:, 16:], alone)
    assert_equal_bits(lse[..., 16:], alone_lse)
    (grad,) = torch.autograd.grad(out[:, 16:].sum(), v)
    assert bool(grad.isfinite().all()) and not bool(grad[:, :8].any()) and bool(grad[:, 16:].any())
    with torch.no_grad():
        exact = oracle(
            q.double(), k.double(), v.double(), chunk_ends=[16, 24], num_sink_tokens=8, num_window_tokens=8
        )
    if dtype != torch.float64:  # there the same products overflow, which have no weight in float64 either
        torch.testing.assert_close(out[:, 16:].double(), exact[:, 16:], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["all keys", "all product"])
@pytest.mark.parametrize("mode", ["dense", "whole"])
def test_a_query_without_any_weight_is_the_empty_sum(mode, how, dtype):
    q, k, v = unseeing(dtype, how)
    seen = (
        dict(kv_tokens=24)
        if mode == "dense"
        else dict(chunk_ends=[8, 16, 24], num_sink_tokens=2, num_window_tokens=5)
    )
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    for function in (rf.sink_window_attention, oracle):
        out, lse = function(q, k, v, **seen, return_lse=True)
        assert not bool(out[:, 9].any()) and bool((lse[..., 9] == -INF).all())
        assert bool(out.isfinite().all()) and not bool(lse.isnan().any())
        grads = torch.autograd.grad(out[:, 9].sum(), (q, k, v), allow_unused=True)
        if how == "all product":  # an infinite key has no gradient that means anything
            assert not any(bool(g.any()) for g in grads)
        assert not bool(grads[2].any())


def test_lse_zero_is_no_empty_sum():
    """One key whose logit and value are 0: out = 0 and lse = 0, as PyTorch's kernel says of an empty
    softmax."""
    q, k, v = (torch.zeros(1, 3, 2, 8) for _ in range(3))
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=1, return_lse=True)
    assert not bool(out.any()) and bool((lse == 0).all())
    k[:, 1] = -INF
    q[:] = 1.0
    _, lse = rf.sink_window_attention(q, k, v, kv_tokens=2, return_lse=True)
    assert bool((lse == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_lse_of_half_precision_is_as_good_as_promised(dtype):
    """Over the period of the kernel's exponential: 33 keys, one logit 0 and 32 of -s."""
    k = torch.zeros(1, 33, 1, 8, dtype=dtype)
    k[:, 1:, :, 0] = -1
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    q[..., 0] = 1
    for s in torch.linspace(0.001, 0.7, 300).tolist():
        _, lse = rf.sink_window_attention(q, k, k, kv_tokens=33, softmax_scale=s, return_lse=True)
        assert abs(float(lse) - math.log(1 + 32 * math.exp(-s))) <= HALF_LSE


# ---- FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in {**DENSE, **WHOLE}.items()])
def test_the_flop_counter_counts_attention(case):
    """What it counts for PyTorch's own attention over the pairs that are seen: two products forward, five
    backward."""
    (q, k, v), options = make_case(torch.float32, case)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        out = rf.sink_window_attention(*leaves, **options)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = int(visible(q.shape[1], k.shape[1], **options).sum())
    assert forward == 4 * q.shape[0] * q.shape[2] * q.shape[3] * pairs
    assert counter.get_total_flops() == forward * 7 // 2
