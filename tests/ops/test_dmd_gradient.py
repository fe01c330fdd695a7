"""dmd_gradient, dmd_loss, reward_weight: oracle against autograd, op against oracle, every option, every
rule."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import rf_kernels as rf
from helpers.dmd_gradient_case import (
    LONG,
    SHAPE,
    as_oracle,
    check,
    gradient_of,
    loss_of,
    made,
    masks,
    registered,
    weights,
)
from helpers.golden_cases import parametrize
from rf_kernels.reference.dmd_gradient import dmd_gradient as oracle
from rf_kernels.reference.dmd_gradient import expand, surrogate_loss
from rf_kernels.testing import assert_equal_bits, relative_l2

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(d, d) for d in DTYPES] + [
    (d, torch.float32) for d in (torch.float64, torch.bfloat16, torch.float16)
]


# ---- the oracle against formulas of its own ----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flow", [False, True])
def test_oracle_is_the_gradient_of_the_published_loss(flow, reduction):
    """Autograd through 0.5 mse(x, stop(x - d)), written as the publications write it."""
    x, kw = made(SHAPE, torch.float64, flow=flow)
    weight, mask = torch.rand(SHAPE[0], dtype=torch.float64), torch.rand(SHAPE) > 0.4
    got = oracle(x, **as_oracle(kw), weight=weight, mask=mask, reduction=reduction)

    x = x.requires_grad_()
    fake = kw["fake"] + (kw["fake"] - kw["fake_uncond"]) * 1.5
    real = kw["real"] + (kw["real"] - kw["real_uncond"]) * 3.0
    if flow:
        sigma = kw["sigma"].double()[:, :, None, None, None]
        fake, real = kw["x_t"] - sigma * fake, kw["x_t"] - sigma * real
    d = (fake - real) / (x.detach() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    squared = F.mse_loss(x, (x - d).detach(), reduction="none") * weight[:, None, None, None, None]
    loss = 0.5 * getattr(squared[mask], reduction)()
    loss.backward()
    torch.testing.assert_close(got.gradient, x.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.per_sample_loss.sum(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.gradient_norm, d.abs().mean(dim=(1, 2, 3, 4)), rtol=1e-12, atol=0)


def test_surrogate_is_what_finite_differences_see():
    """The gradient is that of the surrogate with its target held fixed (the loss itself moves with its own
    normaliser)."""
    x, kw = made((2, 3, 4), torch.float64)
    weight, mask = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, 4) > 0.3
    d = oracle(x, **as_oracle(kw), reduction="none").gradient
    fixed = dict(target=x - d, weight=weight, mask=mask)
    assert torch.autograd.gradcheck(lambda t: surrogate_loss(t, **fixed), (x.clone().requires_grad_(),))
    y = x.clone().requires_grad_()
    loss_of(y, **kw, weight=weight, mask=mask).backward()
    (expected,) = torch.autograd.grad(surrogate_loss(z := x.clone().requires_grad_(), **fixed), z)
    torch.testing.assert_close(y.grad, expected, rtol=1e-12, atol=1e-15)


# ---- the op against the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=str)
@pytest.mark.parametrize("flow", [False, True], ids=["x0", "flow"])
@pytest.mark.parametrize("dtype, prediction", PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_op_against_oracle(dtype, prediction, flow, shape):
    x, kw = made(shape, dtype, prediction, flow=flow)
    check(x, kw)
    check(x, kw, weight=weights(shape)["frame"], mask=masks(shape)["element"], eps=1e-3)


@pytest.mark.parametrize("weight", weights(SHAPE))
@pytest.mark.parametrize("mask", masks(SHAPE))
def test_weights_and_masks_crossed(weight, mask):
    x, kw = made(SHAPE)
    check(x, kw, weight=weights(SHAPE)[weight], mask=masks(SHAPE)[mask])


def test_options_crossed():
    for normalize, (eps, floor), reduction, flow, fake_uncond, real_uncond, nan in itertools.product(
        [True, False],
        [(0.0, 0.0), (0.5, 0.0), (0.25, 1.5)],
        ["mean", "sum", "none"],
        [True, False],
        [True, False],
        [True, False],
        ["sample", "published", "raise"],
    ):
        x, kw = made((2, 3, 4, 5), flow=flow)
        for used, which in ((fake_uncond, "fake"), (real_uncond, "real")):
            if not used:
                del kw[f"{which}_uncond"], kw[f"{which}_guidance"]
        check(
            x,
            kw,
            normalize=normalize,
            eps=eps,
            floor=floor,
            reduction=reduction,
            nan=nan,
            mask=masks((2, 3, 4, 5))["frame"],
        )


@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (5,),
        (2, 1),
        (2, 3),
        (1, 1, 1, 1, 1),
        (3, 2047),
        (2, 2048),
        (2, 2049),
        (1, 63),
        (4, 65),
        (2, 3, 1, 5, 1, 7),
    ],
    ids=str,
)
def test_odd_sizes(shape):
    for dtype in DTYPES:
        x, kw = made(shape, dtype)
        g = torch.Generator().manual_seed(3)
        check(x, kw, weight=torch.rand(shape, generator=g), mask=torch.rand(shape, generator=g) > 0.3)


def test_not_contiguous_and_unaligned():
    x, kw = made((2, 3, 4, 5, 6))
    want = gradient_of(x, **kw)
    permuted = {
        k: v.transpose(1, 2).contiguous().transpose(1, 2) if torch.is_tensor(v) else v for k, v in kw.items()
    }
    assert_equal_bits(gradient_of(x.transpose(1, 3).contiguous().transpose(1, 3), **permuted), want)
    shifted = torch.zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert_equal_bits(gradient_of(shifted, **kw), want)


@pytest.mark.parametrize("guidance, fake_scale, real_scale", [("dmd2", 2.5, 4.0), ("self_forcing", 1.5, 3.0)])
def test_guidance_conventions(guidance, fake_scale, real_scale):
    x, kw = made(SHAPE, torch.float64)
    kw |= {"fake_guidance": fake_scale, "real_guidance": real_scale}
    if guidance == "dmd2":
        fake = kw["fake_uncond"] + fake_scale * (kw["fake"] - kw["fake_uncond"])
        real = kw["real_uncond"] + real_scale * (kw["real"] - kw["real_uncond"])
    else:
        fake = kw["fake"] + fake_scale * (kw["fake"] - kw["fake_uncond"])
        real = kw["real"] + real_scale * (kw["real"] - kw["real_uncond"])
    want = oracle(x, fake=fake, real=real).gradient
    torch.testing.assert_close(gradient_of(x, **kw, guidance=guidance), want, rtol=1e-12, atol=1e-15)


def test_unguided_predictions_are_not_read():
    """At coefficient 0 of either convention the unconditional prediction may hold anything."""
    x, kw = made(SHAPE)
    want = gradient_of(x, fake=kw["fake"], real=kw["real"])
    for guidance, none in (("self_forcing", 0.0), ("dmd2", 1.0)):
        garbage = torch.full_like(x, float("nan"))
        got = gradient_of(
            x,
            fake=kw["fake"],
            real=kw["real"],
            fake_uncond=garbage,
            real_uncond=garbage,
            fake_guidance=none,
            real_guidance=none,
            guidance=guidance,
        )
        assert_equal_bits(got, want)
    x_unread = torch.full_like(x, float("nan"))
    got = gradient_of(x_unread, fake=kw["fake"], real=kw["real"], normalize=False)
    assert_equal_bits(got, gradient_of(x, fake=kw["fake"], real=kw["real"], normalize=False))


def test_float32_sums_agree_with_float64():
    """The model's own shape; terms of very different size in one sample."""
    g = torch.Generator().manual_seed(5)
    shape = (1, 21, 16, 60, 104)
    x, fake, real = (
        torch.randn(shape, generator=g) * 10 ** torch.empty(shape).uniform_(-3, 3) for _ in range(3)
    )
    aux = gradient_of(x, fake=fake, real=real, return_aux=True)[1]
    exact = oracle(x.double(), fake=fake.double(), real=real.double())
    for name in ("loss", "per_sample_loss", "gradient_norm", "normalizer"):
        torch.testing.assert_close(getattr(aux, name).double(), getattr(exact, name), rtol=1e-6, atol=0)


