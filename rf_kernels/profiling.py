"""nvtx ranges: public ops and pipeline phases by name in a profiler's timeline. Nothing happens without the
nvtx package."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

_NOTHING = nullcontext()


def nvtx_range(name: str, domain: str = "rf_kernels") -> AbstractContextManager:
    """A named range around a block of code; does nothing without the nvtx package."""
    return _NOTHING if nvtx is None else nvtx.annotate(name, domain=domain)


def nvtx_annotated(function):
    """Put every call of a function into a range of its name. Inside torch.compile the call is traced bare: a
    range is host work."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if nvtx is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with nvtx_range(function.__name__):
            return function(*args, **kwargs)

    return call
