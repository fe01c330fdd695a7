"""Every op on CUDA: against its float64 oracle, against the CPU backend, and as a PyTorch op. The checks are
those of the op's own tests; the calls in them go to the device and come back."""

import pytest
import torch

import rf_kernels as rf
from helpers.attention_case import DENSE, SEEING, WHOLE, make_case, run_with_grads
from helpers.dmd_gradient_case import LONG, SHAPE, check, made, masks, registered, weights
from helpers.ema_evict_case import DTYPES as EVERY_DTYPE
from helpers.ema_evict_case import HALF, LAYOUTS, STATES, joined, op_arguments
from helpers.ema_evict_case import Case as EvictCase
from helpers.ema_evict_case import eager as plain_evict
from helpers.gpu_tools import SERVED, moved, on, plain_attention
from helpers.rope_append_case import SHAPES as APPEND_SHAPES
from helpers.rope_append_case import clones, compare, inputs
from rf_kernels.reference.sink_window_attention import sink_window_attention as attention_oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager, max_error, relative_l2

served = pytest.mark.parametrize("dtype", SERVED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
# Chunk and window of Wan's streams: queries, keys, heads, head dim. A chunk of 3 frames and of 1; windows of
# 3, 6, 9, 12 and 21 frames; 1.3B and 14B; head-sharded; 480x832 (1560 tokens a frame) and 720x1280 (3600).
REAL = {
    "chunk": (4680, 14040, 12, 128),
    "frame": (1560, 14040, 12, 128),
    "first chunk": (4680, 4680, 12, 128),
    "L 6": (4680, 9360, 12, 128),
    "L 12": (4680, 18720, 12, 128),
    "L 21": (4680, 32760, 12, 128),
    "14B": (4680, 14040, 40, 128),
    "3 heads": (4680, 14040, 3, 128),
    "6 heads": (1560, 14040, 6, 128),
    "720p": (10800, 32400, 12, 128),
    "head dim 64": (4680, 14040, 12, 64),
}


# ---- sink_window_attention ---------------------------------------------------------------------------------


@served
def test_attention_that_sees_nothing(device, dtype):
    data, options = make_case(dtype, WHOLE["nothing_visible"])
    out, lse = on(device, rf.sink_window_attention)(*data, **options, return_lse=True)
    assert not bool(out.any()) and bool((lse == -float("inf")).all())


@served
@pytest.mark.parametrize("case", SEEING)
def test_attention(matrix_device, case, dtype):
    data, options = make_case(dtype, case)
    out, lse = on(matrix_device, rf.sink_window_attention)(*data, **options, return_lse=True)
    exact, exact_lse = attention_oracle(*(t.double() for t in data), **options, return_lse=True)
    assert_within_eager(out, exact, on(matrix_device, plain_attention)(*data, **options))
    assert lse.dtype == torch.float32
    # PyTorch's exponential of half precision on the CPU is approximate (docs/promises.md, "Not promised").
    approximate = matrix_device == "cpu" and dtype != torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2**-13 if approximate else 1e-5)


@served
@pytest.mark.parametrize("case", SEEING)
def test_attention_gradients(matrix_device, case, dtype):
    data, options = make_case(dtype, case)
    grad_out = torch.randn(data[0].shape).to(dtype)
    exact = run_with_grads(attention_oracle, [t.double() for t in data], options, grad_out)
    found = run_with_grads(on(matrix_device, rf.sink_window_attention), data, options, grad_out)
    plain = run_with_grads(on(matrix_device, plain_attention), data, options, grad_out)
    assert_within_eager(found[0], exact[0], plain[0])
    # A flash backward forms P = exp(s - lse) from the rounded LSE: relative to P, up to |lse| units in the
    # last place of float32 that eager's softmax, which never leaves the range of its maximum, does not have.
    _, lse = attention_oracle(*(t.double() for t in data), **options, return_lse=True)
    rounded = float(lse[lse.isfinite()].abs().max()) * torch.finfo(torch.float32).eps
    for ours, truth, theirs in zip(found[1:], exact[1:], plain[1:], strict=True):
        assert_within_eager(ours, truth, theirs, ulps=2 + rounded / torch.finfo(dtype).eps)


