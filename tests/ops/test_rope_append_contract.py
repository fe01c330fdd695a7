"""rope_append and rope as citizens of PyTorch: wrong calls change nothing, gradients, fakes, compilation, dispatch record, cost."""

import pytest
import torch
from helpers.rope_append_case import DTYPES, LAYOUTS, clones, inputs, normal, rope_of

import rf_kernels as rf
from rf_kernels.reference import rope_append as ref
from rf_kernels.testing import assert_equal_bits, assert_within_eager, fingerprint

NAMES = ("q", "k", "v", "k_cache", "v_cache")


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def spread(t):
    """The same shape with a stride of 2 in the last dimension."""
    return torch.stack((t, t), dim=-1)[..., 0]


def wrong(argument, change, match=""):
    return pytest.param(argument, change, match, id=f"{argument}: {match or 'shape'}")


# What is changed in a good call of (2, 24 tokens = 3 frames of 8, 4 and 2 heads, 40 dims, 5 frame slots): name -> new value.
WRONG = [
    wrong("q", lambda a: dict(q=a["q"][0]), "4 dimensions"),
    wrong("q", lambda a: dict(q=spread(a["q"])), "stride 1"),
    wrong("q", lambda a: dict(q=a["q"].long()), "dtype"),
    wrong("k", lambda a: dict(k=a["k"].double()), "dtype"),
    wrong("k", lambda a: dict(k=a["k"][:1]), "dimension 0"),
    wrong("k", lambda a: dict(k=a["k"][:, :-1]), "dimension 1"),
    wrong("k", lambda a: dict(k=a["k"][..., :-1]), "dimension 3"),
    wrong("k", lambda a: dict(k=spread(a["k"])), "stride 1"),
    wrong("v", lambda a: dict(v=a["v"][:, :, :1]), "dimension 2"),
    wrong("v", lambda a: dict(v=a["v"].half()), "dtype"),
    wrong("k_cache", lambda a: dict(k_cache=a["k_cache"][:1]), "dimension 0"),
    wrong("k_cache", lambda a: dict(k_cache=a["k_cache"][:, :, :1]), "dimension 2"),
    wrong("k_cache", lambda a: dict(k_cache=a["k_cache"].double()), "dtype"),
    wrong("k_cache", lambda a: dict(k_cache=spread(a["k_cache"])), "stride 1"),
    wrong("k_cache", lambda a: dict(k_cache=a["k_cache"][:, :1].expand(-1, 40, -1, -1)), "no two elements"),
    wrong("k_cache", lambda a: dict(k_cache=a["v_cache"]), "`v_cache`"),
    wrong("k_cache", lambda a: dict(k=a["k_cache"][:, 8:32]), "`k`"),
    wrong("k_cache", lambda a: dict(v=a["k_cache"][:, :24]), "`v`"),
    wrong("v_cache", lambda a: dict(v=a["v_cache"][:, 16:]), "`v`"),
    wrong("v_cache", lambda a: dict(k_weight=a["v_cache"].view(-1)[:80]), "`k_weight`"),
    wrong("v_cache", lambda a: dict(v_cache=a["v_cache"][:, :-1]), "dimension 1"),
    wrong("slots", lambda a: dict(slots=a["slots"].long()), "dtype int32"),
    wrong("slots", lambda a: dict(slots=a["slots"][:0]), "divides"),
    wrong("slots", lambda a: dict(slots=torch.arange(5, dtype=torch.int32)), "divides"),
    wrong("slots", lambda a: dict(slots=a["slots"].expand(3, 3)), "dimension 0"),
    wrong("slots", lambda a: dict(slots=a["slots"][0]), "shape"),
    wrong("slots", lambda a: dict(slots=torch.tensor([0, 1, 5], dtype=torch.int32)), "5 for frame 2"),
    wrong("slots", lambda a: dict(slots=torch.tensor([-1, 1, 4], dtype=torch.int32)), "-1 for frame 0"),
    wrong("slots", lambda a: dict(slots=torch.tensor([1, 3, 1], dtype=torch.int32)), "slot 1 for frames 0 and 2"),
    wrong("slots", lambda a: dict(slots=torch.tensor([[0, 1, 2], [0, 1, 7]], dtype=torch.int32)), "7 for frame 2"),
    wrong("angles", lambda a: dict(angles=a["angles"].double()), "dtype float32"),
    wrong("angles", lambda a: dict(angles=a["angles"][0]), "3 dimensions"),
    wrong("angles", lambda a: dict(angles=a["angles"].expand(3, -1, -1)), "size 1 or 2"),
    wrong("angles", lambda a: dict(angles=a["angles"][..., :1]), "dimension 2"),
    wrong("angles", lambda a: dict(angles=a["angles"].transpose(1, 2).contiguous().transpose(1, 2)), "contiguous rows"),
    wrong("axes", lambda a: dict(angles=a["angles"][:, :-1]), "rows of axis 2"),
    wrong("axes", lambda a: dict(angles=None), "no axes"),
    wrong("axes", lambda a: dict(axes=[]), "1 to 8 axes"),
    wrong("axes", lambda a: dict(axes=a["axes"][:-1]), "8 integers"),
    wrong("axes", lambda a: dict(axes=[2, 6, 0, 2, 5, 18, 4, 5, 28]), "N = 24"),
    wrong("axes", lambda a: dict(axes=[3, 6, 0, 2, 5, 18, 4, 5, -1]), "rows of axis 2"),
    wrong("axes", lambda a: dict(axes=[3, -6, 0, 2, 5, 18, 4, 5, 28]), "pairs -6"),
    wrong("axes", lambda a: dict(axes=[3, 11, 0, 2, 5, 18, 4, 5, 28], angles=torch.zeros(1, 99, 2)), "21 pairs"),
    wrong("axes", lambda a: dict(axes=[2**30, 0, 0] * 3), "2^31"),
    wrong("q_weight", lambda a: dict(q_weight=a["q_weight"][:-1]), "[heads * D]"),
    wrong("q_weight", lambda a: dict(q_weight=a["q_weight"].view(4, 40)), "1 dimensions"),
    wrong("q_weight", lambda a: dict(q_weight=a["q_weight"].half()), "dtype"),
    wrong("k_weight", lambda a: dict(norm="head"), "size 40"),
    wrong("k_weight", lambda a: dict(k_weight=spread(a["k_weight"])), "stride 1"),
    wrong("norm", lambda a: dict(norm=None), "q_weight"),
    wrong("norm", lambda a: dict(norm="token"), "'model'"),
    wrong("layout", lambda a: dict(layout="interleaved"), "'adjacent'"),
    wrong("eps", lambda a: dict(eps=-1e-6), ">= 0"),
    wrong("eps", lambda a: dict(eps=float("nan")), "finite"),
    wrong("q", lambda a: dict(q=a["q"].clone().requires_grad_()), "does not require grad"),
    wrong("k_weight", lambda a: dict(k_weight=torch.nn.Parameter(a["k_weight"])), "does not require grad"),
]


