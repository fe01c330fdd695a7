"""Loads the extension, calls its ops, and says which backend served a call.

The library never falls back in silence: an extension that does not load is an ImportError that says why, a missing CUDA part is an
error of the op that needed it, and a slower path than the device's own kernel is recorded (``last_dispatch``) or, with
``RF_STRICT=1``, refused.
"""

import json
from typing import NamedTuple

import torch


class ArgumentError(ValueError):
    """A refused call: names the op, the argument, what was expected and what came. Nothing was written."""


try:
    from . import _C  # noqa: F401  (importing it registers the ops)
except ImportError as error:
    raise ImportError(
        f"rf_kernels: the extension rf_kernels/_C.abi3.so did not load: {error}. In a source tree, build it with `make ext`; "
        "else reinstall the wheel. It needs torch >= 2.10 and, on x86-64, a CPU with AVX2. "
        "`python -m rf_kernels.doctor` explains more."
    ) from error

ops = torch.ops.rf_kernels


class Dispatch(NamedTuple):
    """What served the last call of an op on this thread."""

    op: str
    backend: str
    fallback: bool
    reason: str


def last_dispatch() -> Dispatch | None:
    """Which backend served the last op called on this thread, whether that was a fallback, and why (None before the first)."""
    op, backend, kind, reason = ops.last_dispatch().split("|", 3)
    return Dispatch(op, backend, kind == "fallback", reason) if op else None


def build_info() -> dict:
    """Facts of the loaded binary: version, commit, compilers, CPU and CUDA architectures."""
    return json.loads(ops.build_info())


_PREFIX = "rf_kernels."


def invoke(op, *args):
    """Call a registered op; a failed argument check of the C++ side becomes an ``ArgumentError``."""
    try:
        return op(*args)
    except RuntimeError as error:
        text = str(error)
        if text.startswith(_PREFIX) and ": argument `" in text.split("\n", 1)[0]:
            raise ArgumentError(text.split("\n", 1)[0]) from None
        raise


def argument_error(op: str, argument: str, expected: str, found) -> ArgumentError:
    """The error for checks that only Python can make, in the words of csrc/common/check.h."""
    return ArgumentError(f"{_PREFIX}{op}: argument `{argument}`: expected {expected}, found {found}")


def refuse_grad(op: str, **tensors) -> None:
    """A mutating op has no backward: raise rather than drop the graph in silence (while grad mode is on)."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise argument_error(
                op,
                name,
                "a tensor that does not require grad (the op writes in place and has no backward)",
                "requires_grad=True",
            )
