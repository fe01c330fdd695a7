"""The committed reports: they have something to say of every promise of docs/promises.md, of which commit,
and that it holds."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(name):
    return json.loads((ROOT / "tests" / "contracts" / "reports" / f"{name}.json").read_text())


def promised_commands():
    rows = [line for line in (ROOT / "docs/promises.md").read_text().splitlines() if line.startswith("| **")]
    return [re.search(r"\| `([^`]+)` \|$", row).group(1) for row in rows]


def test_every_promise_has_its_report():
    commands, runs = promised_commands(), report("promises")["runs"]
    assert len(commands) >= 12 and all(run["seen"] for run in runs)
    long = [report("soak")["command"].partition(" --report")[0], "make sanitize"]
    assert {run["command"] for run in runs} | set(long) == set(commands)


@pytest.mark.parametrize("name", ["promises", "sanitize", "soak"])
def test_reports_name_a_commit_and_a_date(name):
    found = report(name)
    assert re.fullmatch("[0-9a-f]{12}", found["commit"]), "made from a clean tree"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"]) and found["machine"] and found["torch"]


def test_the_soak():
    found = report("soak")
    assert found["chunks"] == 100_000 and all(found["verdicts"].values())
    assert found["largest growth of resident memory after chunk 100"] < 1 << 20
    trends = [t for s in found["sinks"].values() if s["promised"] for t in (s["state"], s["attention"])]
    assert len(trends) == 10
    for t in trends:
        error = (t["high"] - t["low"]) / 2 / 3.37  # the quantile of the interval is 3.37 standard errors
        assert t["low"] <= 0 <= t["high"] and abs(t["slope"]) <= 1.2 * error
    means = {name: s["state"]["mean"] for name, s in found["sinks"].items()}
    assert means["EMA, compensated"] < 2e-4 and means["EMA, published"] > 0.1


def test_the_sanitizers():
    found = report("sanitize")
    assert found["builds"].keys() == {"memory", "threads"}
    for build in found["builds"].values():
        assert build["findings"] == 0 and not build["not reached"]
        assert set(build["planted"].values()) == {"found"}
    runs = [
        n
        for build in found["builds"].values()
        for op, n in build["configurations"].items()
        if op != "refusals"
    ]
    assert len(runs) == 12 and min(runs) >= 600
