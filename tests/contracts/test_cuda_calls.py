"""Launchers and the CUDA runtime: failures are named and leave no error behind, limits of shared memory are
set once."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")


def test_calls_of_the_cuda_runtime(tmp_path):
    """The driver's own expectations, on a fake runtime (``fake_cuda/cuda_runtime.h``)."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    here = Path(__file__).parent
    command = [COMPILER, "-std=c++20", "-pthread", "-Wall", "-Werror", f"-I{here / 'fake_cuda'}", f"-I{ROOT}"]
    subprocess.run([*command, str(here / "cuda_calls.cpp"), "-o", str(tmp_path / "cuda_calls")], check=True)
    done = subprocess.run([tmp_path / "cuda_calls"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_launchers_ask_the_runtime_through_one_header():
    """No launcher reads the last error, launches without a checked status, or sets a limit of its own."""
    wrong = []
    for path in sorted((ROOT / "csrc").rglob("launch.cu")):
        text = path.read_text()
        wrong += [
            f"{path.relative_to(ROOT)}: {x}"
            for x in ("cudaGetLastError", "<<<", "cudaFuncSetAttribute")
            if x in text
        ]
    assert not wrong