@pytest.mark.parametrize("argument, change, match", WRONG)
def test_wrong_calls_change_nothing(argument, change, match):
    args, keywords = inputs(torch.float32)
    if argument == "k_weight" and match == "size 40":
        keywords["q_weight"] = keywords["q_weight"][:40].clone()
    call = dict(zip(NAMES, args, strict=True)) | keywords
    before = fingerprint(*args)
    with pytest.raises(rf.ArgumentError) as error:
        rf.rope_append(**call | change(call))
    text = str(error.value)
    assert text.startswith(f"rf_kernels.rope_append: argument `{argument}`: expected ") and ", found " in text, text
    assert match in text, text
    assert fingerprint(*args) == before


@pytest.mark.parametrize(
    "argument, change, match",
    [
        wrong("x", lambda a: dict(x=a["x"][0]), "4 dimensions"),
        wrong("x", lambda a: dict(x=spread(a["x"])), "stride 1"),
        wrong("x", lambda a: dict(x=a["x"].int()), "dtype"),
        wrong("weight", lambda a: dict(weight=a["weight"][:-1]), "size 160"),
        wrong("angles", lambda a: dict(angles=a["angles"].half()), "dtype float32"),
        wrong("axes", lambda a: dict(x=a["x"][:, :-1]), "N = 23"),
        wrong("norm", lambda a: dict(norm=None), "weight"),
        wrong("layout", lambda a: dict(layout=0), "'half'"),
    ],
)
def test_wrong_calls_of_rope(argument, change, match):
    args, keywords = inputs(torch.float32)
    call = dict(x=args[0], weight=keywords["q_weight"]) | {n: keywords[n] for n in ("angles", "axes", "norm")}
    with pytest.raises(rf.ArgumentError) as error:
        rf.rope(**call | change(call))
    assert str(error.value).startswith(f"rf_kernels.rope: argument `{argument}`: expected "), error.value
    assert match in str(error.value)


