"""Tensors whose memory ends, or begins, at a page that cannot be touched: `python
tests/helpers/guard_pages.py 0 50 rope_append`.

Runs configurations of tests/helpers/fuzz.py with every tensor argument of every operator moved to such memory
(the same shape, strides and values; what an operator writes is copied back). One byte read or written outside
ends the process.
"""

import ctypes
import mmap
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "tests")]

import torch

import rf_kernels as rf

PROT_NONE, PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class GuardedPages:
    """Pages between two that cannot be touched; a tensor of them keeps them alive."""

    def __init__(self, nbytes: int):
        page = mmap.PAGESIZE
        self.inside = -(-max(nbytes, 1) // page) * page
        self.map = mmap.mmap(-1, self.inside + 2 * page)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + page
        for guard in (self.start - page, self.start + self.inside):
            if libc.mprotect(guard, page, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def tensor(self, nbytes: int, at_end: bool) -> torch.Tensor:
        offset = mmap.PAGESIZE + (self.inside - nbytes if at_end else 0)
        return torch.frombuffer(self.map, dtype=torch.uint8, count=nbytes, offset=offset)


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The same values under the same strides, in memory that ends (begins) at a guard page."""
    if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = span * tensor.element_size()
    flat = GuardedPages(nbytes).tensor(nbytes, at_end).view(tensor.dtype)
    flat.copy_(torch.as_strided(tensor, (span,), (1,), tensor.storage_offset()))
    return torch.as_strided(flat, tensor.shape, tensor.stride(), 0)


class Guarded:
    """In place of ``_backend.invoke``; counts the operators that ran on guarded memory."""

    def __init__(self, invoke, seed: int):
        self.invoke, self.random, self.calls = invoke, random.Random(seed), 0

    def __call__(self, op, *args):
        at_end = self.random.random() < 0.7
        moved = [guarded(x.detach(), at_end) if isinstance(x, torch.Tensor) else x for x in args]
        with torch.no_grad():
            result = self.invoke(op, *moved)
        self.calls += 1
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return self.invoke(op, *args)  # the copies are not in the graph
        schema = getattr(op, "default", op)._schema
        for argument, x, y in zip(schema.arguments, args, moved, strict=False):
            if (
                isinstance(x, torch.Tensor)
                and argument.alias_info is not None
                and argument.alias_info.is_write
            ):
                x.copy_(y)
        return result


def run(op: str, first: int, last: int) -> tuple[list[str], int]:
    import rf_kernels.ops as ops
    from helpers import fuzz

    modules = [module for name, module in sys.modules.items() if name.startswith(ops.__name__ + ".")]
    hook = Guarded(rf._backend.invoke, first)
    originals = {module: module.invoke for module in modules if hasattr(module, "invoke")}
    for module in originals:
        module.invoke = hook
    try:
        return fuzz.run(op, range(first, last)), hook.calls
    finally:
        for module, original in originals.items():
            module.invoke = original


def overrun():
    """Planted: a view that claims one row more than its memory holds."""
    row = 1024
    x = GuardedPages(4 * row).tensor(4 * row, at_end=True).view(torch.float32)
    beyond = (ctypes.c_float * (2 * row)).from_address(x.data_ptr())
    angles = torch.zeros(1, 1, 2)
    rf.rope(torch.frombuffer(beyond, dtype=torch.float32).view(1, 2, 1, row), angles=angles, axes=[2, 0, 0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "overrun":
        overrun()
    else:
        failures = []
        for op in sys.argv[3:]:
            found, calls = run(op, int(sys.argv[1]), int(sys.argv[2]))
            failures += found
            print(op, calls)
        sys.exit("\n".join(failures) or 0)
