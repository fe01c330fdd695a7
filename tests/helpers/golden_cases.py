"""Loader of golden sets: an ``index.json`` beside safetensors files, described in tests/golden/README.md.

The set is ``tests/golden`` unless the environment variable ``RF_GOLDEN_DIR`` names another directory. Nothing
here, and nothing in a test that uses it, may depend on the names, sizes or numbers of one set: iterate by
kind, read sizes from ``case.hyper``.

    from helpers.golden_cases import parametrize

    @parametrize("causal_wan_model_stream")
    def test_stream(case):
        model.load_state_dict(case.weights())
        bound = case.tolerance("float64", "out")           # what index.json says about "out", as numbers
        bound.check(actual, case.tensors["out_f64"], "out") # AssertionError with the measured error
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from reward_forcing._files import check_header

GOLDEN_DIR = Path(os.environ.get("RF_GOLDEN_DIR", Path(__file__).resolve().parents[1] / "golden"))

#: Relative L2 bound per dtype where the index says nothing about a quantity.
FALLBACK_REL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
_BOUND = re.compile(r"\b(abs|rel)(?: L2)?\s+(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
#: Magnitudes that only a division by zero and its replacement by the largest float produce.
_SATURATED = 1e30


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name used in an index: float64, float32, bfloat16, bf16, or torch.<name>."""
    return name if isinstance(name, torch.dtype) else _DTYPES[name.removeprefix("torch.")]


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected|_2 / |expected|_2`` in float64; infinite if only the expected norm is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error, norm = (
        torch.linalg.vector_norm(actual - expected).item(),
        torch.linalg.vector_norm(expected).item(),
    )
    return error / norm if norm else (0.0 if error == 0.0 else float("inf"))


@dataclass(frozen=True)
class Bound:
    """Upper bounds on the error of one quantity: largest absolute error, and relative L2 error. ``None`` is
    unbounded."""

    abs: float | None = None
    rel: float | None = None

    def check(self, actual: torch.Tensor, expected: torch.Tensor, label: str = "") -> None:
        """Assert that ``actual`` has the shape of ``expected``, the same NaN and infinity positions, and
        finite values in bounds.

        Where ``expected`` is stored in a narrower dtype than ``actual`` was computed in, half a unit in the
        last place of the stored dtype is added per element. Values that come from a division by zero (above
        1e30) would drown all others in a norm, so they are compared element by element, apart.
        """
        assert actual.shape == expected.shape, (
            f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        narrower = (
            actual.is_floating_point() and torch.finfo(expected.dtype).eps > torch.finfo(actual.dtype).eps
        )
        rounding = torch.finfo(expected.dtype).eps / 2 if narrower else 0.0
        actual, expected = actual.detach().double(), expected.detach().double()
        assert torch.equal(actual.isnan(), expected.isnan()), f"{label}: NaN at other positions"
        infinite = expected.isinf()
        same = torch.equal(actual.isinf(), infinite) and torch.equal(actual[infinite], expected[infinite])
        assert same, f"{label}: infinities at other positions"

        finite = expected.isfinite()
        actual, expected = actual[finite], expected[finite]
        huge = expected.abs() > _SATURATED
        if huge.any():
            ratio = ((actual[huge] - expected[huge]) / expected[huge]).abs().max().item()
            limit = (self.rel if self.rel is not None else self.abs) + rounding
            assert ratio <= limit, (
                f"{label}: saturated values differ by {ratio:.3e} of themselves, allowed {limit:.1e}"
            )
            actual, expected = actual[~huge], expected[~huge]
        if self.abs is not None and expected.numel():
            excess = ((actual - expected).abs() - rounding * expected.abs()).max().item()
            assert excess <= self.abs, f"{label}: abs error {excess:.3e}, allowed {self.abs:.1e}"
        if self.rel is not None:
            error = relative_l2(actual, expected)
            assert error <= self.rel + rounding, (
                f"{label}: rel L2 {error:.3e}, allowed {self.rel + rounding:.1e}"
            )


def parse_tolerance(text: str) -> dict[str, Bound]:
    """Bounds by subject of one tolerance text, e.g. ``"out abs 1e-10, final caches abs 1e-12"``.

    Clauses are separated by ``;`` or ``,``. In a clause the words before the first bound are its subjects
    (``grad and dx rel L2 1e-2``); a clause that starts with a bound speaks of everything (subject ``""``).
    ``rel`` is read as relative L2. Where two clauses bound the same thing, the tighter one is kept. Clauses
    without a number are prose and are dropped.
    """
    bounds: dict[str, dict[str, float]] = {}
    for clause in re.split(r"[;,]", text):
        matches = list(_BOUND.finditer(clause))
        if not matches:
            continue
        subjects = clause[: matches[0].start()].split(":")[0].split(" and ")
        for subject in subjects:
            slot = bounds.setdefault(subject.strip(), {})
            for match in matches:
                measure, value = match[1], float(match[2])
                slot[measure] = min(value, slot.get(measure, value))
    return {subject: Bound(**slot) for subject, slot in bounds.items()}


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors of one file, read when they are asked for. Every access returns a fresh tensor: a copy, because
    what the reader hands out keeps its map of the file alive, one map an access. ``ValueError`` for a header
    that claims too much."""

    def __init__(self, path: Path):
        self._path = path

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        check_header(self._path)
        with safe_open(self._path, "pt") as file:
            return tuple(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(f"{self._path.name} has no tensor {name!r}")
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose name starts with ``prefix``, under the rest of their name."""
        return {name.removeprefix(prefix): self[name] for name in self._names if name.startswith(prefix)}


@dataclass(frozen=True)
class Case:
    """One case: an entry of ``index.json`` and its tensors."""

    entry: dict
    directory: Path

    def __repr__(self) -> str:
        return f"Case({self.name})"

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def kind(self) -> str:
        return self.entry["kind"]

    @property
    def hyper(self) -> dict:
        """Hyper-parameters of the case."""
        return self.entry["hyper"]

    @property
    def stats(self) -> dict:
        """Measured numbers; some are part of the behaviour (``loss_dtype``, ``official_code_raised``)."""
        return self.entry.get("stats", {})

    @property
    def documents_bug(self) -> str | None:
        """What the published code does unintendedly here, or None. An oracle of that code reproduces it;
        others need not."""
        return self.entry.get("documents_bug")

    @property
    def raised(self) -> dict | None:
        """``{"call", "type", "message", ...}`` if the published code raised at a call, else None."""
        return self.stats.get("official_code_raised")

    @functools.cached_property
    def tensors(self) -> Tensors:
        """Tensors of the case's own file, by name."""
        return Tensors(self.directory / self.entry["file"])

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict under official parameter names: from the shared weights file if the case names one, else
        its own ``w.*``."""
        shared = self.hyper.get("weights_file")
        return (Tensors(self.directory / shared) if shared else self.tensors).below("w.")

    def tolerance(self, dtype: str | torch.dtype, subject: str = "") -> Bound:
        """What the index allows for ``subject`` ("out", "caches", "dx", ...) in a run of ``dtype``.

        In order: clauses whose subject ends in ``subject`` ("final caches" for "caches"), clauses about
        everything, the fallback of 1e-10 relative L2 in float64 (1e-5 in float32, 2e-2 in bfloat16).
        """
        dtype = as_dtype(dtype)
        texts = [text for name, text in self.entry.get("tolerance", {}).items() if as_dtype(name) is dtype]
        bounds = parse_tolerance("; ".join(texts))
        for name, bound in bounds.items():
            if name and name.split(" ")[-1] == subject:
                return bound
        return bounds.get("", Bound(rel=FALLBACK_REL[dtype]))

    def check(self, dtype: str | torch.dtype, subject: str, actual: torch.Tensor, golden: str) -> None:
        """Compare ``actual`` with the tensor named ``golden`` under ``tolerance(dtype, subject)``."""
        self.tolerance(dtype, subject).check(actual, self.tensors[golden], f"{self.name}: {golden} ({dtype})")


@functools.cache
def _index() -> tuple[Case, ...]:
    entries = json.loads((GOLDEN_DIR / "index.json").read_text())["cases"]
    return tuple(Case(entry, GOLDEN_DIR) for entry in entries)


def cases(kind: str | None = None) -> list[Case]:
    """All cases of one kind, in the order of the index; every case if ``kind`` is None."""
    return [case for case in _index() if kind is None or case.kind == kind]


def kinds() -> set[str]:
    """Kinds that occur in the set, without the shared weights."""
    return {case.kind for case in _index()} - {"weights"}


def parametrize(*kind: str):
    """Decorator: one test per case of the given kinds, as argument ``case``, with the case's name as test
    id."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name) for k in kind for case in cases(k)]
    )


