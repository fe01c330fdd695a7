"""Builds and loads `_chip`, the test-only module that runs kernels on the functional model of the chip.

`python tests/chip/build.py` builds it into a folder of build/chip, one for each Python; `load()` does so when
a test asks for it. Ninja rebuilds only what changed.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "chip"
BUILD = ROOT / "build" / "chip" / sys.implementation.cache_tag


def _tool(name):
    beside = Path(sys.executable).parent / name  # a virtual environment that is not activated
    return str(beside) if beside.exists() else shutil.which(name) or name


def _first_folder(marker, *candidates):
    return next((str(c) for c in candidates if c and (Path(c) / marker).exists()), "")


def cutlass_include():
    """CUTLASS headers: RF_CUTLASS_INCLUDE, else site-packages, else empty."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "cutlass_library" / "source" / "include"
    return _first_folder("cute/tensor.hpp", os.environ.get("RF_CUTLASS_INCLUDE"), packaged)


def cuda_include():
    """The CUDA toolkit's headers, empty without a toolkit."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parents[1] / "include" if nvcc else None
    home = os.environ.get("CUDA_HOME")
    return _first_folder("cuda_runtime.h", home and Path(home) / "include", beside, "/usr/local/cuda/include")


def build():
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        _tool("cmake"),
        "-S",
        SOURCE,
        "-B",
        BUILD,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DRF_CUTLASS_INCLUDE={cutlass_include()}",
        f"-DRF_CUDA_INCLUDE={cuda_include()}",
    ]
    with (BUILD / ".lock").open("w") as lock:  # several test processes may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [_tool("cmake"), "--build", BUILD]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"building _chip failed:\n{done.stdout[-8000:]}{done.stderr[-4000:]}")
    return BUILD / ("_chip" + sysconfig.get_config_var("EXT_SUFFIX"))


@lru_cache(maxsize=1)
def load():
    spec = importlib.util.spec_from_file_location("_chip", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
