"""The bodies of CUDA kernels as host code: compiled by the C++ compiler, called with pointers, and data
between guards."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]  # as the drivers number them
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def build(name, directory):
    """The function ``name`` of ``tests/ops/<name>.cpp``. Undefined behaviour and a misaligned access trap;
    its attribute ``moved_bytes`` counts what vector accesses have moved since it was last asked; ``library``
    has the file's other functions."""
    if COMPILER is None:
        pytest.skip("no C++ compiler: the kernel's body cannot be built as host code")
    library = directory / f"{name}.so"
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    traps = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-DRF_TRAP_MISALIGNED"]
    source = ROOT / f"tests/ops/{name}.cpp"
    subprocess.run([COMPILER, *flags, *traps, f"-I{ROOT}", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    function = getattr(loaded, name)
    function.library = loaded
    function.moved_bytes = getattr(loaded, name.removesuffix("_lanes") + "_moved_bytes")
    function.moved_bytes.restype = ctypes.c_int64
    return function


def integers(values):
    return (ctypes.c_int64 * len(values))(*map(int, values))


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


class Guarded:
    """A copy of ``t`` [..., D] in memory whose other bytes are 0xFF, NaN in every float type: 64 of them
    before and after it, ``offset`` elements in front of the first row and ``gap`` elements behind every
    row."""

    def __init__(self, t, *, gap=0, offset=0):
        rows, width = t[..., 0].numel(), t.shape[-1] + gap
        begin = 64 // t.element_size() + offset
        end = begin + rows * width
        self.pool = torch.full((end + 64 // t.element_size(),), -1, dtype=INTEGERS[t.element_size()])
        self.view = self._view(self.pool, t, begin, end, width)
        self.view.copy_(t)
        self._place = (t, begin, end, width)

    @staticmethod
    def _view(pool, t, begin, end, width):
        return pool.view(t.dtype)[begin:end].view(*t.shape[:-1], width)[..., : t.shape[-1]]

    def check(self):
        """Nothing but the view has been written."""
        rest = self.pool.clone()
        self._view(rest, *self._place).view(rest.dtype).fill_(-1)
        assert bool((rest == -1).all()), "bytes outside of the data were written"