def check_scheduler_case(case: Case, prefix: str, golden, scheduler, warped_steps, train_t_warped) -> None:
    """A scheduler's tables and conversions against one shift of a case of kind ``scheduler``: the published
    one and the library's have the same methods, but for the two results that the caller hands in."""
    x0, eps, flow, t = (golden[name] for name in ("x0", "eps", "flow", "t"))
    xt = scheduler.add_noise(x0, eps, t)  # the float64 conversions are recorded of this float32 sample
    mid = re.search(r"t=([\d.,]+\d)", case.entry["meaning"][f"{prefix}.step_mid"])[1]
    mid = torch.tensor([float(value) for value in mid.split(",")])
    tables = {
        "sigmas": scheduler.sigmas,
        "timesteps": scheduler.timesteps,
        "training_weights": scheduler.training_weights,
        "warped_steps": warped_steps,
        "sigma_used": scheduler.sigma(t),
        "weight_used": scheduler.training_weight(t),
        "train_t_warped": train_t_warped,
    }
    conversions = {
        "add_noise": xt,
        "add_noise_bf16": scheduler.add_noise(x0.bfloat16(), eps.bfloat16(), t),
        "x0_from_flow": scheduler.x0_from_flow(flow, xt, t),
        "x0_from_flow_f64": scheduler.x0_from_flow(flow.double(), xt.double(), t),
        "flow_from_x0": scheduler.flow_from_x0(x0, xt, t),
        "flow_from_x0_f64": scheduler.flow_from_x0(x0.double(), xt.double(), t),
        "training_target": scheduler.training_target(x0, eps),
        "step": scheduler.step(flow, t, xt),
        "step_mid": scheduler.step(flow[: len(mid)], mid, xt[: len(mid)]),
    }
    assert set(golden) == {"x0", "eps", "flow", "t", "step_list", "train_t_int", *tables, *conversions}
    for name, value in tables.items():
        case.check(value.dtype, "tables", value, f"{prefix}.{name}")
    for name, value in conversions.items():
        assert value.dtype == golden[name].dtype, name
        subject = name if name == "flow_from_x0" else "conversions"
        case.check(value.dtype, subject, value, f"{prefix}.{name}")
