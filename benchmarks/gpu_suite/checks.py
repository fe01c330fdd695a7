"""Stages that run the source tree's own tests: the GPU tests, a small selection of them under
compute-sanitizer, and, without a GPU, the functional model's cases of the Hopper kernel."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .jobs import Options
from .report import read_rows

#: A call of every op at small sizes, no graphs (the sanitizer runs without the caching allocator).
SANITIZED = "dispatch or skips or agrees or dmd_loss or sees_nothing or (attention_of_extreme and bfloat16)"
#: What each tool runs. racecheck and synccheck are known to misread kernels whose warps have different roles
#: (they do not follow what mbarriers and the copy engine order): they leave attention out, and what they say
#: is reported, not held against the run.
TOOLS = {
    "memcheck": SANITIZED,
    "synccheck": "append_agrees or evict_skips or dmd_loss",
    "racecheck": "append_agrees or evict_skips or dmd_loss",
}
FATAL = ("memcheck",)
FILES_AT_ONCE = 3
#: These watch for waits and for memory: another process on the device would be in what they see.
ALONE = ("test_gpu_stream.py",)
NO_TESTS = 5  # pytest's exit status


def gpu_test_files(tests: Path) -> list[Path]:
    """Files with GPU tests. This suite's own test starts the suite: it is none of them."""
    files = [p for p in sorted(tests.rglob("test_*.py")) if p.name != "test_gpu_suite.py"]
    return [p for p in files if p.name.startswith("test_gpu_") or "mark.gpu" in p.read_text()]


def run_limited(command: list[str], limit: float, environment: dict) -> tuple[int | None, str]:
    """Exit status (None: past its limit) and output. What is stopped is stopped with all that it started: a
    sanitizer's child would go on holding the device."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=limit)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def run_pytest(selection: list[str], limit: float, *, wrap=(), environment=None) -> list[dict]:
    """A pytest process, a row per finished test; a process that ends in another way than by passing or
    failing tests is a row too."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        environment = os.environ | (environment or {}) | {"RF_TEST_ROWS": str(rows)}
        options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_suite.pytest_rows"]
        command = [
            *wrap,
            sys.executable,
            "-m",
            "pytest",
            *options,
            "--continue-on-collection-errors",
            *selection,
        ]
        status, output = run_limited(command, limit, environment)
        found = [{name: value for name, value in row.items() if name != "kind"} for row in read_rows(rows)]
    print(output[-6000:], flush=True)
    failed = any(row["outcome"] in ("failed", "error") for row in found)
    if status is None:
        how = f"ran past its limit of {limit:.0f} s"
    elif status == NO_TESTS:
        how = "no test was selected"
    elif status == 0 or (status == 1 and failed):
        return found
    else:
        how = f"ended with status {status}"
    message = f"{how}\n{output[-1200:]}"
    return [*found, {"id": f"{Path(selection[0]).stem}: the process", "outcome": "error", "message": message}]


def run_files(options: Options, files: list[Path], mark: str) -> None:
    """Each file in a process of its own: a lost CUDA context costs the rest of its file alone."""

    def run(path: Path) -> None:
        for row in run_pytest([str(path), "-m", mark], options.left):
            options.rows.add("test", **row)

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(run, [path for path in files if path.name not in ALONE]))
    for path in files:
        if path.name in ALONE:
            run(path)


def gpu_tests(options: Options, tests: Path) -> None:
    run_files(options, gpu_test_files(tests), "gpu" if options.device == "cuda" else "not gpu and not heavy")


def sanitizer(options: Options, tests: Path) -> None:
    """Every tool over its selection; without PyTorch's caching allocator, whose blocks would hide a write out
    of bounds."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        options.rows.add("sanitizer", tool=None, outcome="absent", message="compute-sanitizer is not on PATH")
        return
    for i, (name, tests_of_tool) in enumerate(TOOLS.items()):
        selection = [str(tests / "gpu" / "test_gpu_ops.py"), "-m", "gpu", "-k", tests_of_tool]
        wrap = (tool, "--tool", name, "--error-exitcode", "66", "--print-limit", "20")
        limit = options.left / (len(TOOLS) - i)
        rows = run_pytest(selection, limit, wrap=wrap, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        wrong = [row for row in rows if row["outcome"] in ("failed", "error")]
        if not any(row["outcome"] == "passed" for row in rows):
            wrong.append({"id": name, "message": "no test passed under it"})
        message = "\n".join(f"{row['id']}: {row.get('message', '')}" for row in wrong)[-3000:]
        outcome = "clean" if not wrong else "failed" if name in FATAL else "reported"
        options.rows.add("sanitizer", tool=name, outcome=outcome, tests=len(rows), message=message)


def chip_model(options: Options, tests: Path) -> None:
    built = list((tests.parent / "build" / "chip" / sys.implementation.cache_tag).glob("_chip*.so"))
    if not built:
        options.rows.add(
            "note",
            text=(
                "the functional model of the chip is not built (python tests/chip/build.py): its cases were"
                " not run"
            ),
        )
        return
    run_files(options, [tests / "chip" / "test_sink_window_attention_sm90.py"], "not heavy")


STAGES = {"tests": gpu_tests, "sanitizer": sanitizer, "chip_model": chip_model}


def main(arguments=None) -> None:
    which, tests, *rest = sys.argv[1:] if arguments is None else arguments
    options, tests = Options.parse(rest), Path(tests)
    if not tests.is_dir():
        options.rows.add(
            "note", text=f"{which} were not run: no tests beside the package (a wheel carries none)"
        )
        return
    STAGES[which](options, tests)


if __name__ == "__main__":
    main()
