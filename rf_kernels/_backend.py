"""Loads the extension, calls its ops, and says which backend served a call.

The library never falls back in silence: an extension that does not load is an ImportError that says why, a missing CUDA part is an
error of the op that needed it, and a slower path than the device's own kernel is recorded (``last_dispatch``) or, with
``RF_STRICT=1``, refused.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import threading
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


# ---- who serves: the seam ----------------------------------------------------------------------------------------

# What csrc/<op>/op.cpp checks, it hands to a CPU or CUDA kernel of its own, to PyTorch's kernels or, as triton_<launcher>, to a
# module of rf_kernels/triton. csrc/common/dispatch.h decides; here it is told what is asked for and what there is.
BACKENDS = ("auto", "native", "triton")
_TRITON = {
    "rope": "rope_append",
    "rope_append": "rope_append",
    "ema_evict": "ema_evict",
    "sink_window_attention": "sink_window_attention",
    "sink_window_attention_backward": "sink_window_attention",
    "dmd_gradient": "dmd_gradient",
}
_triton = torch.library.Library("rf_kernels", "FRAGMENT")
_raised = threading.local()
triton_registered = False


def triton_problem() -> str | None:
    """Why Triton is not there (None where it is). Does not import it."""
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


def _register_triton(interpreted: bool) -> None:
    global triton_registered
    triton_registered = True
    for name, module in _TRITON.items():
        _triton.impl(f"triton_{name}", _launcher(name, module), "CompositeExplicitAutograd", allow_override=True)
    ops.set_triton(interpreted, torch.version.hip is not None)


def _launcher(name: str, module: str):
    def launch(*args):
        try:
            with torch.no_grad():
                getattr(importlib.import_module(f".triton.{module}", __package__), name)(*args)
        except Exception as error:
            _raised.error = error  # the C++ between here and the caller knows of no Python exceptions
            raise

    return launch


def _request(name: str | None) -> None:
    """What ``RF_BACKEND`` and ``backend`` ask for."""
    if choice("backend", "name", BACKENDS, name) == "triton":
        if problem := triton_problem():
            raise ImportError(f"{_PREFIX}backend: Triton is asked for, and {problem}")
        _register_triton(importlib.import_module("triton").knobs.runtime.interpret)
    ops.set_backend(name)


@contextlib.contextmanager
def backend(name: str):
    """Ask for a backend inside a ``with`` block, in the whole process (as ``RF_BACKEND`` does from the start).

    "auto": the order of docs/triton.md. "native": the same without Triton. "triton": Triton serves every op, or the call raises.
    A backward asks when it runs.
    """
    before = ops.backend()
    _request(name)
    try:
        yield
    finally:
        ops.set_backend(before)


_PREFIX = "rf_kernels."
_WRONG_TYPE = re.compile(
    r"rf_kernels::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


def invoke(op, *args):
    """Call a registered op; a failed argument check of the C++ side, or of PyTorch's dispatcher, becomes an ``ArgumentError``."""
    try:
        return op(*args)
    except RuntimeError as error:
        if cause := _raised.__dict__.pop("error", None):
            raise cause from None
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
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type in ("cpu", "cuda")


def _kind(value) -> str:
    return f"{value.layout} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__


def register_fake(name: str, op: str | None = None):
    """``torch.library.register_fake`` for an op of ours, with the one check that the real op never gets to make: of mixed devices
    PyTorch prefers "meta", and would run the fake, which returns memory that nobody wrote.

    Args:
        name: the registered op.
        op: how the public op is called, when the registered one is a part of it.
    """

    def register(fake):
        arguments = getattr(ops, name).default._schema.arguments

        @torch.library.register_fake(f"rf_kernels::{name}")
        def checked(*args):
            # Not strict: trailing arguments left at their default are not among args.
            tensors = [(a.name, t) for a, t in zip(arguments, args, strict=False) if isinstance(t, torch.Tensor)]
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
    for values, expected, may_be_none in ((required, "a tensor", False), (optional, "a tensor or None", True)):
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


# Where a GPU could be without kernels of ours, Triton is known from the start (looked for, not imported). Its interpreter, which
# takes CPU tensors alone, serves on request.
if (torch.version.cuda or torch.version.hip) and triton_problem() is None and "TRITON_INTERPRET" not in os.environ:
    _register_triton(False)
if os.environ.get("RF_BACKEND"):
    _request(os.environ["RF_BACKEND"])
