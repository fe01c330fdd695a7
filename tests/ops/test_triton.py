"""Triton as a backend: how it is asked for, and the tests of every backend run on its interpreter (a process
of its own: triton looks at TRITON_INTERPRET when it is imported)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rf_kernels as rf
from rf_kernels import _backend

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    "RF_BACKEND" in os.environ, reason="tests of what RF_BACKEND does choose it themselves"
)


def run(*command, **environment):
    """A Python process with these variables, and one thread."""
    env = {k: v for k, v in os.environ.items() if k not in ("RF_BACKEND", "RF_STRICT", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def interpreted(*command):
    return run(*command, RF_BACKEND="triton", TRITON_INTERPRET="1")


X = torch.arange(8.0).view(1, 1, 2, 4)


def rope(x=X):
    return rf.rope(x, angles=None, axes=[])


# ---- asked for ----


def test_importing_the_library_does_not_import_triton():
    code = "import sys, rf_kernels; assert not {'triton', 'rf_kernels.triton'} & set(sys.modules)"
    assert run("-c", code).returncode == 0
    assert run("-c", code, RF_BACKEND="native").returncode == 0


def test_asking_for_a_backend_that_there_is_not():
    with (
        pytest.raises(rf.ArgumentError, match="'auto' or 'native' or 'triton', found 'cuda'"),
        rf.backend("cuda"),
    ):
        pass
    done = run("-c", "import rf_kernels", RF_BACKEND="cuda")
    assert done.returncode != 0 and "found 'cuda'" in done.stderr


def test_asking_for_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="triton is not installed"), rf.backend("triton"):
        pass
    rope()
    assert rf.last_dispatch().backend == "cpu"  # without it, nothing else changes


def test_cpu_tensors_need_the_interpreter():
    pytest.importorskip("triton")
    with (
        rf.backend("triton"),
        pytest.raises(RuntimeError, match="rope: Triton is asked for and cannot serve: CPU tensors"),
    ):
        rope()
    assert torch.equal(rope(), X) and rf.last_dispatch().backend == "cpu"  # the request ends with its block
    with pytest.raises(ZeroDivisionError), rf.backend("triton"):
        raise ZeroDivisionError
    assert torch.equal(rope(), X)


SERVES = """
import pytest, torch, rf_kernels as rf
x = torch.arange(8.0).view(1, 1, 2, 4).requires_grad_()
y = rf.rope(x, angles=None, axes=[])
assert rf.last_dispatch() == ("rope", "triton", False, "asked for")
with rf.backend("native"):
    rf.rope(x, angles=None, axes=[])
    assert rf.last_dispatch().backend == "cpu"
with pytest.raises(RuntimeError, match="rope: Triton is asked for and cannot serve: float64 is not served"):
    rf.rope(x.double(), angles=None, axes=[])
assert rf.last_dispatch().backend == "cpu"
with pytest.raises(rf.ArgumentError, match="rope: argument `axes`"):  # the checks are the same
    rf.rope(x, angles=None, axes=[1, 2, 0])
import rf_kernels.triton.rope_append as kernels
def fail(*arguments):
    raise ValueError("a message from Triton")
kernels.rope = fail
with pytest.raises(ValueError, match="a message from Triton"):
    rf.rope(x, angles=None, axes=[])
"""


def test_the_interpreter_serves_cpu_tensors():
    pytest.importorskip("triton")
    done = interpreted("-c", SERVES)
    assert done.returncode == 0, done.stderr


# ---- the tests of every backend, on the interpreter ----

OPS = ["rope_append", "rope", "ema_evict", "sink_window_attention", "dmd_gradient"]
# What there is to see in a backend: results, states, what is read and what is not. (What tests check in any
# backend alike, refusals and compilation among it, is left out, and so is every combination of a large grid:
# an operation takes half a millisecond.)
SUITES = {
    "rope_append": "golden or bit_for_bit or empty or strided or per_sample or without_queries or in_float32 "
    "or q_of_rope_append or only_with_its_weight or (op_against_oracle and (adjacent or 40))",
    "ema_evict": "published or nonfinite or propagate or alpha or minus_zero or rounded_once or schedules "
    "or held or strided or identity or anywhere or exactly or (within_eager and not Tensor)",
    "sink_window_attention": "exact_answers or extreme or no_key or poison or expanded or empty "
    # Not: a gradient that cancels to zero (one key) and float32 at head dim 256, which eager PyTorch sums in
    # another order, with less error than twice its own (the fuzzer has a bound for both).
    "or neighbours or second_derivatives or whole_sequence_is_streaming "
    "or (values_and_gradients and not one_key and not wide_head)",
    "dmd_gradient": "golden or oracle or policy or masks or odd_sizes or no_elements or dropped "
    "or neighbours or backward or zero or overflow or not_contiguous or unguided",
}


# These take ten minutes each and have not been seen to their end in one run.
UNSEEN = pytest.mark.skipif(
    os.environ.get("RF_TRITON_SUITES") != "all",
    reason="not seen to its end yet: RF_TRITON_SUITES=all runs it",
)
LONG = ("ema_evict", "sink_window_attention")


@pytest.mark.heavy
@pytest.mark.parametrize("op", [pytest.param(op, marks=UNSEEN if op in LONG else ()) for op in SUITES])
def test_oracle_and_golden_tests(op):
    pytest.importorskip("triton")
    done = interpreted(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not heavy",
        "-p",
        "no:cacheprovider",
        f"tests/ops/test_{op}.py",
        "-k",
        SUITES[op],
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 20, done.stdout[-500:]  # what is skipped is float64


def test_a_few_configurations():
    pytest.importorskip("triton")
    run_each = f"failures = sum((fuzz.run(op, range(3)) for op in {OPS}), [])"
    code = f"from helpers import fuzz; {run_each}; assert not failures, failures"
    done = interpreted("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
@pytest.mark.parametrize("op", OPS)
def test_500_configurations(op):
    pytest.importorskip("triton")
    done = interpreted("tests/helpers/fuzz.py", "--op", op, "--seeds", "0:500")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "500 configurations, 0 failures" in done.stdout