def test_reward_weight():
    r = torch.tensor([0.5, -1.0])
    torch.testing.assert_close(rf.reward_weight(r, beta=2.0), torch.exp(2 * r))
    assert rf.reward_weight(r.bfloat16(), 2.0).dtype == torch.float32
    assert rf.reward_weight(r.double(), 2.0).dtype == torch.float64
    assert not rf.reward_weight(r.requires_grad_(), 2.0).requires_grad
    with pytest.raises(rf.ArgumentError, match="beta"):
        rf.reward_weight(r, float("inf"))
    with pytest.raises(rf.ArgumentError, match="floating"):
        rf.reward_weight(torch.tensor([1]), 1.0)


# ---- NaN policies, zero normaliser, empty masks ------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    "where", ["fake", "real", "fake_uncond", "real_uncond", "x_t", "sigma", "weight", "x"]
)
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_sample_policy(where, bad):
    """The sample with one bad element gets gradient 0 and is counted; the others keep every bit."""
    x, kw = made(SHAPE, flow=where in ("x_t", "sigma"))
    kw["weight"] = weights(SHAPE)["element"]
    clean, clean_aux = gradient_of(x, **kw, return_aux=True)
    (x if where == "x" else kw[where]).view(SHAPE[0], -1)[1, -1] = bad
    for reduction in ("mean", "none"):
        got, aux = gradient_of(x, **kw, reduction=reduction, return_aux=True)
        assert int(aux.dropped) == 1 and not got[1].any()
        assert aux.per_sample_loss[1] == 0 and aux.gradient_norm[1] == 0
        assert aux.loss.isfinite()
        if reduction == "mean":  # N does not change either
            assert_equal_bits(got[[0, 2]], clean[[0, 2]])
            assert_equal_bits(aux.gradient_norm[[0, 2]], clean_aux.gradient_norm[[0, 2]])
    with pytest.raises(rf.ArgumentError, match="1 of 3 samples"):
        gradient_of(x, **kw, nan="raise")
    check(x, {k: v for k, v in kw.items() if k != "weight"}, weight=kw["weight"])


