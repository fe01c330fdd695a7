"""What a number has to be quoted with: versions, commits, and the state of the device in nvidia-smi's
words."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from rf_kernels._backend import build_info

READINGS = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "utilization.gpu",
    "memory.used",
    "pstate",
    "clocks_throttle_reasons.active",
)
FACTS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "persistence_mode",
)


def smi(fields) -> dict | None:
    """One reading of nvidia-smi for the first GPU, in its own words; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": type(error).__name__}
    if done.returncode == 0 and done.stdout.strip():
        return dict(
            zip(fields, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False)
        )
    if len(fields) > 1:  # a name that this driver does not know spoils the whole query
        readings = {field: smi((field,)) for field in fields}
        return {field: reading.get(field, reading.get("error")) for field, reading in readings.items()}
    return {"error": (done.stdout + done.stderr).strip().partition("\n")[0] or f"status {done.returncode}"}


def revision(root: Path) -> str | None:
    """The commit of the source tree that is run, if it is one (the binary names its own)."""
    try:
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        names = [
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if x.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict:
    """What a number has to be quoted with: machine, versions, commit, date."""
    info = build_info()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": info["commit"],
        "version": info["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_arch": info["cpu_arch"],
        "nvcc": info["nvcc"],
        "gpu": None,
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "nvidia-smi": smi(FACTS)}
    return facts


def of_run(root: Path) -> dict:
    """What is asked once for a whole run of the GPU suite."""
    return environment() | {
        "source_commit": revision(root),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "executable": Path(sys.executable).name,
        "compute_sanitizer": shutil.which("compute-sanitizer") is not None,
    }
