"""The tests on trial: `make mutants` plants the faults of tests/mutants/faults one by one and asks whether a test notices.

The tracked files, uncommitted changes included, are copied to build/mutants; the user's tree is not touched. There the CPU backend is
built as for release (RF_CUDA=OFF), one fault at a time, incrementally. A fault is caught when, on a tree whose tests all pass without
it, a test fails, the process dies or the tests do not end in time. Three stages: the test files nearest to the source (RELATED), the
rest of the everyday run, the heavy tests of the nearest files; the first alone where the catalogue says why a fault changes nothing. A
fault that does not compile, or whose package cannot be imported, is
an error of the catalogue and counts for nothing.

What makes a result mean something:

- The tests pass without a fault, in the same place: all of them before the first fault is planted, or (`--sample`, `--only`, `--near`)
  those that failed with one, afterwards.
- Only tests of behaviour run: none that reads sources or documents (APART).
- The extension that the tests import is the one that was built with the fault: its hash is compared in the process of the tests. A
  second build of unchanged sources gives the same hash (checked), and a report says where a fault left it as it was: there, the tests
  that compile a kernel for the host must notice.
- A test that fails because it cannot compile the source shows nothing either.
- No byte code is cached: a fault of the same length in the same second would otherwise not be seen.

Results are kept in build/mutants/results.json and used again as long as the file of the fault and the test that caught it have not
changed (for a survivor: no source and no test). `--report` writes tests/mutants/report.md from them. Less than 98% caught, or a
survivor without a reason, is a failure.
"""

import argparse
import ast
import datetime
import functools
import hashlib
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import catalogue

ROOT = catalogue.ROOT
BUILD = ROOT / "build" / "mutants"
RESULTS = BUILD / "results.json"
REPORT = ROOT / "tests" / "mutants" / "report.md"
SOURCES = ("csrc/", "rf_kernels/", "python/", "CMakeLists.txt", "setup.py", "pyproject.toml")
LEAST_CAUGHT = 0.98
NOT_THE_BUILD, NO_IMPORT, NO_TESTS = 97, 98, 5  # exit statuses of a process that showed nothing
LIMIT = {"related": 300, "everyday": 1200, "heavy": 1200}  # seconds: several times what the tests take

#: Test files that look at sources, documents, tools or oracles, not at what the library computes.
APART = {
    "test_audit", "test_bench", "test_build", "test_chip_model", "test_docs", "test_doctor", "test_golden_cases",
    "test_golden_published", "test_gpu_suite", "test_house", "test_mutants", "test_promise_reports", "test_published",
    "test_schedule_model", "test_tuning",
}  # fmt: skip

_ROPE = "rope_append rope_append_contract fakes"
_CACHE = "cache golden promise_isolation promise_nonfinite promise_refusals promise_hostile model"
#: The tests nearest to a source, by the longest prefix of its path.
RELATED = {
    "csrc/math/convert.h": _ROPE,
    "csrc/math/dtype.h": "ema_evict rope_append rope_append_kernel dmd_gradient promise_nonfinite ema_evict_kernel",
    "csrc/math/ema.h": "ema_evict rounding ema_evict_kernel fuzz",
    "csrc/math/guidance.h": "dmd_gradient rounding dmd_gradient_kernel fuzz",
    "csrc/math/key_intervals.h": "sink_window_attention tile_schedule fuzz",
    "csrc/math/lse_merge.h": "sink_window_attention fuzz",
    "csrc/math/online_softmax.h": "sink_window_attention_sm90",
    "csrc/math/rope.h": _ROPE + " rounding rope_append_kernel",
    "csrc/math/rounding.h": "rounding ema_evict rope_append",
    "csrc/math/tile_": "tile_schedule sink_window_attention_sm90",
    "csrc/math/vec.h": "ema_evict ema_evict_kernel",
    "csrc/common/": "operator_refusals promise_refusals rope_append_contract ema_evict_errors sink_window_attention",
    "csrc/rope_append/": _ROPE + " rope_append_kernel promise_refusals fuzz promise_int64 promise_guard_pages",
    "csrc/ema_evict/": "ema_evict ema_evict_errors ema_evict_kernel promise_refusals fuzz",
    "csrc/dmd_gradient/": "dmd_gradient dmd_gradient_kernel promise_refusals fuzz promise_int64",
    "csrc/sink_window_attention/": "sink_window_attention operator_refusals rounding fakes promise_refusals promise_poison fuzz",
    "rf_kernels/ops/rope_append.py": _ROPE + " promise_refusals fuzz",
    "rf_kernels/ops/ema_evict.py": "ema_evict ema_evict_errors promise_refusals",
    "rf_kernels/ops/dmd_gradient.py": "dmd_gradient promise_refusals fuzz",
    "rf_kernels/ops/sink_window_attention.py": "sink_window_attention fakes promise_refusals fuzz",
    "rf_kernels/_backend.py": "promise_refusals rope_append_contract",
    "rf_kernels/cache.py": _CACHE,
    "rf_kernels/plan.py": _CACHE,
    "rf_kernels/positions.py": "rope_append cache golden",
    "python/reward_forcing/losses.py": "losses golden model promise_refusals",
    "python/reward_forcing/scheduler.py": "losses model golden",
    "python/reward_forcing/pipeline/": "model golden promise_isolation demo",
}


