"""A pytest plugin (``-p benchmarks.gpu_suite.pytest_rows``): a row per finished test, appended to the file
that RF_TEST_ROWS names, so that what ran before a process was stopped or lost is known."""

import os
from pathlib import Path

from .jobs import Rows

_PHASES = {"setup": "error", "call": "failed", "teardown": "error"}


def _add(identity: str, outcome: str, seconds: float, message: str | None = None) -> None:
    values = {"id": identity, "outcome": outcome, "seconds": round(seconds, 3)}
    Rows(Path(os.environ["RF_TEST_ROWS"])).add("test", **values | ({"message": message} if message else {}))


def pytest_runtest_logreport(report):
    if report.failed:
        _add(report.nodeid, _PHASES[report.when], report.duration, report.longreprtext[-1500:])
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _add(report.nodeid, "skipped", report.duration, str(reason)[:300])
    elif report.when == "call":
        _add(report.nodeid, "passed", report.duration)


def pytest_collectreport(report):
    if report.failed:
        _add(report.nodeid, "error", 0.0, report.longreprtext[-1500:])
