"""The CPU backend under sanitizers: `make sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer (alignment included) in one build, ThreadSanitizer in another: the extension is built
with RF_SANITIZE into build/sanitize, and the configurations of tests/fuzz.py run on it in a process with the runtimes preloaded. A
planted overrun, misalignment and race must be found in such a process, else nothing was shown.

Under ThreadSanitizer PyTorch itself runs on one thread (it is not instrumented), and the parallel loops of this library, which call
PyTorch's ``torch_parallel_for``, on threads of tests/parallel_for_threads.cpp. Attention's loop over two intervals of keys calls
PyTorch's kernel from those threads.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
FOUND = 99  # exit status of a process in which a sanitizer found something
OPS = ("rope_append", "rope", "ema_evict", "dmd_gradient", "sink_window_attention", "stream")

#: Build: sanitizers, runtimes in the order they must be loaded in (their hooks need libstdc++ behind them), plants and their signs.
BUILDS = {
    "memory": ("address,undefined", ("libasan.so", "libubsan.so", "libstdc++.so"),
               {"overrun": "heap-buffer-overflow", "misaligned": "misaligned address"}),
    "threads": ("thread", ("libtsan.so", "libstdc++.so"), {"race": "data race"}),
}  # fmt: skip


def package_of(kind: str) -> Path:
    return BUILD / kind / "package"


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(kind: str) -> None:
    """The package with an instrumented extension: Python files are links to the sources."""
    sanitizers, folder = BUILDS[kind][0], BUILD / kind
    env = os.environ | {
        "RF_CUDA": "OFF",
        "RF_BUILD_DIR": str(folder / "cmake"),
        "CMAKE_ARGS": f"-DRF_SANITIZE={sanitizers}",
    }
    library, package = folder / "library", package_of(kind) / "rf_kernels"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", library], cwd=ROOT, env=env, check=True
    )
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "rf_kernels").iterdir():
        if source.suffix != ".so" and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (package / "_C.abi3.so").symlink_to(next((library / "rf_kernels").glob("_C*.so")))
    if kind == "threads":
        command = [compiler(), "-std=c++20", "-O1", "-g1", "-shared", "-fPIC", "-fsanitize=thread"]
        source = ROOT / "tests" / "parallel_for_threads.cpp"
        subprocess.run([*command, source, "-o", folder / "libparallel_for.so"], check=True)


def preload(kind: str) -> str:
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in BUILDS[kind][1]
    ]
    missing = [name for name in found if not os.path.isabs(name)]
    if missing:
        sys.exit(f"sanitize: {compiler()} has no {missing}; install its sanitizer runtimes")
    return ":".join(found + ([str(BUILD / kind / "libparallel_for.so")] if kind == "threads" else []))


def child(kind: str, *arguments) -> subprocess.CompletedProcess:
    env = os.environ | {
        "LD_PRELOAD": preload(kind),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}:allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
        "TSAN_OPTIONS": f"exitcode={FOUND}:halt_on_error=1:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1" if kind == "threads" else "2",
    }
    # ThreadSanitizer's shadow wants a fixed layout of the address space.
    fixed = ["setarch", "-R"] if kind == "threads" else []
    command = [*fixed, sys.executable, __file__, "--child", kind, *map(str, arguments)]
    return subprocess.run(command, cwd=BUILD, env=env, capture_output=True, text=True)


def lying_tensor(offset: int):
    """2048 floats claimed of memory that holds 1024, or from an address that no float has."""
    import torch

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    address = libc.malloc(4096 if offset == 0 else 16384)
    floats = (ctypes.c_float * 2048).from_address(address + offset)
    return torch.frombuffer(floats, dtype=torch.float32)


def plant(what: str) -> None:
    import torch

    import rf_kernels as rf

    if what == "race":  # two threads append to one cache
        q, k, v = (torch.randn(1, 4096, 8, 64) for _ in range(3))
        k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
        slots = torch.arange(4, dtype=torch.int32)

        def append():
            for _ in range(20):
                rf.rope_append(q, k, v, k_cache, v_cache, slots=slots)

        threads = [threading.Thread(target=append) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        x = lying_tensor(offset=0 if what == "overrun" else 1).view(1, 2, 1, 1024)
        rf.rope(x, angles=torch.ones(1, 2, 2), axes=[2, 1, 0])


def run_child(kind: str, what: str, first: int, last: int) -> None:
    sys.path[:0] = [str(package_of(kind)), str(ROOT / "tests")]
    import torch

    import rf_kernels

    assert Path(rf_kernels.__file__).is_relative_to(package_of(kind)), rf_kernels.__file__
    torch.set_num_threads(1 if kind == "threads" else 2)
    if what not in OPS:
        return plant(what)
    import fuzz

    failures = fuzz.run(what, range(first, last))
    if failures:
        sys.exit("\n".join(failures))


def check(kind: str, first: str, last: str) -> int:
    """Build, plant, run; the number of things that went wrong."""
    start = time.time()
    build(kind)
    print(f"sanitize: {kind}: {BUILDS[kind][0]}, built in {time.time() - start:.0f} s", flush=True)
    bad = 0
    for what, sign in BUILDS[kind][2].items():
        done = child(kind, what, 0, 0)
        found = done.returncode == FOUND and sign in done.stderr
        print(f"sanitize: {kind}: planted {what}: {'found' if found else 'NOT FOUND'}", flush=True)
        if not found:
            print(done.returncode, done.stderr[-2000:])
        bad += not found
    for op in OPS:
        start = time.time()
        done = child(kind, op, first, last)
        verdict = "no finding" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"sanitize: {kind}: {op}: seeds {first}:{last}, {verdict}, {time.time() - start:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout[-1000:], done.stderr[:6000])
        bad += done.returncode != 0
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:300", help="first:last+1 of tests/fuzz.py")
    parser.add_argument("--kind", choices=[*BUILDS, "all"], default="all")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, what, first, last = arguments.child
        run_child(kind, what, int(first), int(last))
        return 0
    kinds = list(BUILDS) if arguments.kind == "all" else [arguments.kind]
    return 1 if sum(check(kind, *arguments.seeds.split(":")) for kind in kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