def related(file: str) -> list[str]:
    prefix = max((p for p in RELATED if file.startswith(p)), key=len)
    return [f"tests/test_{name}.py" for name in RELATED[prefix].split()]


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(name for name in set(listing.stdout.splitlines()) if (ROOT / name).is_file())


def digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def digest_of(names) -> str:
    return digest(*(part for name in sorted(names) for part in (name.encode(), (ROOT / name).read_bytes())))


@functools.cache
def test_alone(file: str, name: str) -> str:
    """Digest of one test with all that is not a test in its file."""
    text = (ROOT / file).read_text()
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name != name:
            del lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno]
    return digest(*(line.encode() for line in lines if line.strip()))


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", *SOURCES, "tests"], capture_output=True, text=True
    ).stdout
    mine = ("tests/mutants/", "tests/test_mutants.py")
    return head + ("+dirty" if any(not line[3:].startswith(mine) for line in dirty.splitlines()) else "")


class Place:
    """A copy of the tree with a build of its own, in which one fault is planted at a time."""

    def __init__(self, number: int, threads: int):
        self.root = BUILD / f"work{number}"
        self.threads = threads
        self.extension = self.root / "rf_kernels" / "_C.abi3.so"
        self.cmake = self.root / "build" / "cmake"
        self.sound, self.sound_hash = self.root / "build" / "sound.abi3.so", ""
        self.touched = False  # whether sources differ from those of the last build

    def copy_tree(self) -> None:
        names = set(tracked())
        for path in self.root.rglob("*") if self.root.exists() else ():
            name = str(path.relative_to(self.root))
            if path.is_file() and not name.startswith("build/") and name not in names:
                path.unlink()
        for name in names:
            source, target = ROOT / name, self.root / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def env(self) -> dict:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS", "RF_STRICT")}
        return env | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(self.threads),
            "RF_CUDA": "OFF",
            "RF_BUILD_DIR": str(self.cmake),
            "RF_COMMIT": "mutants",
        }

    def command(self, command, limit: float, log: Path) -> int:
        """Exit status; None when it did not end in time. The whole process group ends with it."""
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.env(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    @property
    def log(self) -> Path:
        return self.root / "build" / "log"

    def build(self) -> bool:
        if self.command(["cmake", "--build", str(self.cmake), "--target", "_C"], 1200, self.log) != 0:
            return False
        self.install(self.cmake / "_C.abi3.so")
        return True

    def install(self, library: Path) -> None:
        self.extension.unlink(missing_ok=True)
        shutil.copyfile(library, self.extension)

    def hash(self) -> str:
        return digest(self.extension.read_bytes())

    def prepare(self) -> None:
        """The sound build, and that its hash tells a changed source from an unchanged one."""
        self.copy_tree()
        self.cmake.mkdir(parents=True, exist_ok=True)
        library = self.root / "build" / "library"
        setup = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(library)]
        if self.command(setup, 1800, self.log) != 0:
            sys.exit("mutants: the tree does not build\n" + self.log.read_text()[-4000:])
        self.install(self.cmake / "_C.abi3.so")
        self.sound_hash = self.hash()
        os.utime(self.root / "csrc" / "ema_evict" / "cpu.cpp")
        if not self.build() or self.hash() != self.sound_hash:
            sys.exit("mutants: a second build of the same sources gives other bytes: hashes would show nothing")
        shutil.copyfile(self.extension, self.sound)

    def test(self, stage: str, files, *options) -> tuple[str, str, str]:
        """("passed", "", ""), ("failed", the test, how if not by an assertion) or ("error", the test, why nothing was shown)."""
        progress = self.root / "build" / "progress"
        progress.unlink(missing_ok=True)
        child = [sys.executable, "tests/mutants/run.py", "--child", str(progress), self.hash()]
        status = self.command([*child, *files, "-x", *options], LIMIT[stage], self.log)
        words = progress.read_text().splitlines()[-1].split(" ", 1) if progress.exists() else ["", ""]
        if status == 0:
            return "passed", "", ""
        if words[0] == "unbuilt":
            return "error", words[1], "its C++ does not compile"
        if status in (1, 2) and words[0] in ("failed", "uncollected"):
            return "failed", words[1], "" if words[0] == "failed" else "not collected"
        if status is None:
            return "failed", words[1], "did not end"
        if status < 0 and words[0]:
            return "failed", words[1], signal.Signals(-status).name
        return "error", words[1], f"{stage}: exit status {status}\n{self.log.read_text()[-2000:]}"

    def try_fault(self, fault: catalogue.Fault, everyday, near_only: bool) -> dict:
        """Plant, build, test, restore."""
        path = self.root / fault.file
        text = path.read_text()
        path.write_text(fault.planted_in(text))
        try:
            if fault.compiled and not self.build():
                return {"verdict": "error", "by": "", "how": "does not compile\n" + self.log.read_text()[-2000:]}
            same = fault.compiled and self.hash() == self.sound_hash
            near = related(fault.file)
            rest = [name for name in everyday if name not in near]
            for stage, files, options in (
                ("related", near, ("-m", "not heavy")),
                ("everyday", rest, ("-m", "not heavy")),
                ("heavy", near, ("-m", "heavy")),
            ):
                outcome, by, how = self.test(stage, files, *options)
                if outcome != "passed":
                    verdict = "caught" if outcome == "failed" else "error"
                    return {"verdict": verdict, "by": by, "how": how, "stage": stage, "same_extension": same}
                if fault.equivalent:  # a reason, not more tests
                    return {"verdict": "survived", "by": "", "same_extension": same}
                if near_only:
                    return {"verdict": "open", "by": ""}
            return {"verdict": "survived", "by": "", "same_extension": same}
        finally:
            path.write_text(text)
            self.install(self.sound)


