"""python -m rf_kernels.doctor: a sound installation is reported sound, and a broken one is explained, not
hidden."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rf_kernels
from rf_kernels import _backend, doctor

PACKAGE = Path(rf_kernels.__file__).parent


def run_doctor(folder, *arguments):
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "rf_kernels.doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
    )


def copy_of_the_package(folder):
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    return Path(shutil.copytree(PACKAGE, folder / "rf_kernels", ignore=ignore))


def test_a_sound_installation():
    done = run_doctor(PACKAGE.parent, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["extension"]["commit"] and report["versions"]["torch"]
    assert {row["op"] for row in report["self_test"]} == set(doctor.OPS)
    assert all(row["ok"] and row["backend"] and row["error"] > 0 for row in report["self_test"])
    assert (
        report["triton"]["asked for"] == os.environ.get("RF_BACKEND", "auto") and report["triton"]["serves"]
    )
    assert [row["device"] for row in report["devices"]][0] == "cpu" and all(
        row["why"] for row in report["devices"]
    )
    text = run_doctor(PACKAGE.parent)
    assert text.returncode == 0 and "nothing is broken" in text.stdout


def test_a_missing_extension_is_explained(tmp_path):
    copy_of_the_package(tmp_path)
    done = run_doctor(tmp_path)
    assert done.returncode == 1 and "build it with `make ext`" in done.stdout and "broken" in done.stdout
    assert not json.loads(run_doctor(tmp_path, "--json").stdout)["ok"]


def test_an_extension_that_does_not_load_is_explained(tmp_path):
    (copy_of_the_package(tmp_path) / "_C.abi3.so").write_bytes(b"this is no shared library")
    done = run_doctor(tmp_path)
    assert done.returncode == 1 and "did not load" in done.stdout, done.stdout + done.stderr
    # Anything but the doctor fails at import, with the reason.
    plain = subprocess.run(
        [sys.executable, "-c", "import rf_kernels"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert plain.returncode != 0 and "did not load" in plain.stderr and "rf_kernels.doctor" in plain.stderr


def test_a_wrong_result_is_broken(monkeypatch):
    from rf_kernels import _selftest

    monkeypatch.setattr(_selftest, "ema_evict", lambda device: {"error": 1.0, "bound": 0.1, "backend": "cpu"})
    report = doctor.collect()
    assert not report["ok"] and [row["op"] for row in report["self_test"] if not row["ok"]] == ["ema_evict"]


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="stands in for a device that torch sees and the build's runtime does not",
)
def test_a_device_that_the_builds_cuda_runtime_cannot_use_is_explained(monkeypatch):
    """The runtime is the build's own: beside a driver older than it, torch runs and the kernels do not."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": "H100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    # A test that ran before in this process may have asked for Triton, which then serves such a device.
    monkeypatch.setattr(_backend, "triton_registered", False)
    built = _backend.build_info()
    _, row = doctor.devices()
    assert not row["served"]
    if "90a" not in built["cuda_archs"].split():
        assert "rebuild with RF_CUDA_ARCHS" in row["why"]
    else:
        assert f"CUDA runtime of this build ({built['cuda_runtime']}) does not run here" in row["why"]
        assert "driver" in row["why"]
    monkeypatch.setattr(
        _backend,
        "ops",
        type("Ops", (), {"cuda_problem": lambda self: "", "build_info": _backend.ops.build_info})(),
    )
    if "90a" in built["cuda_archs"].split():
        assert doctor.devices()[1]["served"]
