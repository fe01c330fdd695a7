"""Triton as a backend: how it is asked for, and the tests of every backend run on its interpreter (a process
of its own: triton looks at TRITON_INTERPRET when it is imported)."""

import json
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
# What there is to see in a backend: results, states, what is read and what is not. What tests check in any
# backend alike (refusals, compilation) is left out. So is what would say the same again, for a program takes
# ten milliseconds here: bfloat16, which rounds most, sees every shape, the other dtypes a few; of large grids
# one is taken; float64 is not served. The fuzzer mixes them all.
SUITES = {
    "rope_append": "golden or bit_for_bit or empty or strided or per_sample or without_queries or in_float32 "
    "or q_of_rope_append or only_with_its_weight or (op_against_oracle and (adjacent or 40))",
    "ema_evict": "(within_eager and (compensated or bfloat16) and not float64) or takes_every or identity "
    "or rounded_once or minus_zero or ((alpha_one or nonfinite) and bfloat16) or propagate or held "
    "or strided or schedules_per_sample or (bit_exact and 0.333 and bfloat16) "
    "or (sequence_of_one and 1-33-compensated)",  # 33 sources are more than a launch takes
    "sink_window_attention": "(values_and_gradients and "
    "(dtype2 or ((dtype1 or dtype3) and (odd or ragged or batch_grouped))) "
    # Not a gradient that cancels to zero: the tolerance is twice eager PyTorch's error, there by chance zero.
    "and not one_key) or ((exact_answers or no_key or poison_behind or neighbours) and dtype2) "
    "or poison_outside or extreme or test_empty or expanded_heads or lse_zero "
    "or (expanded_gradient and 64-torch.bfloat16) or (without_any_weight and bfloat16)",
    "sink_window_attention_values": "(values_and_gradients or have_the_bits) and bfloat16",
    "keys_alone": "adjacent-torch.bfloat16-op or not_finite or "
    "(test_evict and op and bfloat16 and (half or none or adjacent_tail))",
    "dmd_gradient": "golden or oracle or policy or masks or odd_sizes or no_elements or dropped "
    "or neighbours or backward or zero or overflow or not_contiguous or unguided",
}


@pytest.mark.heavy
@pytest.mark.parametrize("op", SUITES)
def test_oracle_and_golden_tests(op):
    pytest.importorskip("triton")
    suite = f"tests/ops/test_{op}.py"
    options = ("-q", "-x", "-m", "not heavy", "-p", "no:cacheprovider", "-k", SUITES[op])
    done = interpreted("-m", "pytest", suite, *options)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 20, done.stdout[-500:]  # what is skipped is float64


# ---- tile sizes that were asked for ----

TUNE = """
import sys, torch, helpers.quick_interpreter
from pathlib import Path
from benchmarks.tuning import triton_configs as tuning
attention = tuning.kernels("sink_window_attention").config(64, torch.bfloat16, False)
for fixed in (tuning.kernels("ema_evict").TILE, attention):
    found = tuning.around(fixed)
    assert fixed in found and len(set(found)) == len(found) > 10
    assert all(n & (n - 1) == 0 for c in found for n in c[:2])
def near(fixed):
    field = fixed._fields[0]
    return [fixed._replace(**{field: 2 * fixed[0]}), fixed._replace(**{field: 3})]
tuning.around = near
builds = (tuning.attention, tuning.rope_append, tuning.ema_evict)
tuning.tune([(build, torch.float32, 16, "cpu", 3, 1) for build in builds], "cpu", Path(sys.argv[1]), 0.0)
"""
USE = """
import torch, rf_kernels as rf
from rf_kernels.triton import sink_window_attention as kernels
q = torch.randn(1, 5, 1, 16)
found = rf.sink_window_attention(q, q, q, kv_tokens=5)
assert kernels._constants(q, q, False)[0].keys == 64 and kernels._constants(q, q, True)[0].keys == 16
expected = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3).transpose(1, 2)
torch.testing.assert_close(found, expected)
"""


@pytest.mark.heavy
def test_tuning_writes_a_file_that_is_used_where_it_was_made(tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "triton.json"
    done = interpreted("-c", TUNE, str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fixed is") == 4  # attention is two kernels
    assert "left out: InterpreterError" in done.stdout  # a tile of 3 rows
    found = json.loads(file.read_text())
    assert found["for"]["arch"] == "interpreter"
    wider = {"queries": 32, "keys": 64, "warps": 4, "stages": 1}
    found["configs"] = {"sink_window_attention torch.float32 16": wider}
    file.write_text(json.dumps(found))
    chosen = {"RF_BACKEND": "triton", "TRITON_INTERPRET": "1", "RF_TRITON_CONFIG": str(file)}
    done = run("-c", USE, **chosen)
    assert done.returncode == 0, done.stderr
    found["for"]["triton"] = "1.0"
    file.write_text(json.dumps(found))
    done = run("-c", USE, **chosen)
    assert done.returncode != 0 and "tune again, or unset it" in done.stderr.splitlines()[-1]


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