class Progress:
    """Writes down which test runs, so that a process that dies can be asked what it died of."""

    def __init__(self, path: str):
        self.path = Path(path)

    def say(self, *words: str) -> None:
        with self.path.open("a") as out:
            print(*words, file=out)

    def pytest_runtest_logstart(self, nodeid):
        self.say("running", nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            text = report.longreprtext
            unbuilt = "building _chip failed" in text or ("CalledProcessError" in text and "-std=c++20" in text)
            self.say("unbuilt" if unbuilt else "failed", report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.say("uncollected", report.nodeid)


def run_child(progress: str, expected: str, arguments) -> int:
    """In the process of the tests: that they test what was built, then pytest."""
    root = Path.cwd()
    sys.path[:0] = [str(root), str(root / "python")]
    try:
        import pytest
        import reward_forcing

        import rf_kernels
    except ImportError as error:
        print(error)
        return NO_IMPORT
    for module in (rf_kernels, rf_kernels._C, reward_forcing):
        if not Path(module.__file__).is_relative_to(root):
            print("not from here:", module.__file__)
            return NOT_THE_BUILD
    if digest(Path(rf_kernels._C.__file__).read_bytes()) != expected:
        return NOT_THE_BUILD
    quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return int(pytest.main([*quiet, *arguments], plugins=[Progress(progress)]))


class Trial:
    """All results, the old ones that still hold included."""

    def __init__(self, faults):
        names = tracked()
        self.names = names
        self.sources = digest_of(n for n in names if n.startswith(SOURCES))
        mine = ("tests/mutants/", "tests/test_mutants.py")
        self.tests = digest_of(n for n in names if n.startswith("tests/") and not n.startswith(mine))
        self.everyday = [n for n in names if Path(n).match("tests/test_*.py") and Path(n).stem not in APART]
        self.faults, self.lock = faults, threading.Lock()
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def key(self, fault, by: str) -> str:
        """What a result depends on: the fault, its file and the test that caught it; else all sources and all tests."""
        file, _, test = by.partition("::")
        if file in self.names:
            seen = digest_of([fault.file]) + test_alone(file, test.split("[")[0])
        else:
            seen = self.sources + self.tests
        return digest(repr((fault.file, fault.old, fault.new)).encode(), seen.encode())

    def result(self, fault) -> dict | None:
        found = self.results.get(fault.id)
        return found if found and found["key"] == self.key(fault, found["by"]) else None

    def known(self, fault, near_only: bool) -> bool:
        return (self.result(fault) or {}).get("verdict") in ("caught", "survived", *(("open",) if near_only else ()))

    def keep(self, fault, result: dict) -> None:
        with self.lock:
            self.results[fault.id] = result | {"key": self.key(fault, result["by"])}
            self.write()

    def baseline_passes(self, place: Place) -> None:
        """Everything that judges passes without a fault."""
        outcome, by, how = place.test("everyday", self.everyday, "-m", "not heavy")
        if outcome != "passed":
            sys.exit(f"mutants: without a fault, the tests do not pass: {by} {how}")
        self.results["baseline"] = {"key": self.baseline_key()}
        self.write()

    def baseline_key(self) -> str:
        return digest(self.sources.encode(), self.tests.encode(), repr(self.everyday).encode())

    def control_passes(self, place: Place, faults) -> None:
        """The tests that have failed with a fault pass without."""
        judges = sorted({r["by"] for fault in faults if (r := self.results[fault.id])["verdict"] == "caught"})
        outcome, by, how = place.test("everyday", judges, "-m", "") if judges else ("passed", "", "")
        if outcome != "passed":
            self.results = {name: result for name, result in self.results.items() if result.get("by") != by}
            self.write()
            sys.exit(f"mutants: this fails without a fault as well: {by} {how}")

    def write(self) -> None:
        RESULTS.write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n")

    def run(self, jobs: int, full: bool, near_only: bool) -> None:
        todo = [fault for fault in self.faults if not self.known(fault, near_only)]
        print(f"mutants: {len(self.faults)} faults, {len(self.faults) - len(todo)} results still hold", flush=True)
        partial = not full
        full = full and self.results.get("baseline", {}).get("key") != self.baseline_key()
        if not todo and not full:
            return
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        groups = queue.Queue()  # the faults of a file together: its objects are then compiled once a fault
        for file in sorted(dict.fromkeys(fault.file for fault in todo), key=lambda file: not file.endswith(".py")):
            groups.put([fault for fault in todo if fault.file == file])
        places = [Place(i, threads) for i in range(max(1, min(jobs, groups.qsize())))]
        for place in places:
            place.prepare()
        if full:
            self.baseline_passes(places[0])

        def work(place):
            while True:
                try:
                    group = groups.get_nowait()
                except queue.Empty:
                    return
                for fault in group:
                    start = time.time()
                    result = place.try_fault(fault, self.everyday, near_only)
                    self.keep(fault, result)
                    seconds, how = time.time() - start, result.get("how", "")
                    print(f"{result['verdict']:9}{seconds:5.0f} s  {fault.id}: {result['by']} {how}", flush=True)

        workers = [threading.Thread(target=work, args=(place,)) for place in places]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if partial:
            self.control_passes(places[0], todo)

    def judge(self) -> int:
        """Prints the figure; the number of things that are not as they must be."""
        found = {fault.id: self.result(fault) for fault in self.faults}
        verdicts = {name: result["verdict"] if result else "not run" for name, result in found.items()}
        caught = sum(verdict == "caught" for verdict in verdicts.values())
        share = caught / len(self.faults)
        print(f"mutants: {caught} of {len(self.faults)} caught ({share:.1%})")
        bad = [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict not in ("caught", "survived")]
        for fault in self.faults:
            if verdicts[fault.id] == "survived" and not fault.equivalent:
                bad.append(f"{fault.id}: survived: {fault.file}: {fault.breaks}")
            if verdicts[fault.id] == "caught" and fault.equivalent:
                bad.append(f"{fault.id}: caught, although it is said to change nothing")
        if share < LEAST_CAUGHT:
            bad.append(f"less than {LEAST_CAUGHT:.0%} caught")
        print(*bad, sep="\n")
        return len(bad)


def compiler() -> str:
    version = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
    return version.stdout.splitlines()[0] if version.stdout else "unknown"


def report(trial: Trial) -> str:
    """The committed report: no times, so that a rerun of the same commit writes the same file (but for its date)."""
    from importlib.metadata import version

    faults = trial.faults
    rows = [(fault, trial.result(fault)) for fault in faults]
    caught = sum(result["verdict"] == "caught" for _, result in rows)
    stages = {stage: sum(r.get("stage") == stage and r["verdict"] == "caught" for _, r in rows) for stage in LIMIT}
    lines = [
        "# Planted faults",
        "",
        "Written by `make mutants` (tests/mutants/run.py says how, and what counts as caught). Do not edit. A result of an earlier run "
        "is used where neither the file of the fault nor the test that caught it has changed since.",
        "",
        f"- commit {commit()}, {datetime.date.today().isoformat()}",
        f"- Python {platform.python_version()}, PyTorch {version('torch')}, {compiler()}, {platform.machine()}",
        f"- **{caught} of {len(rows)} faults caught ({caught / len(rows):.1%})**: "
        f"{stages['related']} by the tests nearest to the source, "
        f"{stages['everyday']} by the rest of the everyday run, {stages['heavy']} by a heavy test",
        f"- {sum(fault.compiled for fault in faults)} in C++, {sum(not fault.compiled for fault in faults)} in Python; "
        + ", ".join(f"{sum(f.kind == kind for f in faults)} {kind}" for kind in catalogue.KINDS),
        "",
        "## Survivors",
        "",
    ]
    survivors = [fault for fault, result in rows if result["verdict"] == "survived"]
    for fault in survivors:
        lines.append(f"- `{fault.id}` ({fault.file}; {fault.breaks}): {fault.equivalent or 'NO REASON GIVEN'}")
    lines += [] if survivors else ["None."]
    for file in dict.fromkeys(fault.file for fault in faults):
        lines += ["", f"## {file}", "", "| fault | kind | what it breaks | caught by |", "| --- | --- | --- | --- |"]
        for fault, result in rows:
            if fault.file == file:
                by = result["by"] if result["verdict"] == "caught" else result["verdict"]
                by = by.replace("|", "\\|").removeprefix("tests/") + (
                    f" ({result['how']})" if result.get("how") else ""
                )
                lines.append(f"| {fault.id} | {fault.kind} | {fault.breaks} | {by} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="the ten faults that CI plants")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these faults (or all of a file: its path)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, cores // 2),
        help="faults at a time, each in a copy of the tree (%(default)s)",
    )
    parser.add_argument("--list", action="store_true", help="print the catalogue")
    parser.add_argument("--report", nargs="?", const=REPORT, type=Path, metavar="FILE", help="write the report")
    parser.add_argument(
        "--near", action="store_true", help="the first stage alone: a fault it does not catch stays open"
    )
    parser.add_argument("--again", action="store_true", help="use no earlier result")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_child(arguments.child[0], arguments.child[1], arguments.child[2:])
    faults = catalogue.load()
    if arguments.sample:
        faults = [fault for fault in faults if fault.id in catalogue.SAMPLE]
    if arguments.only:
        faults = [fault for fault in faults if fault.id in arguments.only or fault.file in arguments.only]
    if not faults:
        parser.error("no such fault")
    if arguments.list:
        for fault in faults:
            print(f"{fault.id:32} {fault.kind:12} {fault.file:44} {fault.breaks}")
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    trial = Trial(faults)
    if arguments.again:
        for fault in faults:
            trial.results.pop(fault.id, None)
    trial.run(arguments.jobs, full=not (arguments.sample or arguments.only or arguments.near), near_only=arguments.near)
    bad = trial.judge()
    if arguments.report and all(trial.known(fault, near_only=False) for fault in faults):
        arguments.report.write_text(report(trial))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
