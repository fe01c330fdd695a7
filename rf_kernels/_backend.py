"""Loads the extension, calls its ops, and says which backend served a call.

The library never falls back in silence: an extension that does not load is an ImportError that says why, a
missing CUDA part is an error of the op that needed it, and a slower path than the device's own kernel is
recorded (``last_dispatch``) or, with ``RF_STRICT=1``, refused.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import math
import operator
import os
import re
import threading
from numbers import Real
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException, unset_fake_temporarily
from torch.autograd import forward_ad


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
    *addresses, fallback = ops.last_dispatch()
    op, backend, reason = (ctypes.string_at(address).decode() for address in addresses)
    return Dispatch(op, backend, fallback, reason) if op else None


def build_info() -> dict:
    """Facts of the loaded binary: version, commit, compilers, CPU and CUDA architectures."""
    return json.loads(_build_info())


@functools.cache
def _build_info() -> str:  # once: PyTorch's stable ABI loses the memory of a string that it hands over
    return ops.build_info()


# ---- who serves: the seam ----

# What csrc/<op>/op.cpp has checked, it hands to a CPU or CUDA kernel of its own, to PyTorch's kernels or, as
# triton_<op>, to a module of rf_kernels/triton. csrc/common/dispatch.h decides; here it is told what is asked
# for, and what there is.
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
    for name, module in _TRITON.items() if not triton_registered else ():
        _triton.impl(f"triton_{name}", _launcher(name, module), "CompositeExplicitAutograd")
    triton_registered = True
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
    ops.set_backend(BACKENDS.index(name))


def requested() -> str:
    """What is asked for now."""
    return BACKENDS[ops.backend()]


@contextlib.contextmanager
def backend(name: str):
    """Ask for a backend inside a ``with`` block, in the whole process (as ``RF_BACKEND`` does from the
    start).

    "auto": the order of docs/triton.md. "native": the same without Triton. "triton": Triton serves every op,
    or the call raises. A backward asks when it runs.
    """
    before = requested()
    _request(name)
    try:
        yield
    finally:
        ops.set_backend(BACKENDS.index(before))


_PREFIX = "rf_kernels."
_WRONG_TYPE = re.compile(
    r"rf_kernels::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type"
    r" '(.+?)'"
)


def invoke(op, *args):
    """Call a registered op; a failed argument check of the C++ side, or of PyTorch's dispatcher, becomes an
    ``ArgumentError``."""
    plain = not torch.compiler.is_compiling() and not _is_transformed(op, args)
    try:
        if plain and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():  # where PyTorch has a Python kernel
                return op(*args)
        return op(*args)
    except RuntimeError as error:
        if cause := _raised.__dict__.pop("error", None):
            raise cause from None
        for argument, value in zip(_argument_names(op), args, strict=False):
            # the dispatcher makes it an undefined tensor
            if value is None and argument.type.kind() == "TensorType":
                raise argument_error(_name(op), argument.name, "a tensor", None) from None
        text = str(error).split("\n", 1)[0]
        if _is_argument_error(text):
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


def _is_transformed(op, args) -> bool:
    """Whether a transform, a mode or a subclass may want to see the call.

    No op has a rule for forward-mode AD or for torch.func's grad and jvp: an error, where the dispatcher
    would give zero tangents or an error about its own internals."""
    if forward_ad._current_level >= 0:
        for argument, value in zip(_argument_names(op), args, strict=False):
            if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise NotImplementedError(
                    f"{_PREFIX}{_name(op)}: forward-mode AD is not implemented (argument `{argument.name}`"
                    " has a tangent)"
                )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        for argument, value in zip(_argument_names(op), args, strict=False):
            if isinstance(value, torch.Tensor) and torch._C._functorch.is_gradtrackingtensor(value):
                raise NotImplementedError(
                    f"{_PREFIX}{_name(op)}: torch.func's grad, vjp and jvp are not implemented for it"
                    f" (argument `{argument.name}` is being differentiated); use torch.autograd"
                )
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch.overrides.has_torch_function(args)


def wrote(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that an op has written to these: a backward that had saved one of them raises instead of
    using the new values.

    Not at the dispatcher, where a Python kernel would cost a call more than the op itself. Compiled code
    needs no help: AOTAutograd does it for every graph input that a schema calls mutated.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


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
    """``torch.library.register_fake`` for an op of ours, with the checks of the real op, and the one that it
    never gets to make: of mixed devices PyTorch prefers "meta", and would run the fake, which returns memory
    that nobody wrote.

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
            _check_traced(name, args)
            return fake(*args)

        return fake

    return register


