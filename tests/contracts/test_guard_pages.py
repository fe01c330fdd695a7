"""No operator touches a byte outside its tensors: they run with a page that cannot be touched behind (or
before) every argument."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ("rope_append", "rope", "ema_evict", "dmd_gradient", "sink_window_attention")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="uses mmap and mprotect of Linux"
)


def guard_pages(*arguments):
    command = [sys.executable, ROOT / "tests" / "helpers" / "guard_pages.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def check(first, last):
    done = guard_pages(first, last, *OPS)
    assert done.returncode == 0, done.stderr[-2000:]
    ran = dict(line.split() for line in done.stdout.splitlines())  # operators that ran there
    assert ran.keys() == set(OPS) and all(int(count) >= last - first for count in ran.values()), ran


def test_ops_between_guard_pages():
    check(0, 30)


@pytest.mark.heavy
def test_thousands_of_configurations_between_guard_pages():
    check(30, 530)


def test_a_planted_overrun_ends_the_process():
    assert guard_pages("overrun").returncode == -signal.SIGSEGV
