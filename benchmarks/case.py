"""A benchmark case: one op at one shape and dtype, and the candidates that do the same job."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import rf_kernels as rf
from rf_kernels._backend import BACKENDS, ops, triton_problem
from rf_kernels.testing import relative_l2


@dataclass(frozen=True, eq=False)
class Case:
    """``build(device)`` makes the inputs, checks that the candidates agree, and returns ``name -> call`` for
    every name of ``names``.

    Args:
        op: what is timed.
        shape: in words and numbers.
        names: ours first, then its peers.
        cost: ``flops`` and ``bytes`` of the job (the least that it can move).
        device: "cpu" or "cuda": the devices for which the shape is meant; None for both.
        quick: part of a short run.
    """

    op: str
    shape: str
    dtype: torch.dtype
    names: tuple[str, ...]
    build: Callable[[str], dict[str, Callable[[], object]]]
    cost: dict[str, int] = field(default_factory=dict)
    device: str | None = None
    quick: bool = False

    @property
    def id(self) -> str:
        """``op/shape/dtype``, the case's name on the command line."""
        shape = re.sub(r"[^A-Za-z0-9.]+", "-", self.shape).strip("-")
        return f"{self.op}/{shape}/{str(self.dtype).removeprefix('torch.')}"

    def candidates(self, device: str) -> dict[str, Callable[[], object]]:
        torch.manual_seed(0)
        calls = self.build(device)
        assert tuple(calls) == self.names, (tuple(calls), self.names)
        if torch.device(device).type == "cuda" and self.dtype != torch.float64 and triton_problem() is None:
            calls["triton"] = on_triton(calls[self.names[0]])
        return calls


def on_triton(call: Callable[[], object]) -> Callable[[], object]:
    """The same call, served by Triton (tests/ops/test_triton.py says that it agrees)."""
    with rf.backend("triton"):
        pass  # loads it: timed calls only ask

    def run():
        before = ops.backend()
        ops.set_backend(BACKENDS.index("triton"))
        try:
            return call()
        finally:
            ops.set_backend(before)

    return run


def tensors(result) -> list[torch.Tensor]:
    """The tensors of a candidate's result, cloned: the next candidate may write to the same memory."""
    result = result if isinstance(result, (tuple, list)) else [result]
    return [t.detach().clone() for t in result]


def agree(
    calls: dict[str, Callable[[], object]], *, ulps: float, floor: float = 0.0, truth: str | None = None
) -> None:
    """Every candidate's tensors against those of ``truth`` (default: the first candidate) in relative L2: no
    number without agreement. Each candidate is called once.

    Args:
        ulps: allowance in units in the last place of the narrowest dtype among the candidate's results.
        floor: allowance where that is less (peers whose own arithmetic is poorer than their dtype).
    """
    truth = truth or next(iter(calls))
    expected = tensors(calls[truth]())
    for name in calls.keys() - {truth}:
        results = tensors(calls[name]())
        bound = max(ulps * max(torch.finfo(found.dtype).eps for found in results), floor)
        for i, (found, wanted) in enumerate(zip(results, expected, strict=True)):
            error = relative_l2(found.reshape(wanted.shape), wanted)
            assert error <= bound, (
                f"{name}: result {i} differs from {truth} by {error:.1e}, allowed {bound:.1e}"
            )