def test_parameters_are_welcome_without_grad_mode():
    args, keywords = inputs(torch.float32)
    keywords["q_weight"] = torch.nn.Parameter(keywords["q_weight"])
    with torch.no_grad():
        assert not rf.rope_append(*args, **keywords).requires_grad


# ---- gradients ------------------------------------------------------------------------------------------------------


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


# ---- registration, compilation --------------------------------------------------------------------------------------


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
    """Both ops in one graph, eager and compiled: results and caches must be the same bits, without a second compilation."""
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
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight), (x, weight))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.heavy
def test_compile_inductor():
    compiled("inductor")


# ---- what ran, what would run, what it costs ------------------------------------------------------------------------


def test_dispatch_is_recorded():
    args, keywords = inputs(torch.float32)
    rf.rope_append(*args, **keywords)
    assert rf.last_dispatch()[:3] == ("rope_append", "cpu", False)
    rf.rope(args[0], angles=None, axes=[])
    assert rf.last_dispatch()[:3] == ("rope", "cpu", False)


def test_supports():
    wan = dict(head_dim=128, pairs=(22, 21, 21))
    for dtype in DTYPES:
        assert rf.rope_append.supports(dtype=dtype, **wan)[0]
    cuda = rf.rope_append.supports(dtype=torch.bfloat16, device="cuda", **wan)
    if rf.build_info()["cuda_archs"]:
        assert cuda[0] and cuda[1].startswith("16-byte")
        slow = rf.rope.supports(dtype=torch.bfloat16, device="cuda", layout="axis_half", **wan)
        assert slow[0] and slow[1].startswith("scalar")
    else:
        assert cuda == (False, "this build has no CUDA part")
    for bad in (dict(dtype=torch.int32), dict(head_dim=64, pairs=(33,)), dict(layout="x"), dict(device="meta")):
        served, reason = rf.rope.supports(**dict(dtype=torch.float32) | bad)
        assert not served and reason


def test_cost():
    """Wan2.1-1.3B, one chunk: q, k, v in and out are six times 14.4 MB in bf16."""
    chunk = dict(batch=1, tokens=4680, head_dim=128, dtype=torch.bfloat16, pairs=(22, 21, 21))
    elements = 4680 * 12 * 128
    assert rf.rope_append.cost(q_heads=12, **chunk)["bytes"] == 6 * 2 * elements
    assert rf.rope_append.cost(q_heads=12, kv_heads=3, **chunk)["bytes"] == 2 * (2 * elements + elements)
    assert rf.rope.cost(heads=12, **chunk) == {"bytes": 2 * 2 * elements, "flops": 7 * elements}
    assert rf.rope.cost(heads=12, norm=False, **chunk)["flops"] == 3 * elements
