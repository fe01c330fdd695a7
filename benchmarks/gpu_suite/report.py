"""The report of a run: what the stages wrote, put together; and what went wrong in it."""

import json
from pathlib import Path

from . import SCHEMA

#: Kinds of rows, and where the report keeps them.
HOMES = {
    "result": "results",
    "skipped": "left_undone",
    "series": "series",
    "test": "tests",
    "sanitizer": "sanitizer",
    "ceiling": "ceilings",
    "device": "device",
    "doctor": "doctor",
    "note": "notes",
}


def read_rows(path: Path) -> list[dict]:
    """All whole lines; the last one may have been cut off with its process."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append({"kind": "note", "text": f"a line that was cut off: {line[:80]}"})
    return rows


def problems_of(report: dict) -> list[str]:
    """Everything that failed. A peer that cannot be timed is no problem of ours: its row names it."""
    found = [
        f"stage {s['name']}: {s['status']}: {s['reason']}"
        for s in report["stages"]
        if s["status"] == "failed"
    ]
    for test in report["tests"]:
        if test["outcome"] in ("failed", "error"):
            found.append(
                f"test {test['id']}: {test['outcome']}: {(test.get('message') or '').strip()[-300:]}"
            )
    found += [f"{r['op']} {r['shape']} {r['dtype']}: {r['error']}" for r in report["results"] if "error" in r]
    found += [
        f"sanitizer {s['tool']}: {s['message']}" for s in report["sanitizer"] if s["outcome"] == "failed"
    ]
    for entry in report["doctor"]:
        wrong = [row for row in entry["self_test"] if not row["ok"]]
        found += [
            f"self-test {row['op']} on {row['device']}: {row.get('message', row.get('error'))}"
            for row in wrong
        ]
    return found


def counts_of(tests: list[dict]) -> dict[str, int]:
    outcomes = [test["outcome"] for test in tests]
    return {name: outcomes.count(name) for name in ("passed", "failed", "error", "skipped")}


def assemble(mode: str, facts: dict, stages: list[dict], rows: list[dict], complete: bool) -> dict:
    report = {"schema": SCHEMA, "mode": mode, "complete": complete, "environment": facts, "stages": stages}
    report |= {home: [] for home in HOMES.values()}
    for row in rows:
        values = {name: value for name, value in row.items() if name != "kind"}
        report[HOMES[row["kind"]]].append(values)
    report["test_counts"] = counts_of(report["tests"])
    report["problems"] = problems_of(report)
    return report


def write(report: dict, path: Path) -> None:
    """At once: a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
