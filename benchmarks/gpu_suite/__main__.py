"""python -m benchmarks.gpu_suite: see the package's docstring."""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import rf_kernels

from .. import facts as machine
from .. import plots
from .report import assemble, read_rows, write

ROOT = Path(rf_kernels.__file__).resolve().parents[1]
VARIANTS = ROOT / "build" / "tuning"  # of the attention kernel: `make tuning`
PLOTS_S = 20  # kept free for the pictures


@dataclass(frozen=True)
class Stage:
    """A module run in a process of its own for at most ``limit`` seconds."""

    name: str
    module: str
    limit: float
    arguments: tuple[str, ...] = ()


def stages(options: argparse.Namespace) -> list[Stage]:
    checks, tests = "benchmarks.gpu_suite.checks", str(options.tests)
    if options.mode == "no-gpu":
        return [Stage("chip_model", checks, 240, ("chip_model", tests))]
    found = [
        Stage("device", "benchmarks.gpu_suite.device", 40),
        Stage("tests", checks, 130, ("tests", tests)),
        Stage("attention", "benchmarks.gpu_suite.attention", 100),
        Stage("memory", "benchmarks.gpu_suite.memory", 80),
        Stage("model", "benchmarks.gpu_suite.model", 100),
    ]
    if options.tuning:
        found.append(Stage("tuning", "benchmarks.gpu_suite.tuning", 60, (str(VARIANTS),)))
    if options.sanitizer:
        found.append(Stage("sanitizer", checks, 120, ("sanitizer", tests)))  # last: it gets what time is left
    return [stage for stage in found if not options.only or stage.name in options.only]


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description="Tests, benchmarks and pictures."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of report.json, rows.jsonl, log.txt and pictures"
    )
    parser.add_argument(
        "--sanitizer", action="store_true", help="run a small selection of the tests under compute-sanitizer"
    )
    parser.add_argument(
        "--tuning",
        action="store_true",
        help="time the variants of the attention kernel that `make tuning` built",
    )
    parser.add_argument("--quick", action="store_true", help="the shapes of the design alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU through the same code")
    parser.add_argument("--only", action="append", metavar="STAGE", help="this stage alone (repeatable)")
    parser.add_argument(
        "--budget", type=float, default=460, metavar="S", help="seconds of the whole run (default 460)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.15, metavar="S", help="of timing per candidate (default 0.15)"
    )
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="folder of the tests")
    options = parser.parse_args(arguments)
    options.mode = "dry-run" if options.dry_run else "gpu" if torch.cuda.is_available() else "no-gpu"
    everything = {"only": None, "sanitizer": True, "tuning": True}
    known = [stage.name for stage in stages(argparse.Namespace(**vars(options) | everything))]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only: expected {', '.join(known)}, found {', '.join(sorted(unknown))}")
    options.sanitizer = options.sanitizer or "sanitizer" in (options.only or ())
    options.tuning = options.tuning or "tuning" in (options.only or ())
    return options


def environment_of_stages() -> dict[str, str]:
    """The packages of a source tree are found wherever the stage is run; in an installation they are found
    anyway."""
    paths = [
        str(p)
        for p in (ROOT, ROOT / "python")
        if (p / "rf_kernels").is_dir() or (p / "reward_forcing").is_dir()
    ]
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run(stage: Stage, options: argparse.Namespace, limit: float) -> dict:
    """One stage: how it ended, and the device's state before and after."""
    device = "cuda" if options.mode == "gpu" else "cpu"
    command = [sys.executable, "-m", stage.module, *stage.arguments, "--device", device]
    own_limit = 0.85 * limit  # imports before, and the end after, are not in what a stage counts
    command += ["--rows", str(options.out / "rows.jsonl"), "--limit", f"{own_limit:.0f}"]
    command += ["--seconds", str(options.seconds)]
    command += ["--tiny"] if options.mode == "dry-run" else []
    command += ["--quick"] if options.quick else []
    before, begin = machine.smi(machine.READINGS), time.perf_counter()
    status, reason = "ok", None
    with (options.out / "log.txt").open("a") as log:
        log.write(f"\n==== {stage.name}\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment_of_stages(), start_new_session=True
        )
        try:
            if process.wait(limit) != 0:
                status, reason = "failed", f"ended with status {process.returncode} (log.txt has its output)"
        except subprocess.TimeoutExpired:
            # the stage's own processes too: the session is theirs alone
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, reason = "failed", f"stopped at its limit of {limit:.0f} s"
    seconds = time.perf_counter() - begin
    after = machine.smi(machine.READINGS)
    return {
        "name": stage.name,
        "status": status,
        "reason": reason,
        "seconds": seconds,
        "limit_s": limit,
        "before": before,
        "after": after,
    }


def summary(report: dict) -> str:
    lines = [f"{s['name']:10s} {s['status']:8s} {s['seconds']:6.1f} s" for s in report["stages"]]
    lines.append("tests: " + ", ".join(f"{count} {name}" for name, count in report["test_counts"].items()))
    lines += [f"note: {note['text']}" for note in report["notes"]]
    for result in report["results"]:
        if "timings" in result:
            ours = next(iter(result["timings"].values()))
            peers = ", ".join(
                f"{ratio:.2f}x vs {peer}" for peer, ratio in result["times_faster_than"].items()
            )
            lines.append(
                f"{result['op']} | {result['shape']} {result['dtype']} | {ours['p50'] * 1e6:.1f} us | {peers}"
            )
    if report["left_undone"]:
        lines.append(f"{len(report['left_undone'])} benchmarks were not reached in time")
    lines += [f"PROBLEM {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def main(arguments=None) -> int:
    begin = time.perf_counter()
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    if options.mode == "no-gpu":
        print(
            "torch sees no CUDA device: the functional model's cases are run instead, and nothing is timed",
            flush=True,
        )
    facts, done = (
        machine.of_run(ROOT) | {"arguments": sys.argv[1:] if arguments is None else list(arguments)},
        [],
    )

    def report(complete: bool) -> dict:
        found = assemble(options.mode, facts, done, read_rows(options.out / "rows.jsonl"), complete)
        write(found, options.out / "report.json")
        return found

    report(complete=False)
    for stage in stages(options):
        left = options.budget - PLOTS_S - (time.perf_counter() - begin)
        limit = min(stage.limit, left)
        if limit < 5:
            done.append(
                {"name": stage.name, "status": "failed", "reason": "no time was left", "seconds": 0.0}
            )
            continue
        print(f"{stage.name} (at most {limit:.0f} s)", flush=True)
        done.append(run(stage, options, limit))
        report(complete=False)
    result = report(complete=True)
    try:
        result["pictures"] = plots.draw(result, options.out)
    except Exception as error:
        result["pictures"] = []
        result["notes"].append({"text": f"no pictures: {type(error).__name__}: {error}"})
    result["seconds"] = time.perf_counter() - begin
    write(result, options.out / "report.json")
    print(summary(result))
    print(f"{options.out / 'report.json'} after {result['seconds']:.0f} s")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
