"""One extension, many Pythons and PyTorches: `make check-versions VERSIONS="python3.10:2.10.0 python3.12:2.11.0"`.

Each pair gets an environment of its own in build/versions, and there the tests run on the one `rf_kernels/_C.abi3.so` that `make ext`
built, whatever it was built with. Prints one line a pair: versions, and what pytest counted. Fails where a test does.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from check_install import ROOT, run

#: What the tests need beside PyTorch; the chip model builds with what it finds, and CUTLASS's layouts are compared where CUTLASS is.
TEST_PACKAGES = ("numpy", "safetensors", "pytest", "tqdm", "matplotlib", "imageio", "pillow", "nvtx", "pybind11",
                 "cmake", "ninja", "sphinx", "ruff==0.17.5", "tomli")  # fmt: skip


def environment(interpreter, torch):
    """The Python of an environment with that PyTorch, made anew only where there is none."""
    folder = ROOT / "build" / "versions" / f"{Path(interpreter).name}-torch-{torch}"
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        run(interpreter, "-m", "venv", "--clear", folder)
        run(python, "-m", "pip", "install", "-q", f"torch=={torch}", *TEST_PACKAGES)
        (folder / ".complete").touch()
    return python


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="INTERPRETER:TORCH", help="python3.12:2.11.0")
    parser.add_argument("--select", default="not heavy", help="pytest's -m (default: the everyday run)")
    arguments = parser.parse_args()
    library = ROOT / "rf_kernels" / "_C.abi3.so"
    if not library.exists():
        sys.exit("check-versions: no rf_kernels/_C.abi3.so; run `make ext` first")
    lines, failed = [], False
    for pair in arguments.versions:
        interpreter, colon, torch = pair.rpartition(":")
        if not colon:
            parser.error(f"{pair!r}: expected INTERPRETER:TORCH, e.g. python3.12:2.11.0")
        python = environment(interpreter, torch)
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        about = "import sys, torch; print('Python', sys.version.split()[0] + ', PyTorch', torch.__version__)"
        name = run(python, "-c", about, env=env).stdout.strip()
        print(f"check-versions: {name}", flush=True)
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", arguments.select, "tests"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            failed = True
            print(done.stdout[-20000:], done.stderr[-4000:], sep="\n")
        lines.append(
            f"{name}: {done.stdout.strip().splitlines()[-1].strip('= ') if done.stdout.strip() else 'no output'}"
        )
    print(*lines, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