def test_overflow_of_finite_predictions_is_a_drop():
    x, kw = made(SHAPE)
    kw["real"][0, 0, 0, 0, 0] = 3e38  # guided: beyond float32
    kw["real_uncond"][0, 0, 0, 0, 0] = -3e38
    _, aux = gradient_of(x, **kw, return_aux=True)
    assert int(aux.dropped) == 1
    half = {
        k: v.half()
        for k, v in dict(x=torch.full((1, 8), 1e-7), fake=torch.ones(1, 8), real=torch.zeros(1, 8)).items()
    }
    _, aux = gradient_of(half["x"], fake=half["fake"], real=half["real"], return_aux=True)
    assert int(aux.dropped) == 1  # d = 1e7 is no float16


@pytest.mark.parametrize("dtype, prediction", PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_published_policy_is_element_wise(dtype, prediction):
    """NaN -> 0 and +-inf -> the largest finite number of the predictions' dtype; the rest of the sample is
    untouched."""
    x, kw = made((2, 3, 40), dtype, prediction)
    clean, _ = gradient_of(x, **kw, reduction="none", return_aux=True)
    for i, bad in enumerate(BAD):
        kw["fake"][0, 0, i] = bad
    got, aux = gradient_of(x, **kw, nan="published", reduction="none", return_aux=True)
    assert int(aux.dropped) == 0
    # inf where x is narrower
    largest = torch.tensor(torch.finfo(prediction).max, dtype=torch.float64).to(dtype)
    assert got[0, 0, 0] == 0
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[0, 0, :3] = False
    assert_equal_bits(got[keep], clean[keep])
    guided_sign = 1.0  # fake + 1.5 (fake - u): infinite of the same sign
    assert got[0, 0, 1] == guided_sign * largest and got[0, 0, 2] == -guided_sign * largest
    kw["real"][0, 0, 0] = float("nan")  # in the normaliser: the whole sample's gradient is NaN -> 0
    got = gradient_of(x, **kw, nan="published", reduction="none")
    assert not got[0].any()
    assert_equal_bits(got[1], clean[1])


def test_zero_normaliser():
    """x = real in every element of sample 1: d = 0 by default, the published overflow on request, eps when
    given."""
    x, kw = made(SHAPE)
    kw = {"fake": kw["fake"], "real": kw["real"]}
    x[1] = kw["real"][1]
    got, aux = check(x, kw)
    assert not got[1].any() and int(aux.dropped) == 0 and aux.normalizer[1] == 0
    check(x, kw, eps=1e-2)
    raised, aux = check(x, kw, floor=1e-2)
    assert aux.normalizer[1] == torch.tensor(1e-2) and torch.equal(raised[0], got[0])
    got = gradient_of(x, **kw, nan="published", reduction="none")
    sign = (kw["fake"][1] - kw["real"][1]).sign()
    assert torch.equal(got[1], sign * torch.finfo(torch.float32).max)
    kw["fake"][1, 0] = kw["real"][1, 0]  # 0 / 0
    assert not gradient_of(x, **kw, nan="published", reduction="none")[1, 0].any()
    kw["fake"][1, 0, 0, 0, 0] = float("nan")  # not finite beats zero
    assert int(gradient_of(x, **kw, return_aux=True)[1].dropped) == 1


def test_masked_values_are_not_seen():
    """What the mask leaves out enters neither gradient nor loss, whatever the published rule makes of it."""
    x, kw = made(SHAPE)
    mask = masks(SHAPE)["element"]
    want, want_aux = gradient_of(x, **kw, mask=mask, nan="published", return_aux=True)
    kw["fake"] = torch.where(mask, kw["fake"], torch.full_like(x, float("inf")))
    got, aux = gradient_of(x, **kw, mask=mask, nan="published", return_aux=True)
    assert_equal_bits(got, want)
    assert_equal_bits(aux.loss, want_aux.loss)


@pytest.mark.parametrize("nan", ["sample", "published"])
def test_empty_masks(nan):
    x, kw = made(SHAPE)
    y = x.clone().requires_grad_()
    for mask in (torch.zeros(SHAPE[0], dtype=torch.bool), torch.zeros(SHAPE, dtype=torch.bool)):
        got, aux = gradient_of(x, **kw, mask=mask, nan=nan, return_aux=True)
        assert not got.any() and aux.loss == 0 and not aux.per_sample_loss.any() and aux.gradient_norm.all()
        loss_of(y, **kw, mask=mask, nan=nan).backward()
        assert not y.grad.any()
    one = torch.zeros(SHAPE[0], dtype=torch.bool)
    one[2] = True
    check(x, kw, mask=one)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0), (2, 3, 0, 5)], ids=str)
