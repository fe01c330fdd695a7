"""What a CUDA thread of dmd_gradient computes (csrc/dmd_gradient/kernel.h), run on the host at the vector
widths of the GPU, tails included: gradients bit for bit those of the CPU backend. The sums across threads are
launch.cu's and not shown here."""

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
