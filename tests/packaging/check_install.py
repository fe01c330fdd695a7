"""The ways of building and installing, each tried for real: `make check-install` (CI runs it; it takes minutes, so pytest does not).

1. RF_CUDA=ON without nvcc is refused, and the message says what to install.
2. A build without nvcc: `pip install` of the source archive (setup.py sdist), isolated, into a fresh environment that has torch; the
   doctor and a streamed smoke test pass there, outside the source tree, and the binary knows its commit.
3. The wheel of `make wheel`: tagged cp310-abi3, passes abi3audit, needs only the libraries and symbols of an allow-list; installed
   into that environment it passes the same doctor and smoke test.
4. Both installations carry an SBOM that says what the binary itself says.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What the binary may expect from its process: torch's C shims, Python's limited API, and the C and C++ runtimes.
NEEDED = {"libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2",
          "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
SYMBOLS = ("torch_", "aoti_torch_", "PyModule_Create2", "_ITM_", "__gmon_start__", "__cxa_finalize")
VERSIONED = ("@GLIBC", "@GLIBCXX", "@CXXABI", "@GCC")


def say(text):
    print(f"check-install: {text}", flush=True)


def run(*command, cwd=None, env=None, check=True):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if check and done.returncode != 0:
        sys.exit(
            f"check-install: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}"
        )
    return done


def without_nvcc(env):
    """The environment with every folder that holds an nvcc taken off PATH."""
    folders = [p for p in env["PATH"].split(os.pathsep) if p and not Path(p, "nvcc").exists()]
    clean = {k: v for k, v in env.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "RF_CUDA")}
    return clean | {"PATH": os.pathsep.join(folders)}


def check_refusal(scratch):
    env = without_nvcc(os.environ) | {"RF_CUDA": "ON", "RF_BUILD_DIR": str(scratch / "refused")}
    done = run(
        sys.executable, "setup.py", "-q", "build_ext", "--build-lib", scratch / "lib", cwd=ROOT, env=env, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "no nvcc was found" in text and "Install the CUDA toolkit" in text, text
    say("RF_CUDA=ON without nvcc is refused, with what to install")


def check_environment(python, scratch, expect_cuda):
    """The doctor and the smoke test, from a folder that is not the source tree; the facts of the build."""
    for name in ("smoke.py", "sbom_tools.py"):
        shutil.copy(Path(__file__).with_name(name), scratch)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    doctor = run(python, "-m", "rf_kernels.doctor", cwd=scratch, env=env)
    print(doctor.stdout)
    ask = "import json, rf_kernels; print(json.dumps({'file': rf_kernels.__file__} | rf_kernels.build_info()))"
    info = json.loads(run(python, "-c", ask, cwd=scratch, env=env).stdout)
    assert str(ROOT) not in info["file"], info
    assert (info["nvcc"] != "none") == expect_cuda, info
    for script in ("smoke.py", "sbom_tools.py"):
        print(run(python, scratch / script, cwd=scratch, env=env).stdout, end="")
    return info


def check_binary(path):
    dynamic = run("readelf", "-d", path).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= NEEDED, f"unexpected libraries: {needed - NEEDED}"
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).stdout.splitlines()]
    strange = [s for s in undefined if not s.startswith(SYMBOLS) and not any(v in s for v in VERSIONED)]
    assert not strange, f"undefined symbols outside the allow-list: {strange}"
    say(f"{path.name}: {len(undefined)} undefined symbols, all of the allow-list; needs {', '.join(sorted(needed))}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", default="torch==2.13.0")
    arguments = parser.parse_args()
    has_nvcc = shutil.which("nvcc") is not None
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        check_refusal(scratch)

        run(sys.executable, "-m", "venv", scratch / "venv")
        python = scratch / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", arguments.torch, "numpy", "safetensors")
        # The archive, not the tree: that it holds all that a build needs shows only where there is nothing else.
        run(sys.executable, "setup.py", "-q", "sdist", "-d", scratch / "archive", cwd=ROOT)
        (archive,) = (scratch / "archive").glob("rf_kernels-*.tar.gz")
        env = {k: v for k, v in without_nvcc(os.environ).items() if k not in ("RF_COMMIT", "SOURCE_DATE_EPOCH")}
        run(python, "-m", "pip", "install", "-q", archive, cwd=scratch, env=env)
        info = check_environment(python, scratch, expect_cuda=False)
        head = run("git", "rev-parse", "--short=12", "HEAD", cwd=ROOT).stdout.strip()
        assert info["commit"].removesuffix("+dirty") == head, (info["commit"], head)
        say(f"`pip install` of {archive.name} ({archive.stat().st_size} bytes), isolated and without nvcc, works")

        wheels = sorted((ROOT / "dist").glob("rf_kernels-*.whl"))
        assert len(wheels) == 1 and "cp310-abi3" in wheels[0].name, wheels
        run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheels[0])
        check_environment(python, scratch, expect_cuda=has_nvcc)
        say(f"{wheels[0].name} works in a fresh environment")

        with zipfile.ZipFile(wheels[0]) as archive:
            names = archive.namelist()
            archive.extract("rf_kernels/_C.abi3.so", scratch)
        assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/"))], names
        check_binary(scratch / "rf_kernels" / "_C.abi3.so")
        audit = run(
            Path(sys.executable).parent / "abi3audit",
            "--strict",
            "--summary",
            "--assume-minimum-abi3",
            "3.10",
            wheels[0],
        )
        say("abi3audit: " + " ".join((audit.stdout + audit.stderr).split()[1:]))


if __name__ == "__main__":
    main()
