"""The CPU backend under sanitizers: `make sanitize` (tests/contracts/reports/sanitize.json is what it wrote),
`make sanitize SAMPLE=1` in CI.

AddressSanitizer and UndefinedBehaviorSanitizer (alignment included) in one build, ThreadSanitizer in another:
the extension is built with RF_SANITIZE into build/sanitize, and the configurations of tests/helpers/fuzz.py
and the wrong calls of tests/helpers/refusals.py run on it in a process with the runtimes preloaded. A planted
overrun, misalignment and races must be found in such a process, else nothing was shown; and every operator
must have run in every dtype, its kinds of work (KINDS) included.

Under ThreadSanitizer PyTorch itself runs on one thread (it is not instrumented), and the parallel loops of
this library, which call PyTorch's ``torch_parallel_for``, on threads of
tests/helpers/parallel_for_threads.cpp. Attention's loop over two intervals of keys calls PyTorch's kernel
from those threads.
"""

import argparse
import collections
import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from helpers.provenance import provenance, write

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
FOUND = 99  # exit status of a process in which a sanitizer found something
OPS = ("rope_append", "rope", "ema_evict", "dmd_gradient", "sink_window_attention", "stream", "refusals")

_DTYPES, _HALF = ("float64", "float32", "bfloat16", "float16"), ("bfloat16", "float16")
_SEEN = ("a prefix", "no key", "one interval", "two intervals")
_WIDTHS = ("vectors of 64", "vectors of 32", "vectors of 8", "scalar")
_STATES = [*product(_DTYPES, ["published"]), *product(_HALF, ["compensated", "float32"])]
#: What every run must have reached, as `label` says it.
KINDS = {
    *(
        f"{op} {dtype}"
        for op in ("rope", "rope_append", "rope_append_check", "dmd_gradient")
        for dtype in _DTYPES
    ),
    *(
        f"{op} {dtype}, {seen}"
        for op in ("sink_window_attention", "sink_window_attention_backward")
        for dtype in _DTYPES
        for seen in _SEEN
    ),
    *(f"ema_evict {dtype}, {state}, {width}" for dtype, state in _STATES for width in _WIDTHS),
}

#: Build: sanitizers, runtimes in the order they must be loaded in (their hooks need libstdc++ behind them),
#: plants and their signs.
BUILDS = {
    "memory": (
        "address,undefined",
        ("libasan.so", "libubsan.so", "libstdc++.so"),
        {"overrun": "heap-buffer-overflow", "misaligned": "misaligned address"},
    ),
    "threads": (
        "thread",
        ("libtsan.so", "libstdc++.so"),
        {"race of calls": "data race", "race in a loop": "data race"},
    ),
}


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
        source = Path(__file__).with_name("parallel_for_threads.cpp")
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

    if what == "race in a loop":
        ctypes.CDLL(None).racing_loop()
    elif what == "race of calls":  # two threads append to one cache
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


def label(name: str, arguments: dict) -> set[str]:
    """What a call of a registered operator was, for the list of what was reached."""
    import rf_kernels as rf

    dtype = str(next(iter(arguments.values())).dtype).removeprefix("torch.")
    call = f"{name} {dtype}"
    if name.startswith("sink_window_attention"):
        ends, few = arguments["chunk_ends"], arguments["num_sink_tokens"]
        if ends is None:
            return {f"{call}, a prefix"}
        window = ends[-1] if arguments["num_window_tokens"] is None else arguments["num_window_tokens"]
        apart = [(few > 0) + (window > 0) if few < end - window else int(few + window > 0) for end in ends]
        return {f"{call}, {_SEEN[1 + count]}" for count in apart}
    if name == "ema_evict":
        state = ("compensated", "float32", "published")[arguments["state"]] if dtype in _HALF else "published"
        return {f"{call}, {state}, {rf.last_dispatch().reason.split(':')[0]}"}
    return {call}


def refuse(reached) -> list[str]:
    """The wrong calls of tests/helpers/refusals.py: refused, and nothing touched on the way."""
    import rf_kernels as rf
    from helpers import refusals

    accepted = []
    for function, argument, what, edit in refusals.op_entries():
        call = dict(getattr(refusals.World(), function))
        edit(call)
        try:
            getattr(rf, function)(**call)
            accepted.append(f"{function}: {argument}: {what}: accepted")
        except rf.ArgumentError:
            reached["wrong calls"] += 1
    return accepted