@served
@pytest.mark.parametrize("name", REAL)
def test_attention_at_real_sizes(matrix_device, name, dtype):
    """A layer's view of a cache whose slots beyond the prefix hold NaN; 96 rows are compared. CPU: a 40th of
    the tokens."""
    queries, keys, heads, head_dim = REAL[name]
    scale = 1 if matrix_device == "cuda" else 40
    queries, keys = queries // scale, keys // scale
    q = torch.randn(1, queries, heads, head_dim, device=matrix_device).to(dtype)
    cache = torch.randn(1, 2, keys + 77, 2, heads, head_dim, device=matrix_device).to(dtype)
    cache[:, :, keys:] = float("nan")
    k, v = cache[:, 1, :, 0], cache[:, 1, :, 1]
    out, lse = rf.sink_window_attention(q, k, v, kv_tokens=keys, return_lse=True)
    rows = torch.randperm(queries)[:96].sort().values.to(matrix_device)
    seen = [t.contiguous() for t in (q[:, rows], k[:, :keys], v[:, :keys])]
    exact, exact_lse = attention_oracle(*(t.double() for t in seen), return_lse=True)
    assert bool(out.isfinite().all())
    assert_within_eager(out[:, rows], exact, plain_attention(*seen))
    torch.testing.assert_close(lse[:, :, rows].double(), exact_lse, rtol=1e-5, atol=1e-5)


