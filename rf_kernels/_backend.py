"""Loads the extension, calls its ops, and says which backend served a call.

The library never falls back in silence: an extension that does not load is an ImportError that says why, a
missing CUDA part is an error of the op that needed it, and a slower path than the device's own kernel is
recorded (``last_dispatch``) or, with ``RF_STRICT=1``, refused.
"""

import json
import re
from typing import NamedTuple

import torch


class ArgumentError(ValueError):
    """A refused call: names the op, the argument, what was expected and what came. Nothing was written."""


try:
    from . import _C  # noqa: F401  (importing it registers the ops)
except ImportError as error:
    raise ImportError(
        f"rf_kernels: the extension rf_kernels/_C.abi3.so did not load: {error}. In a source tree, build it"
        " with `make ext`; else reinstall the wheel. It needs torch >= 2.10 and, on x86-64, a CPU with AVX2."
        " `python -m rf_kernels.doctor` explains more."
    ) from error

ops = torch.ops.rf_kernels


class Dispatch(NamedTuple):
    """What served the last call of an op on this thread."""

    op: str
    backend: str
    fallback: bool
    reason: str


def last_dispatch() -> Dispatch | None:
    """Which backend served the last op called on this thread, whether that was a fallback, and why (None
    before the first)."""
    op, backend, kind, reason = ops.last_dispatch().split("|", 3)
    return Dispatch(op, backend, kind == "fallback", reason) if op else None


def build_info() -> dict:
    """Facts of the loaded binary: version, commit, compilers, CPU and CUDA architectures."""
    return json.loads(ops.build_info())


_PREFIX = "rf_kernels."
_WRONG_TYPE = re.compile(
    r"rf_kernels::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type"
    r" '(.+?)'"
)


def invoke(op, *args):
    """Call a registered op; a failed argument check of the C++ side, or of PyTorch's dispatcher, becomes an
    ``ArgumentError``."""
    try:
        return op(*args)
    except RuntimeError as error:
        text = str(error).split("\n", 1)[0]
        if text.startswith(_PREFIX) and ": argument `" in text:
            raise ArgumentError(text) from None
        if wrong := _WRONG_TYPE.match(text):
            name, expected, argument, found = wrong.groups()
            raise argument_error(name, argument, f"a value of type {expected}", f"type {found}") from None
        if isinstance(error, NotImplementedError):  # no backend for such a tensor, or no tensor at all
            for argument, value in zip(_argument_names(op), args, strict=True):
                wrong = isinstance(value, torch.Tensor) or argument.type.kind() == "TensorType"
                if wrong and not _is_strided(value):
                    expected = "a dense tensor on cpu or cuda"
                    raise argument_error(_name(op), argument.name, expected, _kind(value)) from None
        raise


def _argument_names(op):
    return getattr(op, "default", op)._schema.arguments


def _name(op) -> str:
    return getattr(op, "default", op)._schema.name.split("::")[1]


def _is_strided(value) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type in ("cpu", "cuda")
    )


def _kind(value) -> str:
    return f"{value.layout} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__


def register_fake(name: str, op: str | None = None):
    """``torch.library.register_fake`` for an op of ours, with the one check that the real op never gets to
    make: of mixed devices PyTorch prefers "meta", and would run the fake, which returns memory that nobody
    wrote.

    Args:
        name: the registered op.
        op: how the public op is called, when the registered one is a part of it.
    """

    def register(fake):
        arguments = getattr(ops, name).default._schema.arguments

        @torch.library.register_fake(f"rf_kernels::{name}")
        def checked(*args):
            # Not strict: trailing arguments left at their default are not among args.
            tensors = [
                (a.name, t) for a, t in zip(arguments, args, strict=False) if isinstance(t, torch.Tensor)
            ]
            device = tensors[0][1].device
            for argument, tensor in tensors:
                if tensor.device != device:
                    raise argument_error(op or name, argument, f"a tensor on {device}", tensor.device)
            return fake(*args)

        return fake

    return register


def argument_error(op: str, argument: str, expected: str, found) -> ArgumentError:
    """The error for checks that only Python can make, in the words of csrc/common/check.h."""
    return ArgumentError(f"{_PREFIX}{op}: argument `{argument}`: expected {expected}, found {found}")


def as_list(op: str, argument: str, values) -> list:
    """A sequence argument as the list that the dispatcher takes."""
    if isinstance(values, list | tuple | range):
        return list(values)
    raise argument_error(op, argument, "a sequence of integers", type(values).__name__)


def check_tensors(op: str, required: dict, optional: dict) -> None:
    """Each a tensor (or None, if optional): for functions that look at their tensors before the op does."""
    for values, expected, may_be_none in (
        (required, "a tensor", False),
        (optional, "a tensor or None", True),
    ):
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) and not (may_be_none and value is None):
                raise argument_error(op, name, expected, type(value).__name__)


def number(op: str, argument: str, value) -> float:
    if isinstance(value, int | float):
        return float(value)
    raise argument_error(op, argument, "a number", type(value).__name__)


def choice(op: str, argument: str, allowed, value):
    """One of a few names, or the error that lists them."""
    if (value is None or isinstance(value, str)) and value in allowed:
        return value
    raise argument_error(op, argument, " or ".join(map(repr, allowed)), repr(value))


def refuse_grad(op: str, **tensors) -> None:
    """A mutating op has no backward: raise rather than drop the graph in silence (while grad mode is on)."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise argument_error(
                op,
                name,
                "a tensor that does not require grad (the op writes in place and has no backward)",
                "requires_grad=True",
            )
