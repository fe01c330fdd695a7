"""What a CUDA thread of dmd_gradient computes (csrc/dmd_gradient/kernel.h, straight.h), run on the host at
the vector widths of the GPU, tails included: gradients bit for bit those of the CPU backend. The sums across
threads are launch.cu's and not shown here."""

import ctypes

import pytest
import torch

import rf_kernels as rf
from helpers import host_lanes
from helpers.host_lanes import DTYPES, Guarded, integers, pointers
from rf_kernels.testing import assert_equal_bits

COMBINATIONS = [(t, t) for t in DTYPES] + [(t, torch.float32) for t in DTYPES if t != torch.float32]


@pytest.fixture(scope="session")
def lanes(tmp_path_factory):
    return host_lanes.build("dmd_gradient_lanes", tmp_path_factory.mktemp("lanes"))


@pytest.mark.parametrize("dtype, prediction", COMBINATIONS, ids=str)
@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
@pytest.mark.parametrize("elements, offset", [(4160, 0), (4160, 1), (2051, 0), (5, 0)], ids=str)
def test_body(lanes, dtype, prediction, flow, elements, offset):
    """Whole vectors, a shifted address, a tail after a full tile, a sample shorter than a vector."""
    generator = torch.Generator().manual_seed(elements)
    frames, shape = (5 if elements % 5 == 0 else 7), (3, elements)
    make = lambda kind: torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)  # noqa: E731
    x, *predictions = (Guarded(make(kind), offset=offset) for kind in (dtype, *[prediction] * 5))
    fake, real, fake_uncond, real_uncond, x_t = predictions
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = torch.rand(3, frames, generator=generator, dtype=torch.float64).to(acc)
    weight, mask = make(acc).abs(), torch.rand(shape, generator=generator) > 0.3
    full = (3, frames, elements // frames)
    options = dict(fake_uncond=fake_uncond, real_uncond=real_uncond, **({"x_t": x_t} if flow else {}))
    views = {name: g.view.reshape(full) for name, g in dict(fake=fake, real=real, **options).items()}
    if flow:
        views |= dict(sigma=sigma)
    expected, aux = rf.dmd_gradient(
        x.view.reshape(full),
        **views,
        fake_guidance=0.5,
        real_guidance=3.0,
        weight=weight.reshape(full),
        mask=mask.reshape(full),
        return_aux=True,
    )

    gradient = Guarded(torch.zeros(shape, dtype=dtype), offset=offset)
    seen = torch.zeros(3, 5, dtype=torch.float64)  # the last two columns are integers
    tensors = [x, fake, real, fake_uncond, real_uncond, x_t if flow else None]
    tensors = [g and g.view for g in tensors] + [sigma, weight, mask, gradient.view, aux.normalizer, seen]
    values = (ctypes.c_double * 3)(0.5, 3.0, 1 / mask.sum().item())
    sizes = [DTYPES.index(dtype), prediction == torch.float32 and dtype != torch.float32, *shape, frames]
    width = 16 // min(dtype.itemsize, prediction.itemsize)
    wide = elements % width == 0 and offset == 0
    assert lanes(integers(sizes), pointers(tensors), values) == (width if wide else 1)
    gradient.check()
    assert_equal_bits(gradient.view.reshape(full), expected)
    assert seen.view(torch.int64)[:, 4].tolist() == mask.sum(1).tolist()
    # There a tree of 11 roundings and one to the result; here one after the other in float64, an error of its
    # own in float64.
    bound = dict(rtol=12 * torch.finfo(acc).eps + elements * torch.finfo(torch.float64).eps, atol=0)
    torch.testing.assert_close((seen[:, 0] / elements).to(acc), aux.normalizer, **bound)
    torch.testing.assert_close((seen[:, 2] / elements).to(acc), aux.gradient_norm, **bound)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("elements", [4160, 64])
def test_straight_path(lanes, dtype, elements):
    """The usual call: bit for bit the gradient of the CPU backend, every byte moved once."""
    generator, shape = torch.Generator().manual_seed(elements), (3, elements)
    inputs = [Guarded(torch.randn(shape, generator=generator).to(dtype)) for _ in range(4)]
    x, fake, real, uncond = (g.view for g in inputs)
    fake[0, :8] = real[0, :8] = uncond[0, :8] = 0.0  # differences that are zero, of both signs
    fake[0, :4] = -0.0
    weight = torch.rand(3, generator=generator)
    options = dict(fake=fake, real=real, real_uncond=uncond, real_guidance=3.0)
    expected, aux = rf.dmd_gradient(x, **options, weight=weight, return_aux=True)

    gradient, seen = Guarded(torch.zeros(shape, dtype=dtype)), torch.zeros(3, 5, dtype=torch.float64)
    tensors = [x, fake, real, uncond, weight, gradient.view, aux.normalizer, seen]

    def run():
        values = (ctypes.c_double * 2)(3.0, 1 / x.numel())
        seen.zero_()
        sizes = integers([DTYPES.index(dtype), *shape])
        assert lanes.library.dmd_gradient_straight(sizes, pointers(tensors), values) == 16 // dtype.itemsize
        return from_bits(seen.view(torch.int64)[:, 3])

    lanes.moved_bytes()
    peak = run()
    assert lanes.moved_bytes() == 5 * x.numel() * dtype.itemsize
    gradient.check()
    assert_equal_bits(gradient.view, expected)
    difference = fake.float() - (real.float() + 3 * (real.float() - uncond.float()))
    assert peak.tolist() == difference.abs().amax(1).tolist()
    eps = torch.finfo(torch.float32).eps
    bound = dict(rtol=12 * eps + elements * torch.finfo(torch.float64).eps, atol=0)
    torch.testing.assert_close((seen[:, 0] / elements).float(), aux.normalizer, **bound)
    torch.testing.assert_close((seen[:, 2] / elements).float(), aux.gradient_norm, **bound)
    torch.testing.assert_close((seen[:, 1] / (2 * x.numel())).float(), aux.per_sample_loss, **bound)

    fake[0, 9], real[1, -1], weight[2] = torch.inf, torch.nan, torch.nan  # each silences its sample
    assert not run().isfinite().any()


def from_bits(integers):
    return integers.to(torch.int32).view(torch.float32)


def test_division_is_the_exact_one(lanes):
    """Quotients of any finite floats by a divisor, ties of subnormal ones included, are those of a
    division."""
    generator = torch.Generator().manual_seed(0)
    random = from_bits(torch.randint(-(2**31), 2**31, (20_000,), generator=generator))
    small = torch.arange(-2000, 2000) * 2.0**-149
    divisors = [1.0, 3.0, 6.0, 49.0, 98.0, 2.0**-126, 3 * 2.0**-149, 2.0**127, 1 / 3, 0.7978846, 1.9999999]
    divisors += from_bits(torch.randint(1, 0x7F800000, (60,), generator=generator)).tolist()
    for divisor in torch.tensor(divisors).tolist():
        near = (
            torch.arange(1, 300, dtype=torch.float64) * 0.5 * divisor * 2.0**-149
        )  # quotients that are ties
        values = torch.cat([random[random.isfinite()], small, near.float(), torch.tensor([0.0, -0.0])])
        out = torch.empty_like(values)
        place = [ctypes.c_void_p(t.data_ptr()) for t in (values, out)]
        lanes.library.dmd_gradient_divide(
            ctypes.c_int64(len(values)), place[0], ctypes.c_float(divisor), place[1]
        )
        assert_equal_bits(out, values / torch.tensor(divisor))


def test_only_the_usual_call_takes_the_straight_path(lanes):
    assert [bool(lanes.library.dmd_gradient_usual(departure)) for departure in range(13)] == [True] + [
        False
    ] * 12
