"""Damaged and hostile files: refused with a clear error or loaded correctly, without a crash, in at most twice the memory of the file;
and no reader of pickles in the package but the one that builds nothing except tensors and containers."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("stream", "checkpoint", "pickled", "golden")


def load_mutations(name, first, last):
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "hostile_files.py", name, str(first), str(last)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
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
    assert report["refused"] and report["loaded"], report  # the mutations are neither all harmless nor all coarse


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_mutated_files(name):
    report = load_mutations(name, 30, 1030)
    assert report["refused"] > 400 and report["loaded"] > 100 and report["worst"] <= 2, report


# ---- pickles ------------------------------------------------------------------------------------------------------------------
UNSAFE_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml"}
UNSAFE_CALLS = {"loads", "Unpickler", "read_pickle", "unsafe_load"}


def pickle_paths(source: str):
    """What could run code of a file in a Python source: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = {n.split(".")[0] for n in ([node.module or ""] if isinstance(node, ast.ImportFrom) else names)}
            if modules & UNSAFE_MODULES or (modules & {"pickle", "_pickle"} and isinstance(node, ast.ImportFrom)):
                yield node.lineno, f"import of {modules}"
            if (
                isinstance(node, ast.ImportFrom)
                and modules & {"torch", "numpy", "json"}
                and {"load", "loads"} & set(names)
            ):
                yield node.lineno, "a bare `load`"
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("pickle", "_pickle")
        ):
            if node.attr not in ("UnpicklingError", "PickleError"):
                yield node.lineno, f"pickle.{node.attr}"
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            name = function.split(".")[-1]
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if function in ("torch.load", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"):
                yield (
                    node.lineno,
                    f"{function}({'weights_only=True' if keywords.get('weights_only') == 'True' else ''})",
                )
            elif function in ("eval", "exec", "compile") or (name in UNSAFE_CALLS and function != "json.loads"):
                yield node.lineno, function
            elif keywords.get("allow_pickle", "False") != "False" or function in (
                "np.load",
                "numpy.load",
                "np.fromfile",
            ):
                yield node.lineno, f"{function} with pickles"


def test_one_reader_of_pickles_and_it_reads_weights_only():
    found = []
    for folder in ("rf_kernels", "python"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += [(path.name, what) for _, what in pickle_paths(path.read_text())]
    assert found == [("checkpoint.py", "torch.load(weights_only=True)")]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle; pickle.load(f)", "from pickle import loads", "import pickle as p, marshal", "torch.load(f)",
        "torch.load(f, weights_only=False)", "import numpy as np; np.load(f, allow_pickle=True)", "eval(text)",
        "from torch import load", "pickle.Unpickler(f).load()", "import joblib",
    ],
)  # fmt: skip
def test_a_planted_reader_is_found(source):
    assert [what for _, what in pickle_paths(source) if "weights_only=True" not in what]


def test_claims_that_weights_only_does_not_check(tmp_path):
    """Tuples nested until hashing them overflows the C stack; tensors of any size out of one element."""
    from reward_forcing._files import _tuple_depth
    from reward_forcing.checkpoint import CheckpointError, read_checkpoint

    assert _tuple_depth(b"\x80\x02)" + b"\x85" * 500 + b".") == 500
    assert _tuple_depth(b"\x80\x02)\x85q\x000(h\x00h\x00t.") == 2
    torch.save({"patch_embedding.weight": torch.zeros(1)}, tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt")) == ["patch_embedding.weight"]
    torch.save({"patch_embedding.weight": torch.zeros(1), "x": torch.zeros(1).expand(10**6)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="claim 4000004 bytes"):
        read_checkpoint(tmp_path / "b.pt")
