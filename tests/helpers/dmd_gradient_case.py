"""Calls of dmd_gradient for its tests: inputs, weights and masks of every shape, and the comparison with the
oracle."""

import dataclasses

import torch

import rf_kernels as rf
from rf_kernels.reference.dmd_gradient import dmd_gradient as oracle
from rf_kernels.testing import assert_within_eager

# 840 elements a sample: one tile with a tail, frames that are no multiple of a vector
SHAPE = (3, 4, 5, 6, 7)
OPTIONS = [field.name for field in dataclasses.fields(rf.DMDOptions)]
LONG = (2, 3, 4, 19, 23)  # 5,244: three tiles, the last one ragged


def made(shape, dtype=torch.float32, prediction=None, seed=0, flow=False):
    """Arguments with every tensor present, exactly representable in bfloat16 so that all dtypes see the same
    numbers."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda d: torch.randn(shape, generator=g).bfloat16().to(d)  # noqa: E731
    prediction = prediction or dtype
    kw = {name: draw(prediction) for name in ("fake", "real", "fake_uncond", "real_uncond")}
    kw |= {"fake_guidance": 1.5, "real_guidance": 3.0}
    x = draw(dtype)
    if flow:
        kw |= {"x_t": draw(prediction), "sigma": torch.rand(shape[:2], generator=g)}
    return x, kw


def as_oracle(kw, dtype=torch.float64):
    """The same arguments for the oracle in another dtype."""
    out = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kw.items()}
    out["limit"] = torch.finfo(kw["fake"].dtype).max
    return out


def _called(function, x, arguments):
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    return function(x, **arguments, options=rf.DMDOptions(**options))


def gradient_of(x, **arguments):
    """``rf.dmd_gradient``, the fields of its options among the arguments."""
    return _called(rf.dmd_gradient, x, arguments)


def loss_of(x, **arguments):
    return _called(rf.dmd_loss, x, arguments)


def weights(shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    b, rest = shape[0], len(shape) - 1
    return {
        "none": None,
        "sample": torch.rand(b, generator=g),
        "frame": torch.rand(shape[:2], generator=g),
        "element": torch.rand(shape, generator=g),
        "channels": torch.rand(b, shape[1], *(1,) * (rest - 3), *shape[-2:], generator=g).reshape(
            b, shape[1], 1, *shape[-2:]
        ),
        "columns": torch.rand(1, *(1,) * (rest - 1), shape[-1], generator=g),
        "strided": torch.rand(*shape[:-1], 2 * shape[-1], generator=g)[..., ::2],
    }


def masks(shape, seed=2):
    return {k: None if v is None else v > 0.5 for k, v in weights(shape, seed).items()}


def check(x, kw, **extra):
    """Every output within twice eager PyTorch's own error in the arithmetic type, plus one rounding to the
    dtype of x."""
    gradient, aux = gradient_of(x, **kw, **extra, return_aux=True)
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    extra = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in extra.items()}
    exact = oracle(x.double(), **as_oracle(kw), **extra)
    eager = oracle(x.to(arithmetic), **as_oracle(kw, arithmetic), **extra)
    assert gradient.dtype == x.dtype and gradient.shape == x.shape and not gradient.requires_grad
    assert_within_eager(gradient, exact.gradient, eager.gradient.to(x.dtype))
    for name in ("loss", "per_sample_loss", "gradient_norm", "normalizer"):
        value, want = getattr(aux, name), getattr(exact, name)
        assert value.dtype == arithmetic
        assert_within_eager(value, want, getattr(eager, name).to(arithmetic))
        if arithmetic == torch.float32:
            torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=0, equal_nan=True)
    assert aux.dropped.dtype == torch.int64 and int(aux.dropped) == int(exact.dropped)
    return gradient, aux


def registered(x, kw, **extra):
    """Positional arguments of the registered op."""
    names = "fake real fake_uncond real_uncond fake_guidance real_guidance x_t sigma weight mask".split()
    values = {"fake_guidance": 0.0, "real_guidance": 0.0} | kw | extra
    return (x, *(values.get(n) for n in names), True, 0.0, 0.0, 1, 0, x.dtype != torch.float16)
