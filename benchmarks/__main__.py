"""python -m benchmarks: see the package's docstring."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import aims, environment, groups, line, measure, plots, row
from .case import Case
from .timing import geometric_means, roof


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Ours beside the published formulation and the best of plain PyTorch, interleaved in one process."
            " Medians."
        ),
    )
    parser.add_argument("--op", choices=list(groups()), action="append", help="only this (repeatable)")
    parser.add_argument(
        "--case", action="append", metavar="ID", help="only this case, as --list names it (repeatable)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one or two shapes an op: those of the aims among them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate (default 2)")
    parser.add_argument(
        "--settle", type=int, default=1, metavar="N", help="repeat a disturbed case, at most N runs of it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a picture an op (needs matplotlib)")
    parser.add_argument("--repro", action="store_true", help="after each line, the command that repeats it")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args(arguments)


def selected(options: argparse.Namespace) -> list[Case]:
    kind = torch.device(options.device).type
    found = [
        case
        for op, cases in groups().items()
        for case in cases
        if (not options.op or op in options.op)
        and case.device in (None, kind)
        and (case.quick or not options.quick)
        and (not options.case or case.id in options.case)
    ]
    unknown = set(options.case or ()) - {case.id for case in found}
    if unknown or not found:
        sys.exit(
            f"no such case on {kind}: {', '.join(sorted(unknown)) or 'nothing left to run'} (see --list)"
        )
    return found


def run(case: Case, options: argparse.Namespace) -> dict:
    device = options.device
    timings = measure(case.candidates(device), device=device, seconds=options.seconds)
    counts = {"flops": case.cost["flops"], "nbytes": case.cost["bytes"]}
    result = row(case.op, case.shape, case.dtype, timings, **counts, roof=roof(case.dtype, device))
    return result | {"case": case.id, "device": torch.device(device).type}


def run_apart(case: Case, options: argparse.Namespace) -> dict:
    """The case in a process of its own: what earlier cases left in the allocator decides whether large
    temporaries page-fault, and the published path, which makes them, would be twice as fast or slow by its
    place in the list."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "case.json"
        command = [sys.executable, "-m", "benchmarks", "--case", case.id, "--json", str(report)]
        command += ["--device", options.device, "--seconds", str(options.seconds)]
        command += ["--threads", str(torch.get_num_threads())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(report.read_text())["results"][0]


def spread(result: dict) -> float:
    """80th over 20th percentile of the candidate that was disturbed most."""
    return max(timing["p80"] / timing["p20"] for timing in result["timings"].values())


def settled(case: Case, options: argparse.Namespace) -> dict:
    """The run with the least spread of up to ``--settle``, stopping at one below 1.25: chosen by the spread,
    never by the ratio."""
    runs: list[dict] = []
    while not runs or (len(runs) < options.settle and spread(runs[-1]) > 1.25):
        runs.append(run_apart(case, options))
    return min(runs, key=spread) | {"runs": len(runs)}


def main(arguments=None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = selected(options)
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    facts = environment()
    for name, value in facts.items():
        print(f"# {name}: {value}")
    results = []
    for case in cases:
        results.append(settled(case, options) if len(cases) > 1 else run(case, options))
        print(line(results[-1]), flush=True)
        if options.repro:
            threads = (
                f" --threads {torch.get_num_threads()}" if torch.device(options.device).type == "cpu" else ""
            )
            print(f"    python -m benchmarks --case '{case.id}' --device {options.device}{threads}")
    means = geometric_means(results)
    verdicts = [aim.judge({result["case"]: result for result in results}) for aim in aims.aims()]
    print("# geometric means")
    for op, peers in means.items():
        print(" | ".join([op, *(f"{mean:.2f}x vs {peer}" for peer, mean in peers.items())]))
    print("# aims")
    for verdict in verdicts:
        print(aims.line(verdict))
    report = {"environment": facts, "results": results, "geometric_means": means, "aims": verdicts}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plots.speedups(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
