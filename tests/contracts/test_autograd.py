"""What is not differentiable says so, and what autograd has saved is not changed behind its back."""

import contextlib
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwAD

import rf_kernels as rf
from helpers.refusals import World
from rf_kernels.testing import assert_equal_bits

#: What each mutating op writes.
WRITTEN = {
    "rope_append": ("k_cache", "v_cache"),
    "ema_evict": ("k_cache", "v_cache", "k_state", "k_state_lo", "v_state", "skipped"),
}
SIZES = {"layers": 1, "batch": 1, "heads": 1, "head_dim": 2, "grid": (2,)}
FRAMES = {"sink_frames": 1, "window_frames": 2}
MUTATED = [(op, name) for op, names in WRITTEN.items() for name in names]
DIFFERENTIABLE = {"rope": ("x", "weight"), "sink_window_attention": ("q", "k", "v"), "dmd_loss": ("x",)}
CONSTANT = {
    "rope_append": ("q", "k", "v", "k_cache", "v_cache", "angles", "q_weight", "k_weight"),
    "ema_evict": ("k_cache", "v_cache", "k_state", "k_state_lo", "v_state", "turns", "alpha"),
    "rope": ("angles",),
}
FLOATING = {
    **{op: (*DIFFERENTIABLE.get(op, ()), *CONSTANT.get(op, ())) for op in {**DIFFERENTIABLE, **CONSTANT}},
    "dmd_loss": ("x",),  # the others are constants by definition
    "dmd_gradient": ("x", "fake", "real"),
}


def named(table):
    return [pytest.param(op, name, id=f"{op}-{name}") for op, names in table.items() for name in names]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", WRITTEN)
def test_a_write_is_a_new_version(op, compiled):
    """Of everything that the schema says is written, and of nothing else."""
    arguments = getattr(World(), op)
    function = getattr(rf, op)

    def call(tensors, rest):
        return function(**tensors, **rest)

    tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    rest = {name: value for name, value in arguments.items() if name not in tensors}
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    before = {name: t._version for name, t in tensors.items()}
    call(tensors, rest)
    assert {name for name, t in tensors.items() if t._version > before[name]} == set(WRITTEN[op])


@pytest.mark.parametrize("op, name", MUTATED)
def test_a_backward_after_the_write_raises(op, name):
    arguments = getattr(World(), op)
    if not arguments[name].is_floating_point():
        pytest.skip("nothing differentiable can save it")
    leaf = torch.ones_like(arguments[name], requires_grad=True)
    loss = (leaf * arguments[name]).sum()
    getattr(rf, op)(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", WRITTEN)
def test_inference_tensors_are_written(op):
    with torch.inference_mode():
        arguments = getattr(World(), op)
        getattr(rf, op)(**arguments)
    getattr(rf, op)(**arguments)  # and later, outside


@pytest.mark.parametrize("op, name", named(CONSTANT))
def test_a_gradient_that_would_be_lost_is_refused(op, name):
    arguments = getattr(World(), op)
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(
        rf.ArgumentError, match=f"rf_kernels.{op}: argument `{name}`: .*does not require grad"
    ):
        getattr(rf, op)(**arguments)
    assert not any(isinstance(t, torch.Tensor) and t.requires_grad for n, t in arguments.items() if n != name)
    with torch.no_grad():
        getattr(rf, op)(**arguments)


@pytest.mark.parametrize("op, name", named(FLOATING))
def test_forward_mode_raises(op, name):
    arguments = getattr(World(), op)
    with fwAD.dual_level():
        arguments[name] = fwAD.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match=f"{op.replace('loss', 'gradient')}: forward-mode AD"):
            getattr(rf, op)(**arguments)


@pytest.mark.parametrize("op, name", named(FLOATING))
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp"])
def test_torch_func_says_that_it_is_not_implemented(transform, op, name):
    arguments = getattr(World(), op)
    value = arguments.pop(name)

    def call(t):
        result = getattr(rf, op)(**arguments, **{name: t})
        return (result if isinstance(result, torch.Tensor) else t).sum()

    run = {
        "grad": lambda: torch.func.grad(call)(value),
        "vjp": lambda: torch.func.vjp(call, value),
        "jvp": lambda: torch.func.jvp(call, (value,), (torch.ones_like(value),)),
    }[transform]
    expected = f"rf_kernels.{op.replace('loss', 'gradient')}: .*(not implemented|does not require grad)"
    with pytest.raises((NotImplementedError, rf.ArgumentError), match=expected):
        run()


@pytest.mark.parametrize("method", ["open", "attend", "append"])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap"])
@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("rows", [False, True])
def test_a_cache_inside_torch_func_says_that_it_is_not_implemented(transform, method, chunks, rows):
    """In the first forward of a layer and when something is to be evicted, with nothing written."""
    spec = rf.CacheSpec(**SIZES, **FRAMES, rope=None, dtype=torch.float64, device="cpu")
    kind, x = rf.SinkWindowRows if rows else rf.SinkWindowCache, torch.randn(1, 2, 1, 2).double()
    cache = kind(spec, sink=rf.EMASink())
    for _ in range(chunks):
        with cache.chunk(frames=1) as chunk:
            chunk.append(0, x, x, x)
    before, chunk = cache.k.clone(), None if method == "open" else cache.chunk(frames=1)

    def call(t):
        with cache.chunk(frames=1) if chunk is None else contextlib.nullcontext(chunk) as now:
            return getattr(now, "append" if method == "append" else "attend")(0, t, x, x).sum()

    run = {
        "grad": lambda: torch.func.grad(call)(x),
        "vjp": lambda: torch.func.vjp(call, x),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
        "vmap": lambda: torch.func.vmap(call)(x[None]),
    }[transform]
    owner = "SinkWindowCache" if method == "open" else "ChunkBatch" if rows else "Chunk"
    with pytest.raises(NotImplementedError, match=rf"rf_kernels.{owner}.{method}: torch.func's"):
        run()
    assert_equal_bits(cache.k, before)
    assert chunk is None or not any(c.written for c in getattr(chunk, "chunks", (chunk,)))


@pytest.mark.parametrize("op, name", named(DIFFERENTIABLE))
def test_second_derivatives_are_right_or_refused(op, name):
    """Beside another term too, where a second derivative of 0 would go unnoticed. `rope` has them: tests/ops
    hold their values."""
    arguments = getattr(World(), op)
    leaf = arguments[name] = arguments[name].clone().requires_grad_()
    loss = getattr(rf, op)(**arguments).square().sum() + (leaf**3).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    if op == "rope":
        (second,) = torch.autograd.grad(grad.sum(), leaf)
        assert not torch.equal(second, 6 * leaf)
    else:
        with pytest.raises(NotImplementedError, match="no double backward"):
            torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("op, name", named(DIFFERENTIABLE))
def test_a_call_without_gradient_has_no_python_kernel(op, name, needed):
    """It would cost a small call more than all else. Under grad it is there, and so is the gradient."""
    arguments = getattr(World(), op)
    arguments[name] = arguments[name].clone().requires_grad_(needed)
    entered = set()

    def note(frame, event, _):
        if event == "call":
            entered.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        result = getattr(rf, op)(**arguments)
    finally:
        sys.setprofile(None)
    assert result.requires_grad is needed and ("autograd_impl" in entered) is needed
    with torch.no_grad():
        assert_equal_bits(getattr(rf, op)(**arguments), result.detach())
