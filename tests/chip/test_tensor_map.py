"""What a failed encoding of a tensor map says: the call that failed, and the driver's own code."""

import shutil
import subprocess

import pytest

from chip import build


def test_a_refused_tensor_map_is_named(tmp_path):
    """First no driver, then a driver that refuses, twice: the look-up that failed is tried again, its success
    is kept."""
    compiler = shutil.which("g++")
    if not (compiler and build.cuda_include()):
        pytest.skip("needs g++ and the CUDA toolkit's headers")
    program = tmp_path / "encode"
    command = [
        compiler,
        "-std=c++20",
        f"-I{build.ROOT}",
        f"-I{build.cuda_include()}",
        build.SOURCE / "encode_tensor_map.cpp",
    ]
    subprocess.run([*command, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "35 0 looking up cuTensorMapEncodeTiled in the driver",
        *["0 1 cuTensorMapEncodeTiled"] * 2,
    ]
