"""The golden-set loader: its reading of tolerance texts, its comparator, and that the index describes the
files."""

import pytest
import torch

from helpers.golden_cases import GOLDEN_DIR, Bound, Case, as_dtype, cases, parse_tolerance, relative_l2


def test_tolerance_texts():
    assert parse_tolerance(
        "out: rel L2 2e-6 and abs 2e-5 against out_f64; caches abs 1e-5 (itself: ~3e-7 rel)"
    ) == {"out": Bound(abs=2e-5, rel=2e-6), "caches": Bound(abs=1e-5)}
    assert parse_tolerance("grad and dx rel L2 1e-2, loss rel 3e-2") == {
        "grad": Bound(rel=1e-2),
        "dx": Bound(rel=1e-2),
        "loss": Bound(rel=3e-2),
    }
    assert parse_tolerance("rel L2 1e-5, abs 5e-5 against the golden; sink contents: see stats") == {
        "": Bound(abs=5e-5, rel=1e-5)
    }
    assert parse_tolerance("abs 1e-5 if this; abs 1e-6 if that") == {"": Bound(abs=1e-6)}


def test_tolerance_of_a_case():
    texts = {"float64": "out abs 1e-10, final caches abs 1e-12", "bf16": "rel L2 2e-2"}
    case = Case({"name": "made", "tolerance": texts}, GOLDEN_DIR)
    assert case.tolerance("float64", "caches") == Bound(abs=1e-12)
    assert case.tolerance(torch.bfloat16, "caches") == Bound(rel=2e-2)
    assert case.tolerance("float64", "loss") == Bound(rel=1e-10)
    assert case.tolerance("float32", "out") == Bound(rel=1e-5)


def test_bound_rejects():
    one = torch.ones(4, dtype=torch.float64)
    Bound(abs=1e-9, rel=1e-9).check(one + 1e-10, one)
    for bound, actual, expected in [
        (Bound(abs=1e-9), one + 1e-8, one),
        (Bound(rel=1e-9), one * (1 + 1e-8), one),
        (Bound(abs=1.0), one[:2], one),
        (Bound(abs=1.0), torch.tensor([1.0, float("nan")]), torch.ones(2)),
        (Bound(abs=1.0), torch.tensor([1.0, float("inf")]), torch.tensor([1.0, -float("inf")])),
        (Bound(rel=1e-5), torch.tensor([1e38, 1.1]), torch.tensor([1e38, 1.0])),
    ]:
        with pytest.raises(AssertionError):
            bound.check(actual, expected, "made")


def test_bound_allows_the_rounding_of_what_is_stored():
    exact = torch.full((3,), 1.0, dtype=torch.float64) / 3
    Bound(abs=1e-12, rel=1e-12).check(exact, exact.float())
    with pytest.raises(AssertionError):
        Bound(abs=1e-12).check(exact * (1 + 2e-7), exact.float())
    assert relative_l2(exact, exact) == 0.0


def test_tensors_are_fresh():
    tensors = cases()[0].tensors
    name = next(iter(tensors))
    tensors[name].fill_(7)
    tensors.below("")[name].fill_(7)
    assert not torch.equal(tensors[name], torch.full_like(tensors[name], 7))


@pytest.mark.parametrize("case", cases(), ids=repr)
def test_index_describes_the_file(case):
    described = case.entry["tensors"]
    assert set(described) == set(case.tensors)
    for name, tensor in case.tensors.items():
        assert list(tensor.shape) == described[name]["shape"], name
        assert str(tensor.dtype) == "torch." + described[name]["dtype"], name
    if "weights_file" in case.hyper:
        assert case.weights()
    for name in case.entry["tolerance"]:
        assert as_dtype(name).is_floating_point
