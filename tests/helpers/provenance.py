"""What a committed report in tests/contracts/reports says about where it comes from."""

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def provenance(*packages: str) -> dict:
    """Date, commit (with "+changes" where tracked files differ from it), machine, versions of Python and of
    packages."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!tests/contracts/reports")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else ""),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
