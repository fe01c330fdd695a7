"""Checks of the registered operators that no public function lets through: its own checks come first, or it
makes the argument itself. With the catalogue of tests/helpers/refusals.py every refusal of csrc/*/op.cpp has
a call, but for those between devices."""

import sys

import pytest
import torch

import rf_kernels as rf
from helpers import refusals
from helpers.refusals import refused
from rf_kernels._backend import invoke as invoke_checked
from rf_kernels._backend import ops
from rf_kernels.testing import fingerprint


def arguments_of(function, monkeypatch) -> dict:
    """What a right call of a public function hands to its operator, by name."""
    calls = []

    def record(op, *args):
        calls.append((op, args))
        return invoke_checked(op, *args)

    module = (
        "dmd_gradient"
        if function == "dmd_gradient"
        else "rope_append"
        if function.startswith("rope")
        else function
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"rf_kernels.ops.{module}"], "invoke", record)
        getattr(rf, function)(**getattr(refusals.World(), function))
    op, args = calls[-1]
    names = [argument.name for argument in getattr(op, "default", op)._schema.arguments]
    return dict(zip(names, args, strict=False))


def backward_arguments(monkeypatch) -> dict:
    forward = arguments_of("sink_window_attention", monkeypatch)
    forward.pop("deterministic", None)
    out, lse = ops.sink_window_attention(**forward)
    q, k, v, *options = forward.values()
    names = [argument.name for argument in ops.sink_window_attention_backward.default._schema.arguments]
    return dict(zip(names, (torch.ones_like(out), q, k, v, out, lse, *options), strict=True))


def repeated(dim):
    return lambda t: t.repeat(*(2 if d == dim else 1 for d in range(t.dim())))


def to(value):
    return lambda _: value


def huge(*shape):
    """No element, and sizes beyond 32 bits."""
    return lambda t: torch.empty(0, *shape, dtype=t.dtype)


def overflowing(t):
    """No element, and a last dimension times heads of 2^64: 0 in 64 bits."""
    return torch.empty(0, dtype=t.dtype).as_strided((0, 4, 2**32, 2**32), (2**33, 2**33, 2**32, 1))


LIKE_QUERY = {
    "one dimension less": lambda t: t[0],
    "float64": torch.Tensor.double,
    **{f"twice in dimension {d}": repeated(d) for d in range(4)},
}
#: Operator, the argument that the error names, what is wrong, and what to change.
CALLS = [
    *(("rope_append", "norm", x, {"norm": to(x)}) for x in (-1, 3)),
    *(("rope_append", "layout", x, {"layout": to(x)}) for x in (-1, 3)),
    *(("rope", "norm", x, {"norm": to(x)}) for x in (-1, 3)),
    *(("rope", "layout", x, {"layout": to(x)}) for x in (-1, 3)),
    ("rope_append", "q", "2^31 tokens", {"q": huge(2**31, 4, 8)}),
    ("rope_append", "q", "2^31 elements a token", {"q": huge(4, 65536, 32768)}),
    ("rope_append", "q", "2^64 elements a token", {"q": overflowing}),
    *(("ema_evict", "state", x, {"state": to(x)}) for x in (-1, 3)),
    ("ema_evict", "k_state", "another batch", {"k_state": repeated(0)}),
    ("ema_evict", "v_state", "another head_dim", {"v_state": repeated(3)}),
    (
        "ema_evict",
        "k_cache",
        "2^31 elements a token",
        {name: huge(4, 65536, 32768) for name in ("k_cache", "v_cache")},
    ),
    ("ema_evict", "k_cache", "2^64 elements a token", {name: overflowing for name in ("k_cache", "v_cache")}),
    ("dmd_gradient", "x_t", "sigma alone", {"x_t": to(None)}),
    ("dmd_gradient", "sigma", "x_t alone", {"sigma": to(None)}),
    ("dmd_gradient", "reduction", "max", {"reduction": to("max")}),
    ("dmd_gradient", "nan", "ignore", {"nan": to("ignore")}),
    *(
        ("sink_window_attention_backward", name, what, {name: change})
        for name in ("grad_out", "out")
        for what, change in LIKE_QUERY.items()
    ),
    *(
        ("sink_window_attention_backward", "lse", f"twice in dimension {d}", {"lse": repeated(d)})
        for d in range(3)
    ),
    ("sink_window_attention_backward", "lse", "one dimension less", {"lse": lambda t: t[0]}),
    ("sink_window_attention_backward", "lse", "float64", {"lse": torch.Tensor.double}),
]


@pytest.mark.parametrize(
    "name, argument, what, change", CALLS, ids=lambda x: None if isinstance(x, dict) else str(x)
)
def test_wrong_calls_of_operators(name, argument, what, change, monkeypatch):
    backward = name == "sink_window_attention_backward"
    arguments = backward_arguments(monkeypatch) if backward else arguments_of(name, monkeypatch)
    operator = getattr(ops, name).default
    invoke_checked(operator, *arguments.values())
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    before = fingerprint(*tensors)
    wrong = arguments | {n: edit(arguments[n]) for n, edit in change.items()}
    refused(lambda: invoke_checked(operator, *wrong.values()), argument)
    assert fingerprint(*tensors) == before
