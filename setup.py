"""Drives CMake + Ninja for the one extension, rf_kernels/_C.abi3.so. No network, no third-party source in the
tree.

Environment: RF_CUDA=ON|OFF|AUTO, RF_HOPPER=ON|OFF|AUTO, RF_CUDA_ARCHS="90a;80", RF_CPU_ARCH,
RF_LINEINFO=ON|OFF, RF_TORCH_INCLUDE, RF_CUTLASS_INCLUDE, RF_BUILD_DIR, CMAKE_ARGS; RF_COMMIT and
SOURCE_DATE_EPOCH for builds outside a checkout (docs/build.md). torch.utils.cpp_extension is not used: it
cannot build CUDA sources against a CPU build of torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
ORIGIN = ".origin"  # of a source archive: the commit and its time
BUILD = Path(os.environ.get("RF_BUILD_DIR", ROOT / "build" / "cmake"))
VERSION = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


def site_packages():
    """Folders of the target environment; in an isolated build they are not on sys.path, but sysconfig still
    names them."""
    return [Path(p) for p in dict.fromkeys(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))]


def header_folder(variable, *relative):
    """The folder named by the environment variable, else the first that exists in site-packages, else empty
    (CMake explains)."""
    if os.environ.get(variable):
        return os.environ[variable]
    for base in site_packages():
        if base.joinpath(*relative).is_dir():
            return str(base.joinpath(*relative))
    return ""


def git(*arguments):
    """What git says of this checkout; empty where there is neither."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def origin():
    """(commit, its time) of what is being built: as a source archive has recorded them, else what git
    says."""
    recorded = ROOT / ORIGIN
    if recorded.exists():
        commit, time = recorded.read_text().split()
        return commit, time if time != "-" else ""
    head = git("rev-parse", "--short=12", "HEAD")
    dirty = "+dirty" if git("status", "--porcelain", "-uno") else ""
    return head + dirty or "unknown", git("log", "-1", "--format=%ct")


# The times in a wheel are the commit's, not those at which files were checked out.
if not os.environ.get("SOURCE_DATE_EPOCH") and origin()[1]:
    os.environ["SOURCE_DATE_EPOCH"] = origin()[1]


class CMakeBuild(build_ext):
    """Configure once, then let Ninja decide what is out of date; `--inplace` puts the file beside the Python
    sources."""

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        BUILD.mkdir(parents=True, exist_ok=True)
        options = {
            "RF_CUDA": os.environ.get("RF_CUDA", "AUTO"),
            "RF_HOPPER": os.environ.get("RF_HOPPER", "AUTO"),
            "RF_CUDA_ARCHS": os.environ.get("RF_CUDA_ARCHS", ""),
            "RF_CPU_ARCH": os.environ.get("RF_CPU_ARCH", ""),
            "RF_LINEINFO": os.environ.get("RF_LINEINFO", "OFF"),
            "RF_TORCH_INCLUDE": header_folder("RF_TORCH_INCLUDE", "torch", "include"),
            "RF_CUTLASS_INCLUDE": header_folder("RF_CUTLASS_INCLUDE", "cutlass_library", "source", "include"),
            "RF_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "RF_VERSION": VERSION,
            "RF_COMMIT": os.environ.get("RF_COMMIT") or origin()[0],
        }
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(BUILD),
            "-G",
            "Ninja",
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        # A compiler that CMake cannot find is its error to explain: the command's own text is shown, not a
        # Python traceback.
        for command in (configure, [cmake, "--build", str(BUILD), "--target", "_C"]):
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                sys.exit(f"setup.py: `{' '.join(command[:2])} ...` failed; its messages are above.")
        out.parent.mkdir(parents=True, exist_ok=True)
        built = BUILD / "_C.abi3.so"
        if not out.exists() or built.stat().st_mtime_ns != out.stat().st_mtime_ns:
            out.unlink(missing_ok=True)  # never write into a file that a running process has mapped
            shutil.copy2(built, out)


class SourceArchive(sdist):
    """All that a build needs (MANIFEST.in), and what it is: an archive has no git to ask."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        Path(base_dir, ORIGIN).write_text(" ".join(part or "-" for part in origin()) + "\n")


class Wheel(bdist_wheel):
    """A wheel whose files have the same modes whatever the umask of the build and of the checkout."""

    def write_wheelfile(self, wheelfile_base, *args, **kwargs):  # the last step before everything is packed
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        tree = Path(self.bdist_dir)
        if Path(wheelfile_base).parent == tree:  # else an editable install, of which nothing is packed
            for path in tree.rglob("*"):
                path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


setup(
    ext_modules=[Extension("rf_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel, "sdist": SourceArchive},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
