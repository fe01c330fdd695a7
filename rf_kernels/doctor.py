"""`python -m rf_kernels.doctor [--json]`: what is installed, which backend serves which device and why not
the others, and a numerical self-test of each op in seconds.

Exit code 0 where nothing is broken; a machine without a GPU is not broken. It starts and explains even when
the extension does not load (rf_kernels/__init__.py lets this one command through).
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import shutil
import sys
import time
from pathlib import Path

OPS = ("rope_append", "ema_evict", "sink_window_attention", "dmd_gradient")


def versions() -> dict:
    """Versions of what the library works with; None where a package is absent."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
    }
    for package in ("rf_kernels", "torch", "numpy", "safetensors", "triton", "nvtx"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["nvcc on PATH"] = shutil.which("nvcc") is not None
    return found


def extension() -> dict:
    """The binary: where it lies, whether it loads, and what it was built from."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_C*.so"))
    if not files:
        return {
            "ok": False,
            "error": f"no _C.abi3.so in {folder}: build it with `make ext`, or install the wheel",
        }
    facts = {"file": str(files[0]), "bytes": files[0].stat().st_size}
    try:
        backend = importlib.import_module("rf_kernels._backend")
    except Exception as error:  # whatever it is: explaining it is this command's purpose
        return facts | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return facts | {"ok": True} | backend.build_info()


def devices() -> list[dict]:
    """Each device, which backend serves it, and why not a better one."""
    import torch

    rows = [
        {"device": "cpu", "served": True, "by": f"C++, {torch.get_num_threads()} threads", "why": "always"}
    ]
    backend = importlib.import_module("rf_kernels._backend")
    built = backend.build_info()
    if not torch.cuda.is_available():
        why = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "torch sees no CUDA device (driver, CUDA_VISIBLE_DEVICES)"
        )
        return [*rows, {"device": "cuda", "served": False, "by": None, "why": why}]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        row = {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "capability": f"{major}.{minor}",
        }
        archs = built["cuda_archs"].split()
        # SASS runs on its own major version from its minor version on; 90a on 9.0 alone.
        fits = [
            a
            for a in archs
            if a == f"{major}{minor}a" or (a.isdigit() and int(a[:-1]) == major and int(a[-1]) <= minor)
        ]
        why = (
            f"the build has {', '.join(fits)}"
            if fits
            else f"the build has {built['cuda_archs'] or 'no CUDA part'}: rebuild with RF_CUDA_ARCHS"
        )
        problem = backend.ops.cuda_problem() if fits else ""
        by = "CUDA" if fits and not problem else "Triton" if backend.triton_registered else None
        rows.append(row | {"served": by is not None, "by": by, "why": problem or why})
    return rows


def triton() -> dict:
    """Whether Triton is there, when it serves, and what is asked for."""
    backend = importlib.import_module("rf_kernels._backend")
    problem = backend.triton_problem()
    asked = backend.requested()
    serves = {
        "auto": "on request (RF_BACKEND, rf_kernels.backend), and where a GPU has no other kernels",
        "native": "nothing: RF_BACKEND=native",
        "triton": "every op, or the call raises: RF_BACKEND=triton",
    }
    return {"asked for": asked, "there": problem is None, "serves": problem or serves[asked]}


def self_test() -> list[dict]:
    """Each op on a small input, on every device it serves, against its float64 reference."""
    import torch

    from rf_kernels import _selftest

    rows = []
    for device in ["cpu"] + [
        f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]:
        for op in OPS:
            start = time.perf_counter()
            try:
                row = {"ok": True, **getattr(_selftest, op)(torch.device(device))}
                row["ok"] = row["error"] <= row["bound"]
            except Exception as error:
                row = {"ok": False, "message": f"{type(error).__name__}: {error}"}
            rows.append({"op": op, "device": device, "seconds": round(time.perf_counter() - start, 3)} | row)
    return rows


def collect() -> dict:
    report = {"versions": versions(), "extension": extension(), "devices": [], "triton": {}, "self_test": []}
    if report["extension"]["ok"]:
        report["devices"] = devices()
        report["triton"] = triton()
        report["self_test"] = self_test()
    report["ok"] = report["extension"]["ok"] and all(row["ok"] for row in report["self_test"])
    return report


def show(report: dict) -> None:
    print("rf_kernels doctor")
    for title in ("versions", "extension"):
        print(f"\n{title}")
        for name, value in report[title].items():
            print(f"  {name:14s} {value}")
    print("\ndevices")
    for row in report["devices"]:
        print(f"  {row['device']:8s} {row['by'] or 'not served':20s} {row['why']}")
    print("\ntriton")
    for name, value in report["triton"].items():
        print(f"  {name:14s} {value}")
    print("\nself-test (largest difference from the float64 reference)")
    for row in report["self_test"]:
        result = (
            f"{row['error']:.1e} (bound {row['bound']:.1e})  {row['backend']}"
            if "error" in row
            else row["message"]
        )
        print(f"  {'ok  ' if row['ok'] else 'FAIL'} {row['device']:8s} {row['op']:24s} {result}")
    print("\n" + ("nothing is broken" if report["ok"] else "broken: see above"))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rf_kernels.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
