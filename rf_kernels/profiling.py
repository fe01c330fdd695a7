"""nvtx ranges: public ops and pipeline phases by name in a profiler's timeline. Nothing happens without the
nvtx package."""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

_NOTHING = nullcontext()


def nvtx_range(name: str, domain: str = "rf_kernels") -> AbstractContextManager:
    """A named range around a block of code; does nothing without the nvtx package."""
    return _NOTHING if nvtx is None else _range(nvtx.annotate, name, domain)


@functools.lru_cache(maxsize=1024)
def _range(annotate, name: str, domain: str) -> AbstractContextManager:
    # made once: that takes longer than to enter it
    return annotate(name, domain=domain)


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


class when_imported(importlib.abc.MetaPathFinder):  # noqa: N801  (called like a function)
    """Calls ``action(module)`` once the module is imported, by whomever: for what we tell a module that is
    too slow to import for everybody's sake (``torch.utils.flop_counter`` imports Triton)."""

    def __init__(self, name: str, action: Callable):
        self.name, self.action = name, action
        if name in sys.modules:
            action(sys.modules[name])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_module
        return spec