def run_child(kind: str, what: str, first: int, last: int) -> None:
    sys.path[:0] = [str(package_of(kind)), str(ROOT / "tests")]
    import torch

    import rf_kernels

    assert Path(rf_kernels.__file__).is_relative_to(package_of(kind)), rf_kernels.__file__
    torch.set_num_threads(1 if kind == "threads" else 2)
    if what not in OPS:
        return plant(what)
    from torch.utils._python_dispatch import TorchDispatchMode

    from helpers import fuzz

    reached = collections.Counter()

    class Reached(TorchDispatchMode):  # below autograd: backward operators pass here too
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if operator.namespace == "rf_kernels" and args:
                names = [argument.name for argument in operator._schema.arguments]
                full = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | (kwargs or {})
                reached.update(label(operator._schema.name.split("::")[1], full))
            return result

    with Reached():
        failures = refuse(reached) if what == "refusals" else fuzz.run(what, range(first, last))
    if failures:
        sys.exit("\n".join(failures))
    if kind == "threads" and what != "refusals" and not ctypes.CDLL(None).threads_started():
        sys.exit("no loop of the library ran on the threads of tests/helpers/parallel_for_threads.cpp")
    print(json.dumps(reached))


def check(kind: str, first: int, last: int) -> dict:
    """Build, plant, run: what was found, how often each kind of call ran, and how many things went wrong."""
    start = time.time()
    build(kind)
    print(f"sanitize: {kind}: {BUILDS[kind][0]}, built in {time.time() - start:.0f} s", flush=True)
    report = {"sanitizers": BUILDS[kind][0], "planted": {}, "configurations": {}, "findings": 0, "calls": {}}
    for what, sign in BUILDS[kind][2].items():
        done = child(kind, what, 0, 0)
        found = done.returncode == FOUND and sign in done.stderr
        print(f"sanitize: {kind}: planted {what}: {'found' if found else 'NOT FOUND'}", flush=True)
        if not found:
            print(done.returncode, done.stderr[-2000:])
        report["planted"][what] = "found" if found else "NOT FOUND"
    start, reached = time.time(), collections.Counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = pool.map(lambda op: child(kind, op, first, last), OPS)
    for op, done in zip(OPS, runs, strict=True):
        verdict = "no finding" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"sanitize: {kind}: {op}: {verdict}", flush=True)
        if done.returncode:
            print(done.stdout[-1000:], done.stderr[:6000])
        else:
            calls = json.loads(done.stdout.splitlines()[-1])
            report["configurations"][op] = calls.pop("wrong calls", last - first)
            reached.update(calls)
        report["findings"] += done.returncode != 0
    print(f"sanitize: {kind}: ran in {time.time() - start:.0f} s", flush=True)
    report["calls"] = dict(sorted(reached.items()))
    report["not reached"] = sorted(KINDS - set(reached))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:600", help="first:last+1 of tests/helpers/fuzz.py")
    parser.add_argument("--kind", choices=[*BUILDS, "all"], default="all")
    parser.add_argument("--sample", action="store_true", help="few seeds: kinds of calls may be missing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was found as JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, what, first, last = arguments.child
        run_child(kind, what, int(first), int(last))
        return 0
    first, last = map(int, arguments.seeds.split(":"))
    version = subprocess.run(
        [compiler(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    facts = {
        "command": " ".join(["python", "tests/helpers/sanitize.py", *sys.argv[1:]]),
        **provenance("torch"),
        "compiler": version,
        "seeds": [first, last],
    }
    kinds = list(BUILDS) if arguments.kind == "all" else [arguments.kind]
    builds = {kind: check(kind, first, last) for kind in kinds}
    if arguments.report:
        write(arguments.report, facts | {"builds": builds})
    bad = sum(
        b["findings"] + sum(found != "found" for found in b["planted"].values()) for b in builds.values()
    )
    for kind, report in builds.items():
        missing = report["not reached"]
        if missing and not arguments.sample:
            print(f"sanitize: {kind}: not reached: {', '.join(missing)}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
