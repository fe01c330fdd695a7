"""Damaged and hostile files: refused with a clear error or loaded correctly, without a crash, in at most
twice the memory of the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("stream", "checkpoint", "pickled", "golden")


def load_mutations(name, first, last):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "hostile_files.py", name, str(first), str(last)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"died ({done.returncode}) at or after:\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert not report["failures"], "\n".join(report["failures"][:5])
    assert report["refused"] + report["loaded"] == last - first
    return report


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are measured with Linux's /proc"
)
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files(name):
    report = load_mutations(name, 0, 30)
    # the mutations are neither all harmless nor all coarse
    assert report["refused"] and report["loaded"], report


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_mutated_files(name):
    report = load_mutations(name, 30, 1030)
    assert report["refused"] > 400 and report["loaded"] > 100 and report["worst"] <= 2, report


def test_claims_that_weights_only_does_not_check(tmp_path):
    """Tuples nested until hashing them overflows the C stack; tensors of any size out of one element."""
    from reward_forcing._files import _tuple_depth
    from reward_forcing.checkpoint import CheckpointError, read_checkpoint

    assert _tuple_depth(b"\x80\x02)" + b"\x85" * 500 + b".") == 500
    assert _tuple_depth(b"\x80\x02)\x85q\x000(h\x00h\x00t.") == 2
    torch.save({"patch_embedding.weight": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt")) == ["patch_embedding.weight"]
    torch.save(
        {"patch_embedding.weight": torch.zeros(1), "x": torch.zeros(1).expand(10**6)}, tmp_path / "b.pt"
    )
    with pytest.raises(CheckpointError, match="claim 4000004 bytes"):
        read_checkpoint(tmp_path / "b.pt")