class _TracedArgumentError(ArgumentError, UnsupportedOperatorException):
    """An ArgumentError found while a compiler traces. As one about an op that cannot be traced it makes
    Dynamo leave the frame to eager execution, which raises the ArgumentError itself; of any other error
    Dynamo makes a RuntimeError of its own. With fullgraph=True it is Dynamo's Unsupported, which quotes
    ``func``."""

    def __init__(self, text: str):
        ArgumentError.__init__(self, text)
        self.func = text

    __str__ = ArgumentError.__str__


def _check_traced(name: str, args) -> None:
    """The checks of csrc/<op>/op.cpp on meta tensors, for calls whose sizes are all known (else they come at
    run time)."""
    check = getattr(ops, f"traced_{name}", None)
    if check is None or not all(map(_is_static, args)):
        return
    with unset_fake_temporarily():
        meta = [_meta_of(value) if isinstance(value, torch.Tensor) else value for value in args]
        try:
            check.default(*meta)
        except RuntimeError as error:
            text = str(error).split("\n", 1)[0]
            if _is_argument_error(text):
                raise _TracedArgumentError(text) from None
            raise


def _is_static(value) -> bool:
    if isinstance(value, torch.Tensor):
        return all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    return not isinstance(value, torch.SymInt | torch.SymFloat)


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _is_argument_error(text: str) -> bool:
    return text.startswith(_PREFIX) and ": argument `" in text


def argument_error(op: str, argument: str, expected: str, found) -> ArgumentError:
    """The error for checks that only Python can make, in the words of csrc/common/check.h."""
    return ArgumentError(f"{_PREFIX}{op}: argument `{argument}`: expected {expected}, found {found}")


def integers(op: str, argument: str, values) -> list:
    """A sequence argument as the list of integers that the dispatcher takes."""
    if isinstance(values, list | tuple | range):
        return [integer(op, argument, value) for value in values]
    raise argument_error(op, argument, "a sequence of integers", type(values).__name__)


def integer(op: str, argument: str, value):
    """A real integer of 64 bits: nothing is cut off, and a bool is none."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    found = value
    if not isinstance(value, int | torch.SymInt):
        try:  # numpy's integers, and integer tensors of one element
            found = operator.index(value)
        except (TypeError, RuntimeError):
            found = None
    is_bool = isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    if found is None or is_bool:
        text = repr(value) if isinstance(value, Real) else type(value).__name__
        raise argument_error(op, argument, "an integer", text)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise argument_error(op, argument, "an integer of 64 bits", f"one of {found.bit_length()} bits")
    return found


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
    """A real number as a float; one beyond its range is infinite, for the op to refuse."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymInt | torch.SymFloat):
        raise argument_error(op, argument, "a number", type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def flag(op: str, argument: str, value) -> bool:
    if isinstance(value, bool):
        return value
    raise argument_error(op, argument, "True or False", type(value).__name__)


def choice(op: str, argument: str, allowed, value):
    """One of a few names, or the error that lists them."""
    if (value is None or isinstance(value, str)) and value in allowed:
        return value
    raise argument_error(op, argument, " or ".join(map(repr, allowed)), repr(value))


def refuse_grad(op: str, why: str = "the op writes in place and has no backward", **tensors) -> None:
    """Raise where a gradient would be lost in silence (while grad mode is on)."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise argument_error(
                op, name, f"a tensor that does not require grad ({why})", "requires_grad=True"
            )


def refuse_transforms(op: str) -> None:
    """For what keeps a state between calls: inside torch.func's transforms its tensors have no memory."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{_PREFIX}{op}: torch.func's grad, vjp, jvp and vmap are not implemented for it; use"
            " torch.autograd, and a batch"
        )


def refuse_negative(op: str, **tensors) -> None:
    """A view with PyTorch's negative bit (of the imaginary part of a conjugate) cannot be written in place:
    the dispatcher would hand the op a copy of it, and fail after the op has written the others."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_neg():
            raise argument_error(
                op, name, "a tensor without the negative bit (`.resolve_neg()`)", "a negative view"
            )


# Where a GPU could be without kernels of ours, Triton is known from the start (looked for, not imported). Its
# interpreter, which takes CPU tensors alone, serves on request.
if (
    (torch.version.cuda or torch.version.hip)
    and triton_problem() is None
    and "TRITON_INTERPRET" not in os.environ
):
    _register_triton(False)
if os.environ.get("RF_BACKEND"):
    _request(os.environ["RF_BACKEND"])
