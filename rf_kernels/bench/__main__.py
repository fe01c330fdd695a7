"""python -m rf_kernels.bench: see the package's docstring."""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import aims, environment, groups, line, measure, row
from .case import Case
from .plot import plot
from .timing import geometric_means, roof


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rf_kernels.bench",
        description="Ours beside the published formulation and the best of plain PyTorch, interleaved in one process. Medians.",
    )
    parser.add_argument("--op", choices=list(groups()), action="append", help="only this (repeatable)")
    parser.add_argument("--case", action="append", metavar="ID", help="only this case, as --list names it (repeatable)")
    parser.add_argument("--quick", action="store_true", help="one or two shapes an op: those of the aims among them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate (default 2)")
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
        sys.exit(f"no such case on {kind}: {', '.join(sorted(unknown)) or 'nothing left to run'} (see --list)")
    return found


def run(case: Case, options: argparse.Namespace, roofs: dict) -> dict:
    device = options.device
    if case.dtype not in roofs:
        roofs[case.dtype] = roof(case.dtype, device)
    timings = measure(case.candidates(device), device=device, seconds=options.seconds)
    counts = {"flops": case.cost["flops"], "nbytes": case.cost["bytes"]}
    result = row(case.op, case.shape, case.dtype, timings, **counts, roof=roofs[case.dtype])
    return result | {"case": case.id, "device": torch.device(device).type}


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
    results, roofs = [], {}
    for case in cases:
        results.append(run(case, options, roofs))
        print(line(results[-1]), flush=True)
        if options.repro:
            threads = f" --threads {torch.get_num_threads()}" if torch.device(options.device).type == "cpu" else ""
            print(f"    python -m rf_kernels.bench --case '{case.id}' --device {options.device}{threads}")
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
        plot(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