def test_no_elements(shape):
    x = torch.zeros(shape)
    got, aux = gradient_of(x, fake=x, real=x, return_aux=True)
    assert got.shape == x.shape and aux.loss == 0 and aux.dropped == 0
    for t in (aux.per_sample_loss, aux.gradient_norm):
        assert t.shape == shape[:1] and not t.any()


# ---- determinism and independence --------------------------------------------------------------------------


def test_neighbours_leave_no_bit():
    """Alone, at any place of a batch, beside NaN: the same bits for reduction="none" and the norms."""
    x, kw = made((4, 5244 // 4))
    kw["weight"] = torch.rand(4, generator=torch.Generator().manual_seed(1))
    got, aux = gradient_of(x, **kw, reduction="none", return_aux=True)
    order = [2, 0, 3, 1]
    for name, index in {"permuted": order, "alone": [2], "pair": [3, 2]}.items():
        taken = {k: v[index] if torch.is_tensor(v) else v for k, v in kw.items()}
        if name == "pair":
            taken["fake"][0] = float("nan")
        part, part_aux = gradient_of(x[index], **taken, reduction="none", return_aux=True)
        for i, b in enumerate(index):
            if name == "pair" and i == 0:
                continue
            assert_equal_bits(part[i], got[b])
            for field in ("per_sample_loss", "gradient_norm", "normalizer"):
                assert_equal_bits(getattr(part_aux, field)[i], getattr(aux, field)[b])


def test_threads_change_no_bit(threads):
    shape = (3, 7, 4, 33, 35)
    x, kw = made(shape)
    kw |= {"weight": weights(shape)["channels"], "mask": masks(shape)["frame"]}
    results = []
    for count in (1, 2, 5, 8, 2):
        threads(count)
        gradient, aux = gradient_of(x, **kw, return_aux=True)
        results.append((gradient, *aux))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_equal_bits(a, b)


# ---- autograd, compile, registration -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_backward(dtype, reduction):
    x, kw = made(SHAPE, dtype)
    kw |= {"weight": weights(SHAPE)["sample"], "mask": masks(SHAPE)["frame"], "reduction": reduction}
    gradient, aux = gradient_of(x, **kw, return_aux=True)
    y = x.clone().requires_grad_()
    loss, loss_aux = loss_of(y, **kw, return_aux=True)
    assert_equal_bits(loss, aux.loss)
    for a, b in zip(loss_aux, aux, strict=True):
        assert not a.requires_grad
        assert_equal_bits(a, b)
    loss.backward()
    if dtype == torch.float16 and reduction == "mean":
        torch.testing.assert_close(y.grad, gradient, rtol=2e-3, atol=6e-8)
    else:
        assert_equal_bits(y.grad, gradient)
    for factor in (0.5, 3.0):
        (scaled,) = torch.autograd.grad(loss_of(y, **kw) * factor, y)
        torch.testing.assert_close(scaled, gradient * factor, rtol=2e-3, atol=6e-8)


def test_backward_twice_through_a_kept_graph():
    """What a first backward hands out is the caller's to change."""
    x, kw = made(SHAPE)
    y = x.clone().requires_grad_()
    loss = loss_of(y, **kw)
    loss.backward(retain_graph=True)
    first = y.grad.clone()
    y.grad.mul_(3.0)
    y.grad = None
    loss.backward(retain_graph=True)
    assert_equal_bits(y.grad, first)
    loss.backward()  # accumulates
    torch.testing.assert_close(y.grad, 2 * first, rtol=0, atol=0)


def test_float16_gradients_survive_loss_scaling():
    """1 / N alone is below float16: the division is left to backward, where the loss scale meets it first."""
    shape = (1, 8, 16, 60, 104)
    x, kw = made(shape, torch.float16)
    y = x.clone().requires_grad_()
    (loss_of(y, **kw) * 2.0**16).backward()
    exact = oracle(x.double(), **as_oracle(kw)).gradient * 2.0**16
    assert relative_l2(y.grad, exact) < 2**-11


def test_other_arguments_are_constants():
    x, kw = made(SHAPE)
    tensors = {k: v.requires_grad_() for k, v in kw.items() if torch.is_tensor(v)}
    loss = loss_of(x.requires_grad_(), **kw, weight=torch.ones(3, requires_grad=True))
    loss.backward()
    assert x.grad is not None and all(t.grad is None for t in tensors.values())
    assert not gradient_of(x, **kw).requires_grad
    assert not loss_of(x.detach(), **kw).requires_grad


def test_double_backward_is_refused():
    x, kw = made((2, 8), torch.float64)
    y = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(y, **kw), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        g.sum().backward()
    (g,) = torch.autograd.grad(loss_of(y, **kw) + (y**3).sum(), y, create_graph=True)  # beside another term
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.autograd.grad(g.sum(), y)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss_of(y, **kw) * scale, y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        g.sum().backward()


def test_every_gradient_is_a_tensor_of_its_own():
    """What a caller does to one result of autograd.grad changes neither another one nor what the graph has
    saved."""
    x, kw = made((2, 8))
    y = x.clone().requires_grad_()
    loss = loss_of(y, **kw)
    first, second = (torch.autograd.grad(loss, y, retain_graph=True)[0] for _ in range(2))
    expected = second.clone()
    first.zero_()
    assert_equal_bits(second, expected)
    assert_equal_bits(torch.autograd.grad(loss, y)[0], expected)


@pytest.mark.parametrize("magnitude", [1e35, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_normaliser_of_finite_data_does_not_overflow(dtype, magnitude):
    """2,048 distances of a tile add up to more than the largest float32."""
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(2, 5001, generator=g) * magnitude).to(dtype)
    real, fake = torch.zeros_like(x), (torch.rand(2, 5001, generator=g) * magnitude).to(dtype)
    gradient, aux = gradient_of(x, fake=fake, real=real, reduction="none", return_aux=True)
    exact = oracle(x.double(), fake=fake.double(), real=real.double(), reduction="none")
    assert int(aux.dropped) == 0
    torch.testing.assert_close(aux.normalizer.double(), exact.normalizer, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient.double(), exact.gradient, rtol=1e-6 if dtype == torch.float32 else 5e-3, atol=0
    )


@pytest.mark.parametrize("dtype, prediction", PAIRS, ids=lambda d: str(d).removeprefix("torch."))
def test_opcheck(dtype, prediction):
    x, kw = made((2, 3, 4), dtype, prediction, flow=True)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    kw |= {"sigma": kw["sigma"].to(arithmetic), "weight": torch.rand(2, 3, dtype=arithmetic)}
    full = registered(x.requires_grad_(), kw, mask=torch.rand(2, 3, 4) > 0.5)
    plain = registered(x.detach(), {"fake": kw["fake"], "real": kw["real"]})
    for arguments in (full, plain):
        torch.library.opcheck(torch.ops.rf_kernels.dmd_gradient.default, arguments)


def compiled_step(backend):
    x, kw = made(SHAPE)
    kw["weight"] = weights(SHAPE)["sample"]

    def step(x, reward):
        loss, aux = loss_of(x * 1.0, **kw, mask=reward[:, None] > -1e9, return_aux=True)
        return loss, aux.gradient_norm, gradient_of(x, **kw)

    reward = torch.zeros(SHAPE[0])
    results = []
    for f in (step, torch.compile(step, backend=backend, fullgraph=True)):
        y = x.clone().requires_grad_()
        loss, norm, gradient = f(y, reward)
        loss.backward()
        results.append((loss.detach(), norm, gradient, y.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_compile_aot_eager():
    compiled_step("aot_eager")


@pytest.mark.heavy
def test_compile_inductor():
    compiled_step("inductor")


# ---- dispatch, many samples --------------------------------------------------------------------------------


def test_dispatch():
    x, kw = made(SHAPE)
    gradient_of(x, **kw)
    assert rf.last_dispatch()[:3] == ("dmd_gradient", "cpu", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "place, value", [(0, float("inf")), (2047, -float("inf")), (2048, float("nan")), (5000, -float("inf"))]
)
def test_one_bad_element_drops_its_sample_from_any_of_three_tiles(place, value, dtype):
    x, kw = made((3, 5001), dtype)
    kw["fake"][1, place] = value
    gradient, aux = gradient_of(x, **kw, return_aux=True)
    assert aux.dropped == 1 and gradient.any(dim=1).tolist() == [True, False, True]


def test_the_loss_of_many_samples_is_summed_in_float64():
    """To the last bit or two; a float32 sum of as many would be off by more."""
    x, kw = made((4097, 3))
    aux = gradient_of(x, **kw, reduction="sum", return_aux=True)[1]
    assert abs(aux.loss.double() / aux.per_sample_loss.double().sum() - 1) <= 2**-23


# ---- the published numbers ---------------------------------------------------------------------------------


@parametrize("re_dmd", "vanilla_dmd")
def test_golden(case):
    """nan="published" reproduces the published gradient, loss and dx; where the index records a bug, our rule
    against float64."""
    t, hyper = case.tensors, case.hyper
    if hyper["affine_stub"]:
        pytest.skip("predictions of this case are functions of x_t")
    x = t["x"].requires_grad_()
    kw = {"fake": t["pred_fake_cond"], "real": t["pred_real_cond"]}
    for which in ("fake", "real"):
        if hyper[f"{which}_guidance_scale"] and f"pred_{which}_uncond" in t:
            kw |= {
                f"{which}_uncond": t[f"pred_{which}_uncond"],
                f"{which}_guidance": hyper[f"{which}_guidance_scale"],
            }
    mask = t["mask"].bool() if "mask" in t else None
    reward = case.kind == "re_dmd"
    if reward:
        kw["weight"] = rf.reward_weight(t["MQ"], hyper["beta"]).expand(x.shape[0])
    published = dict(kw, mask=mask, nan="published")
    loss, aux = loss_of(x, **published, return_aux=True)
    loss.backward()
    dtype = hyper["dtype"]
    unweighted = {k: v for k, v in kw.items() if k != "weight"}
    gradient = gradient_of(x, **unweighted, nan="published", reduction="none")
    case.check(dtype, "grad", gradient, "grad")
    case.check(dtype, "dx", x.grad, "dx_mq64" if reward else "dx")
    expected = t["loss_mq64" if reward else "loss"].reshape(())
    if float(expected) > torch.finfo(loss.dtype).max:  # compared in the range of the loss, as the index says
        assert loss.isinf()
    else:
        case.tolerance(dtype, "loss").check(loss, expected, case.name)
    if t["grad_norm_log"].isfinite():
        case.tolerance(dtype, "grad").check(
            aux.gradient_norm.mean(), t["grad_norm_log"].reshape(()), case.name
        )

    ours, aux = gradient_of(x, **kw, mask=mask, return_aux=True)
    assert ours.isfinite().all() and aux.loss.isfinite()
    if case.documents_bug:
        double = {k: v.double() if torch.is_tensor(v) else v for k, v in kw.items()}
        want = oracle(x.detach().double(), **double, mask=mask, limit=torch.finfo(kw["fake"].dtype).max)
        case.tolerance(dtype, "grad").check(ours.double(), want.gradient, case.name)
        case.tolerance(dtype, "loss").check(aux.loss.double(), want.loss, case.name)


def test_expand_is_left_aligned():
    x = torch.zeros(2, 3, 4)
    assert torch.equal(expand(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), x)[1, 2], torch.full((4,), 6.0))
