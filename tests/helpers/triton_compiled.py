"""What Triton makes of our kernels for GPUs that are not there: registers, spills, shared memory, widths of
accesses."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that a block may have, in bytes.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: str
    spills: int  # bytes of local memory a thread (NVIDIA), registers spilled (AMD)
    shared: int
    loads: list[int]  # bits of each load from global memory, in the order of the code
    stores: list[int]


class _Driver:
    """A machine that only says what it is."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self):
        return TARGETS[self.name]

    def get_current_device(self):
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device=None):
        return 0


@contextmanager
def compiling(name: str):
    """Launches inside compile for target ``name`` and start nothing; the list is filled with their
    ``Kernel``s."""
    kernels, run, driver = [], JITFunction.run, triton.runtime.driver

    def compile_only(self, *args, grid, warmup, **constants):
        kernels.append(_facts(self.__name__, run(self, *args, grid=grid, warmup=True, **constants)))

    before = driver._active
    driver.set_active(_Driver(name))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver._active = before


def _facts(name, compiled) -> Kernel:
    if "ptx" in compiled.asm:
        return Kernel(
            name, _stack(compiled.asm["cubin"]), compiled.metadata.shared, *_ptx_accesses(compiled.asm["ptx"])
        )
    text = compiled.asm["amdgcn"]
    spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
    return Kernel(name, spills, compiled.metadata.shared, *_gcn_accesses(text))


def _stack(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def _ptx_accesses(text):
    def bits(kind):
        found = re.findall(rf"\b{kind}\.global(?:\.\w+)*?(?:\.(v\d))?\.[bfsu](\d+)", text)
        return [int(width) * (int(vector[1:]) if vector else 1) for vector, width in found]

    return bits("ld"), bits("st")


def _gcn_accesses(text):
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

    def bits(kind):
        return [widths.get(w, 16) for w in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text)]

    return bits("load"), bits("store")