@served
def test_attention_of_extreme_inputs(device, dtype):
    """Logits of thousands, one key of all the weight, identical keys, large values: finite, and right."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, 2, 128, generator=g) for n in (70, 400, 400))
    large = 1e4 if dtype == torch.float16 else 1e30
    variants = {
        "large logits": (60 * q, 60 * k, v),
        "one key": (q, torch.where(torch.arange(400).view(1, -1, 1, 1) == 123, 40 * q[:, :1], k), v),
        "identical keys": (q, k[:, :1].expand_as(k).contiguous(), v),
        "large values": (q, k, large * v.sign()),
    }
    for name, data in variants.items():
        data = [t.to(dtype) for t in data]
        out, lse = on(device, rf.sink_window_attention)(*data, kv_tokens=400, return_lse=True)
        exact, exact_lse = attention_oracle(*(t.double() for t in data), return_lse=True)
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all()), name
        assert_within_eager(out, exact, on(device, plain_attention)(*data))
        # A float32 dot product of D terms errs by at most D 2^-24 |q| |k|, whatever its own size.
        bound = (
            128
            * 2.0**-24
            * float(data[0].double().norm(dim=-1).max() * data[1].double().norm(dim=-1).max())
            / 128**0.5
        )
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=bound)


@served
@pytest.mark.parametrize("heads", [(12, 1, 224, 32), (4, 2, 128, 64), (2, 2, 13, 3)], ids=str)
def test_attention_of_a_latent(matrix_device, heads, dtype):
    """Values that are columns of the keys: in place, and as a copy."""
    *shape, begin = heads
    (q, k, _), _ = make_case(dtype, (2, 37, 150, *shape, 141))
    q, k, v = q.to(matrix_device), k.to(matrix_device), k[..., begin:]
    out, lse = rf.sink_window_attention(q, k, k[..., begin:], kv_tokens=141, return_lse=True)
    apart = rf.sink_window_attention(q, k, k[..., begin:].clone(), kv_tokens=141)
    data = [t.cpu() for t in (q, k, v)]
    exact, exact_lse = attention_oracle(*(t.double() for t in data), kv_tokens=141, return_lse=True)
    plain = on(matrix_device, plain_attention)(*data, kv_tokens=141)
    for found in (out, apart):
        assert_within_eager(found.cpu(), exact, plain)
    assert max_error(lse.cpu(), exact_lse) < 2**-12


# ---- rope_append, rope -------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("layout", ["adjacent", "half", "axis_half"])
@pytest.mark.parametrize("shape", APPEND_SHAPES)
def test_append(matrix_device, monkeypatch, shape, layout, norm, dtype):
    monkeypatch.setattr(rf, "rope_append", on(matrix_device, rf.rope_append))
    compare(dtype, APPEND_SHAPES[shape] | {"layout": layout, "norm": norm})


@pytest.mark.parametrize(
    "heads, dtype",
    [
        (12, torch.bfloat16),
        (12, torch.float16),
        (12, torch.float32),
        (3, torch.bfloat16),
        (40, torch.bfloat16),
    ],
    ids=str,
)
def test_append_at_real_sizes(matrix_device, monkeypatch, heads, dtype):
    monkeypatch.setattr(rf, "rope_append", on(matrix_device, rf.rope_append))
    grid = (3, 30, 52) if matrix_device == "cuda" else (3, 5, 4)
    compare(dtype, {"batch": 1, "grid": grid, "heads": (heads, heads), "dim": 128, "pairs": (22, 21, 21)})


@every_dtype
def test_append_agrees_with_the_cpu(device, dtype):
    """Without a norm there is no sum whose order could differ: the same bits, in the caches too."""
    args, keywords = inputs(dtype, norm=None)
    theirs = clones(args)
    ours_q, cpu_q = on(device, rf.rope_append)(*args, **keywords), rf.rope_append(*theirs, **keywords)
    assert relative_l2(ours_q, cpu_q) <= torch.finfo(dtype).eps
    assert_equal_bits(args[4], theirs[4])


@every_dtype
def test_rope_gradients(device, dtype):
    args, keywords = inputs(dtype)
    options = {name: keywords[name] for name in ("angles", "axes", "layout", "norm")}

    def gradients(call):
        x, weight = args[0].clone().requires_grad_(), keywords["q_weight"].clone().requires_grad_()
        out = call(x, weight=weight, **options)
        return [out.detach(), *torch.autograd.grad(out, (x, weight), torch.ones_like(out))]

    for ours, cpu in zip(gradients(on(device, rf.rope)), gradients(rf.rope), strict=True):
        assert relative_l2(ours, cpu) <= 4 * torch.finfo(dtype).eps


# ---- ema_evict ---------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evict(matrix_device, layout, state, dtype):
    case = EvictCase(dtype, state, rope=LAYOUTS[layout])
    out, exact = case.run(on(matrix_device, rf.ema_evict)), case.wide()
    plain = [case.k.clone(), case.v.clone(), case.k_state.to(dtype, copy=True)]
    plain_evict(*plain, **case.options)
    for got, want, yardstick in zip(
        (out[0], out[1], joined(case, out)[2].to(dtype)), exact, plain, strict=False
    ):
        assert_within_eager(got, want, yardstick)
    n_sink = case.k_state.shape[1]
    assert_equal_bits(out[0][:, n_sink:], case.k[:, n_sink:])  # nothing but the sink slots is written
    assert_equal_bits(out[1][:, n_sink:], case.v[:, n_sink:])
    for ours, cpu in zip(joined(case, out)[:2], joined(case, case.run())[:2], strict=True):
        assert relative_l2(ours, cpu) <= torch.finfo(dtype).eps


@every_dtype
def test_evict_published_is_bit_exact(device, dtype):
    """``alpha * sink + (1 - alpha) * evicted`` with every product and sum rounded, as eager PyTorch does."""
    state = "published" if dtype in HALF else "compensated"
    case = EvictCase(dtype, state, n=64, heads=2)
    case.options["turns"] = (
        torch.tensor([1.0, 0.0]).to(case.options["turns"].dtype).expand(2, 3, 4, 2).contiguous()
    )
    k, v, k_state, *_ = case.run(on(device, rf.ema_evict), alpha=0.999)
    for ours, cpu in zip((k, v, k_state), case.run(alpha=0.999), strict=False):
        assert_equal_bits(ours, cpu)


@served
def test_evict_skips_and_counts_what_is_not_finite(device, dtype):
    case = EvictCase(dtype, "compensated", batch=1, n=5, schedule=[[0, 1, 2, 0]])
    case.v[0, 2 * 5 + 3, 1, 2] = float("nan")  # token 3 of the only source
    out, cpu = case.run(on(device, rf.ema_evict)), case.run()
    assert int(out[-1]) == int(cpu[-1]) == 1
    assert bool(out[0][:, :5].isfinite().all()) and bool(out[1][:, :5].isfinite().all())
    assert_equal_bits(out[1][:, 3], case.v[:, 3])


@pytest.mark.parametrize(
    "dtype, state", [*((torch.bfloat16, s) for s in STATES), (torch.float32, "published")], ids=str
)
def test_evict_at_real_sizes(matrix_device, state, dtype):
    n = 1560 if matrix_device == "cuda" else 39
    schedule = [[0, 1, 3], [0, 1, 4], [0, 1, 5]]
    rope = rf.RoPE3D.wan(128)
    case = EvictCase(
        dtype, state, rope=rope, head_dim=128, batch=1, n=n, heads=12, window=6, schedule=schedule
    )
    out, exact = case.run(on(matrix_device, rf.ema_evict)), case.wide()
    plain = [case.k.clone(), case.v.clone(), case.k_state.to(dtype, copy=True)]
    plain_evict(*plain, **case.options)
    for got, want, yardstick in zip(out[:2], exact, plain, strict=False):
        assert_within_eager(got, want, yardstick)


# ---- dmd_gradient ------------------------------------------------------------------------------------------

PAIRS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
@pytest.mark.parametrize("shape", [SHAPE, LONG, (1,), (2, 1), (3, 2047), (2, 2049)], ids=str)
@pytest.mark.parametrize("dtype, prediction", PAIRS, ids=str)
def test_dmd(matrix_device, monkeypatch, dtype, prediction, shape, flow):
    if flow and len(shape) < 2:
        pytest.skip("sigma per frame needs frames")
    monkeypatch.setattr(rf, "dmd_gradient", on(matrix_device, rf.dmd_gradient))
    x, kw = made(shape, dtype, prediction, flow=flow)
    check(x, kw)
    if len(shape) == 5:
        check(x, kw, weight=weights(shape)["frame"], mask=masks(shape)["element"], eps=1e-3)


@pytest.mark.parametrize("dtype, prediction", PAIRS, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_dmd_at_real_sizes(matrix_device, monkeypatch, batch, dtype, prediction):
    monkeypatch.setattr(rf, "dmd_gradient", on(matrix_device, rf.dmd_gradient))
    shape = (batch, 21, 16, 60, 104) if matrix_device == "cuda" else (batch, 3, 16, 12, 13)
    check(*made(shape, dtype, prediction), weight=torch.rand(batch), nan="sample")


@served
def test_dmd_loss_backward(device, dtype):
    x, kw = made(SHAPE, dtype)
    results = []
    for call in (on(device, rf.dmd_loss), rf.dmd_loss):
        leaf = x.clone().requires_grad_()
        loss = call(leaf, **kw)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for ours, cpu in zip(*results, strict=True):
        assert relative_l2(ours, cpu) <= 2 * torch.finfo(ours.dtype).eps


@served
def test_dmd_drops_a_sample_that_is_not_finite(device, dtype):
    x, kw = made(SHAPE, dtype)
    kw["fake"][1, 2, 0, 0, 0] = float("inf")
    gradient, aux = on(device, rf.dmd_gradient)(x, **kw, return_aux=True)
    expected, expected_aux = rf.dmd_gradient(x, **kw, return_aux=True)
    assert int(aux.dropped) == int(expected_aux.dropped) == 1
    assert not bool(gradient[1].any()) and bool(gradient.isfinite().all())
    assert relative_l2(gradient, expected) <= 2 * torch.finfo(dtype).eps


# ---- as PyTorch ops ----------------------------------------------------------------------------------------


def on_device(arguments, device):
    return tuple(moved(value, device) for value in arguments)


def opcheck(op, arguments, device, requires_grad=()):
    arguments = on_device(arguments, device)
    for index in requires_grad:
        arguments[index].requires_grad_()
    torch.library.opcheck(op, arguments)


def test_opcheck_attention(device):
    ops = torch.ops.rf_kernels
    for case in (DENSE["batch_grouped"], WHOLE["ragged"]):
        data, o = make_case(torch.float32, case)
        options = (o.get("kv_tokens"), 0.3, o.get("chunk_ends"), o.get("num_sink_tokens", 0))
        options += (o.get("num_window_tokens"),)
        opcheck(ops.sink_window_attention.default, (*data, *options), device, requires_grad=(0, 1, 2))
    data, _ = make_case(torch.bfloat16, (1, 70, 150, 2, 2, 128, 130))
    opcheck(ops.sink_window_attention.default, (*data, 130, 0.1, None, 0, None), device)


def test_opcheck_rope_append(device):
    args, keywords = inputs(torch.bfloat16)
    table = (keywords["angles"], keywords["axes"], 0)
    call = (*args, keywords["slots"], *table, keywords["q_weight"], keywords["k_weight"], 1, 1e-6)
    opcheck(torch.ops.rf_kernels.rope_append.default, call, device)
    call = (args[0].float(), *table, keywords["q_weight"].float(), 1, 1e-6)
    opcheck(torch.ops.rf_kernels.rope.default, call, device, requires_grad=(0, 4))


def test_opcheck_ema_evict(device):
    opcheck(
        torch.ops.rf_kernels.ema_evict.default, op_arguments(EvictCase(torch.bfloat16, "compensated")), device
    )


def test_opcheck_dmd_gradient(device):
    x, kw = made((2, 3, 4), flow=True)
    kw |= {"sigma": kw["sigma"].float(), "weight": torch.rand(2, 3)}
    arguments = registered(x, kw, mask=torch.rand(2, 3, 4) > 0.5)
    opcheck(torch.ops.rf_kernels.dmd_gradient.default, arguments, device, requires_grad=(0,))


# ---- which kernel served -----------------------------------------------------------------------------------


def test_dispatch_names_the_backend(device):
    """The ops with a kernel of their own never fall back; attention does not where the Hopper kernel is built
    and the chip is one."""
    case = EvictCase(torch.bfloat16, "compensated")
    case.run(on(device, rf.ema_evict))
    assert rf.last_dispatch()[:3] == ("ema_evict", device, False)
    args, keywords = inputs(torch.bfloat16)
    on(device, rf.rope_append)(*args, **keywords)
    assert rf.last_dispatch()[:3] == ("rope_append", device, False)
    x, kw = made(SHAPE, torch.bfloat16)
    on(device, rf.dmd_gradient)(x, **kw)
    assert rf.last_dispatch()[:3] == ("dmd_gradient", device, False)
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and has_hopper_kernel()
    for head_dim in (64, 128):
        data, options = make_case(torch.bfloat16, (1, 70, 150, 2, 2, head_dim, 130))
        on(device, rf.sink_window_attention)(*data, **options)
        assert rf.last_dispatch().fallback == (device == "cuda" and not hopper), rf.last_dispatch()


def has_hopper_kernel():
    return str(rf.build_info().get("hopper", "")).upper() in ("1", "ON", "TRUE")


def test_strict_mode_refuses_fallbacks_alone(device, monkeypatch):
    monkeypatch.setenv("RF_STRICT", "1")
    data, options = make_case(torch.float32, DENSE["odd"])
    call = on(device, rf.sink_window_attention)
    if device == "cpu":
        assert bool(call(*data, **options).isfinite().all())  # the CPU backend is no fallback
    else:
        with pytest.raises(RuntimeError, match="RF_STRICT"):
            call(*data, **options)
    args, keywords = inputs(torch.bfloat16)
    on(device, rf.rope_append)(*args, **keywords)  # has a kernel of its own everywhere
