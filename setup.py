"""Drives CMake + Ninja for the one extension, rf_kernels/_C.abi3.so. No network, no third-party source in the tree.

Environment: RF_CUDA=ON|OFF|AUTO, RF_HOPPER=ON|OFF|AUTO, RF_CUDA_ARCHS="90a;80", RF_CPU_ARCH, RF_TORCH_INCLUDE, RF_CUTLASS_INCLUDE,
CMAKE_ARGS.
torch.utils.cpp_extension is not used: it cannot build CUDA sources against a CPU build of torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


def site_packages():
    """Folders of the target environment; in an isolated build they are not on sys.path, but sysconfig still names them."""
    return [Path(p) for p in dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))]


def header_folder(variable, *relative):
    """The folder named by the environment variable, else the first that exists in site-packages, else empty (CMake explains)."""
    if os.environ.get(variable):
        return os.environ[variable]
    for base in site_packages():
        if base.joinpath(*relative).is_dir():
            return str(base.joinpath(*relative))
    return ""


def commit():
    """The commit that is being built (RF_COMMIT for builds from an archive)."""
    if os.environ.get("RF_COMMIT"):
        return os.environ["RF_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if dirty else "")


class CMakeBuild(build_ext):
    """Configure once, then let Ninja decide what is out of date; `--inplace` puts the file beside the Python sources."""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("RF_BUILD_DIR", ROOT / "build" / "cmake"))
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "RF_CUDA": os.environ.get("RF_CUDA", "AUTO"),
            "RF_HOPPER": os.environ.get("RF_HOPPER", "AUTO"),
            "RF_CUDA_ARCHS": os.environ.get("RF_CUDA_ARCHS", ""),
            "RF_CPU_ARCH": os.environ.get("RF_CPU_ARCH", ""),
            "RF_TORCH_INCLUDE": header_folder("RF_TORCH_INCLUDE", "torch", "include"),
            "RF_CUTLASS_INCLUDE": header_folder("RF_CUTLASS_INCLUDE", "cutlass_library", "source", "include"),
            "RF_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "RF_VERSION": VERSION,
            "RF_COMMIT": commit(),
        }
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        # A compiler that CMake cannot find is its error to explain: the command's own text is shown, not a Python traceback.
        for command in (configure, [cmake, "--build", str(build), "--target", "_C"]):
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                sys.exit(f"setup.py: `{' '.join(command[:2])} ...` failed; its messages are above.")
        out.parent.mkdir(parents=True, exist_ok=True)
        built = build / "_C.abi3.so"
        if not out.exists() or built.stat().st_mtime_ns != out.stat().st_mtime_ns:
            out.unlink(missing_ok=True)  # never write into a file that a running process has mapped
            shutil.copy2(built, out)


setup(
    ext_modules=[Extension("rf_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
