"""The committed reports of the runs that are too long for CI: they say what docs/promises.md says of them, and of which commit."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(name):
    return json.loads((ROOT / "tests" / "contracts" / "reports" / f"{name}.json").read_text())


def row(promise):
    rows = [line for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if promise in line]
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("name", ["sanitize", "soak"])
def test_reports_name_a_commit_and_a_command(name):
    found = report(name)
    assert re.fullmatch("[0-9a-f]{12}", found["commit"]), "made from a clean tree"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"]) and found["command"].startswith(
        f"python tests/helpers/{name}.py "
    )


def test_the_soak():
    found, text = report("soak"), row("A long stream stays as it is")
    assert found["chunks"] == 100_000 and "100,000 chunks" in text
    assert all(found["verdicts"].values())
    growth = found["largest growth of resident memory after chunk 100"]
    assert growth < 1 << 20 and f"+ {growth / 1e6:.2f} MB" in text
    trends = [t for s in found["sinks"].values() if s["promised"] for t in (s["state"], s["attention"])]
    assert len(trends) == 10
    for t in trends:
        assert t["low"] <= 0 <= t["high"]
        assert (
            abs(t["slope"]) <= 1.2 * (t["high"] - t["low"]) / 2 / 3.37
        )  # the quantile of the interval is 3.37 standard errors
    means = {name: f"{s['state']['mean']:.1e}".replace("e-0", "e-") for name, s in found["sinks"].items()}
    assert f"{means['EMA, compensated']}, where" in text and f"has {means['EMA, published']}" in text


def test_the_sanitizers():
    found, text = report("sanitize"), row("Clean under sanitizers")
    assert found["builds"].keys() == {"memory", "threads"}
    for build in found["builds"].values():
        assert build["findings"] == 0 and not build["not reached"]
        assert set(build["planted"].values()) == {"found"}
    runs = [n for build in found["builds"].values() for op, n in build["configurations"].items() if op != "refusals"]
    wrong = {build["configurations"]["refusals"] for build in found["builds"].values()}
    assert len(runs) == 12 and f"{sum(runs):,} runs of configurations" in text and f"{max(wrong)} wrong calls" in text
