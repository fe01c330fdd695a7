"""``integrations.wan.patch`` on real modules and pipelines, where `RF_UPSTREAM_DIR` has their checkouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.integrations import SYSTEMS
from benchmarks.rolling import POLICIES
from helpers.training import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
FOLDER = os.environ.get("RF_UPSTREAM_DIR")


@pytest.mark.heavy
@pytest.mark.skipif(not FOLDER, reason="RF_UPSTREAM_DIR names no folder of checkouts")
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_real_pipeline_streams_the_same(name):
    if not (Path(FOLDER) / SYSTEMS[name].checkout).is_dir():
        pytest.skip(f"{FOLDER} has no {SYSTEMS[name].checkout}")
    command = [sys.executable, "-m", "benchmarks.integrations", FOLDER, "--json", "--system", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["float32"] <= 4e-6
    assert found["bf16_patched"] <= 1.2 * found["bf16_own"]
    if SYSTEMS[name].training_class:
        assert found["grad_all"] <= 1e-6 and found["grad_one"] <= 1e-6


@pytest.mark.heavy
@pytest.mark.skipif(not FOLDER, reason="RF_UPSTREAM_DIR names no folder of checkouts")
def test_a_rolling_window_is_that_of_rolling_forcing():
    """The same forwards in the same order. Their latents, where ours see what theirs do: as near as their
    float32 norms let them be."""
    if not (Path(FOLDER) / "RollingForcing").is_dir():
        pytest.skip(f"{FOLDER} has no RollingForcing")
    command = [sys.executable, "-m", "benchmarks.rolling", FOLDER]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 2 * len(POLICIES) and all(row["same forwards"] for row in rows)
    for row in rows:
        same = row["policy"] == "rolling" or row["frames"] == 21
        assert (row["distance"] < 1e-5) == same
