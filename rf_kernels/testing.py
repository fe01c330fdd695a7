"""Comparators for tests: ours and those of projects that build on the ops.

The tolerance of a low-precision result is derived, never chosen: at most twice the error that eager PyTorch
makes in the same dtype on the same input, both against a float64 oracle, plus a stated number of units in the
last place (the rule of flash-attention's tests).
"""

import hashlib

import torch


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64 (the plain norm of the difference where expected is
    zero)."""
    actual, expected = actual.double(), expected.double()
    scale = float(expected.norm())
    return float((actual - expected).norm()) / (scale if scale else 1.0)


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference in float64; 0 for empty tensors."""
    difference = (actual.double() - expected.double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def assert_same_nonfinite(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and signed infinities stand in the same places."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(expected)
        assert not bool(wrong.any()), (
            f"{name} differs at {int(wrong.sum())} places, first {wrong.nonzero()[:1].tolist()}"
        )


def assert_within_eager(
    actual, oracle, eager, *, factor: float = 2.0, ulps: float = 2.0, cosine: float | None = None
) -> None:
    """Error of ``actual`` against the float64 ``oracle`` at most ``factor`` times that of ``eager`` (plain
    PyTorch in the dtype of ``actual``), plus ``ulps`` units in the last place of the oracle's largest value;
    maximum and root mean square alike.

    Args:
        cosine: also require 1 - cos(actual, oracle) <= this.
    """
    assert actual.shape == oracle.shape == eager.shape, (actual.shape, oracle.shape, eager.shape)
    assert actual.dtype == eager.dtype, f"compare like with like: {actual.dtype} against eager {eager.dtype}"
    assert oracle.dtype == torch.float64, "the oracle runs in float64"
    if actual.numel() == 0:
        return
    assert_same_nonfinite(actual, oracle)
    allowance = ulps * torch.finfo(eager.dtype).eps
    finite = torch.isfinite(oracle)
    actual, oracle, eager = (t.double()[finite] for t in (actual, oracle, eager))
    if actual.numel() == 0:
        return
    scale = float(oracle.abs().max())
    for name, norm in (
        ("max", lambda t: float(t.abs().max())),
        ("rms", lambda t: float(t.square().mean().sqrt())),
    ):
        ours, theirs = norm(actual - oracle), norm(eager - oracle)
        bound = factor * theirs + allowance * scale
        assert ours <= bound, (
            f"{name} error {ours:.3e} > {factor} x eager {theirs:.3e} + {allowance * scale:.3e}"
        )
    if cosine is not None:
        similarity = torch.nn.functional.cosine_similarity(actual.flatten(), oracle.flatten(), dim=0)
        assert 1 - float(similarity) <= cosine, f"1 - cosine = {1 - float(similarity):.3e} > {cosine:.3e}"


def assert_equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bytes: distinguishes -0 from 0 and one NaN from another."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        actual.shape,
        actual.dtype,
        expected.shape,
        expected.dtype,
    )
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
    wrong = (a != b).nonzero()
    if len(wrong):
        index = int(wrong[0]) // actual.element_size()
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), actual.shape))
        raise AssertionError(
            f"{len(wrong)} bytes differ, first at {place}: {actual[place]!r} against {expected[place]!r}"
        )


def fingerprint(*tensors: torch.Tensor | None) -> str:
    """SHA-256 over the bytes of tensors (None counts): the state before and after a refused call."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
        else:
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(
                tensor.detach()
                .resolve_neg()
                .cpu()
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
    return digest.hexdigest()
