"""rope_append and rope as citizens of PyTorch: wrong calls change nothing, gradients, fakes, compilation,
dispatch record, cost."""

import pytest
import torch

import rf_kernels as rf
from helpers.rope_append_case import LAYOUTS, clones, inputs, normal, rope_of
from rf_kernels.reference import rope_append as ref
from rf_kernels.testing import assert_equal_bits, assert_within_eager


def test_parameters_are_welcome_without_grad_mode():
    args, keywords = inputs(torch.float32)
    keywords["q_weight"] = torch.nn.Parameter(keywords["q_weight"])
    with torch.no_grad():
        assert not rf.rope_append(*args, **keywords).requires_grad


# ---- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["model", "head", None])
def test_gradcheck(layout, norm):
    angles, axes = rope_of((1, 2), layout).table([[3, 4], [0, 7]], dtype=torch.float64)
    x = normal(2, 4, 2, 7).requires_grad_()
    weight = None if norm is None else normal(14 if norm == "model" else 7, seed=1).requires_grad_()

    def call(x, weight):
        return rf.rope(x, angles=angles, axes=axes, layout=layout, weight=weight, norm=norm, eps=1e-3)

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_gradcheck_without_rotation():
    x, weight = normal(1, 3, 2, 5).requires_grad_(), normal(10, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rf.rope(x, angles=None, axes=[], weight=w), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["model", "head", None])
def test_gradients_in_low_precision(dtype, norm):
    """Against autograd through the oracle in float64; eager is autograd through the oracle in the dtype."""
    args, keywords = inputs(dtype, norm=norm)
    table = {name: keywords[name] for name in ("axes", "layout", "norm", "eps")}
    weight, grad = keywords["q_weight"], normal(*args[0].shape, dtype=dtype, seed=9)

    def gradients(path, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (args[0], weight) if t is not None]
        angles = inputs(dtype, norm=norm)[1]["angles"]
        y = path(leaves[0], angles=angles, weight=leaves[1] if weight is not None else None, **table)
        return torch.autograd.grad(y, leaves, grad.to(dtype))

    exact, eager = gradients(ref.rope, torch.float64), gradients(ref.rope, dtype)
    for ours, theirs, oracle in zip(gradients(rf.rope, dtype), eager, exact, strict=True):
        assert_within_eager(ours, oracle, theirs)


def test_gradient_of_expanded_output():
    x = normal(1, 24, 2, 40).requires_grad_()
    angles, axes = rope_of((6, 5, 5)).table([range(3), range(2), range(4)], dtype=torch.float64)
    rf.rope(x, angles=angles, axes=axes).sum().backward()  # its gradient arrives with strides of 0
    expected = ref.rope(torch.ones_like(x), angles=angles * angles.new_tensor([1, -1]), axes=axes)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-14)


# ---- registration, compilation -----------------------------------------------------------------------------


def test_caches_may_touch():
    """Both in one allocation, end to end."""
    args, keywords = inputs(torch.float32)
    pool = torch.stack(args[3:])
    touching = [*args[:3], *pool]
    assert pool[0].data_ptr() + pool[0].numel() * 4 == pool[1].data_ptr()
    apart = clones(args)
    assert_equal_bits(rf.rope_append(*touching, **keywords), rf.rope_append(*apart, **keywords))
    for a, b in zip(touching[3:], apart[3:], strict=True):
        assert_equal_bits(a, b)


def test_a_last_dimension_of_one_may_have_any_stride():
    x = torch.arange(24.0).view(1, 3, 4, 2)[..., :1]
    strided = torch.as_strided(x, x.shape, (24, 8, 2, 7))
    assert_equal_bits(rf.rope(strided, angles=None, axes=[], norm=None), x.contiguous())


@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(norm, dtype):
    args, keywords = inputs(dtype, norm=norm)
    code = {"model": 1, "head": 2, None: 0}[norm]
    table = (keywords["angles"], keywords["axes"], 0)
    x, weight = args[0].requires_grad_(), keywords["q_weight"]
    if weight is not None:
        weight.requires_grad_()
    torch.library.opcheck(torch.ops.rf_kernels.rope.default, (x, *table, weight, code, 1e-6))
    x, weight = x.detach(), None if weight is None else weight.detach()
    call = (x, *args[1:], keywords["slots"], *table, weight, keywords["k_weight"], code, 1e-6)
    torch.library.opcheck(torch.ops.rf_kernels.rope_append.default, call)


def compiled(backend):
    """Both ops in one graph, eager and compiled: results and caches must be the same bits, without a second
    compilation."""
    args, keywords = inputs(torch.bfloat16)
    table = {name: keywords[name] for name in ("angles", "axes")}
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)

    def step(q, k, v, k_cache, v_cache, slots):
        out = rf.rope_append(q, k, v, k_cache, v_cache, **keywords | dict(slots=slots))
        return rf.rope(out + 1, **table, weight=keywords["q_weight"]), (
            k_cache.isfinite().sum(),
            v_cache.isfinite().sum(),
        )

    run = torch.compile(step, fullgraph=True, backend=counter)
    for slots in ([0, 1, 2], [4, 0, 3]):
        slots = torch.tensor(slots, dtype=torch.int32)
        eager_args, compiled_args = clones(args), clones(args)
        expected, out = step(*eager_args, slots), run(*compiled_args, slots)
        for a, b in zip((out[0], *compiled_args[3:]), (expected[0], *eager_args[3:]), strict=True):
            assert_equal_bits(a, b)
        assert [int(count) for count in out[1]] == [int(count) for count in expected[1]]
    assert counter.frame_count == 1


def test_compile():
    compiled("aot_eager")


def test_compile_with_gradients():
    x, weight = normal(1, 24, 2, 40).requires_grad_(), normal(80, seed=1).requires_grad_()
    angles, axes = rope_of((6, 5, 5)).table([range(3), range(2), range(4)], dtype=torch.float64)

    def loss(x, weight):
        return rf.rope(x, angles=angles, axes=axes, weight=weight).square().mul(x).sum()

    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    ours = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight), (x, weight)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.heavy
def test_compile_inductor():
    compiled("inductor")


# ---- what ran, what would run, what it costs ---------------------------------------------------------------


def test_dispatch_is_recorded():
    args, keywords = inputs(torch.float32)
    rf.rope_append(*args, **keywords)
    assert rf.last_dispatch()[:3] == ("rope_append", "cpu", False)
    rf.rope(args[0], angles=None, axes=[])
    assert rf.last_dispatch()[:3] == ("rope", "cpu", False)
