"""The benchmark cases: well formed, their candidates agree, and a run prints, writes and judges what it
measured."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks as bench
from benchmarks import __main__ as command
from benchmarks import aims, layer
from benchmarks.timing import Timing, geometric_means
from rf_kernels import _backend

ROOT = Path(__file__).resolve().parents[2]
CASES = [case for cases in bench.groups().values() for case in cases]


def tiny(rotary=True):
    return layer.Layer((2, 3), torch.float32, rotary, heads=2, head_dim=16)


def test_case_ids_are_unique_and_name_their_op():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids)
    assert {case.op for case in CASES} == set(bench.groups())
    assert all(case.cost["flops"] > 0 and case.cost["bytes"] > 0 and len(case.names) > 1 for case in CASES)


def test_every_group_has_quick_cases_and_the_aims_are_among_them():
    quick = {case.id for case in CASES if case.quick and case.device in (None, "cpu")}
    assert {name.split("/")[0] for name in quick} == set(bench.groups())
    assert {aim.case.id for aim in aims.aims()} <= quick
    assert all({aim.over, aim.under} <= set(aim.case.names) for aim in aims.aims())


@pytest.mark.parametrize("job", ["repeat forward", "update", "update with norm and RoPE"])
def test_layer_candidates_agree_over_evictions(job):
    """Building checks it; a second call shows that the candidates can be called again and again."""
    case = layer.case(job, tiny(rotary=job != "update"))
    calls = case.candidates("cpu")
    for _ in range(3):
        results = {name: call() for name, call in calls.items()}
    if job == "repeat forward":
        for name in ("published", "eager"):
            torch.testing.assert_close(results[name], results["rf_kernels"], rtol=1e-4, atol=1e-5)


def test_triton_is_a_candidate_on_a_gpu(monkeypatch):
    """Where its call asks for Triton, and what comes after it does not."""
    asked = []
    module = importlib.import_module("benchmarks.case")
    monkeypatch.setattr(module, "triton_problem", lambda: None)
    monkeypatch.setattr(module.rf, "backend", lambda name: contextlib.nullcontext())
    calls = {"ours": lambda: asked.append(_backend.requested()), "peer": lambda: None}
    case = module.Case("rope_append", "tiny", torch.float32, ("ours", "peer"), lambda device: dict(calls))
    assert list(case.candidates("cpu")) == ["ours", "peer"]
    found = case.candidates("cuda")
    assert list(found) == ["ours", "peer", "triton"]
    found["triton"]()
    found["ours"]()
    assert asked == ["triton", _backend.requested()]


def test_disagreement_stops_a_benchmark():
    with pytest.raises(AssertionError, match="off: result 0 differs from ours"):
        bench.agree({"ours": lambda: torch.ones(3), "off": lambda: torch.ones(3) + 1e-3}, ulps=4)


def result(case, **seconds):
    timings = {name: Timing(s, s, s, 5) for name, s in seconds.items()}
    return bench.row(case.op, case.shape, case.dtype, timings) | {"case": case.id, "device": "cpu"}


def test_aims_are_judged_by_the_ratio_of_medians():
    faster, over_sdpa, *_ = aims.aims()
    met = {faster.case.id: result(faster.case, rf_kernels=1.0, published=1.4, sdpa=0.9)}
    assert faster.judge(met)["met"] and over_sdpa.judge(met)["met"]
    missed = {faster.case.id: result(faster.case, rf_kernels=1.0, published=1.2, sdpa=0.8)}
    assert faster.judge(missed)["met"] is False and over_sdpa.judge(missed)["met"] is False
    assert over_sdpa.judge(missed)["figure"] == pytest.approx(1.25) and "MISSED" in aims.line(
        over_sdpa.judge(missed)
    )
    assert faster.judge({})["met"] is None and "not measured" in aims.line(faster.judge({}))


def test_geometric_mean_per_op_and_peer():
    case = CASES[0]
    results = [result(case, a=1.0, b=2.0), result(case, a=1.0, b=8.0, c=3.0)]
    assert geometric_means(results) == {case.op: {"b": pytest.approx(4.0), "c": pytest.approx(3.0)}}


def test_a_run_prints_writes_and_plots(tmp_path, capsys, monkeypatch):
    case = layer.case("repeat forward", tiny())
    monkeypatch.setattr(command, "groups", lambda: {"layer": [case]})
    monkeypatch.setattr(command, "roof", lambda *_: {"bytes_per_s": 1e10, "flops_per_s": 1e11})
    arguments = ["--seconds", "0.01", "--device", "cpu", "--repro", "--json", str(tmp_path / "b.json")]
    assert command.main([*arguments, "--plot", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    assert f"python -m benchmarks --case '{case.id}' --device cpu" in printed
    assert "# geometric means" in printed and printed.count("not measured") == len(aims.aims())
    report = json.loads((tmp_path / "b.json").read_text())
    (found,) = report["results"]
    assert set(found["timings"]) == set(case.names) and found["timings"]["rf_kernels"]["rounds"] >= 5
    assert found["times_faster_than"]["sdpa"] == pytest.approx(
        found["timings"]["sdpa"]["p50"] / found["timings"]["rf_kernels"]["p50"]
    )
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["commit"]
    assert (tmp_path / "plots/layer.png").stat().st_size > 1000


def test_a_disturbed_case_is_repeated_and_the_calmest_run_kept(monkeypatch):
    case = CASES[0]
    runs = []
    for p80 in (2.0, 1.2, 1.1):
        timings = {"ours": Timing(1.0, 1.0, p80, 5), "peer": Timing(1.0, 1.0, 1.0, 5)}
        runs.append(bench.row(case.op, case.shape, case.dtype, timings))
    monkeypatch.setattr(command, "run_apart", lambda *_: runs[next(turn)])
    turn = iter(range(3))
    kept = command.settled(case, command.parse(["--settle", "3"]))
    assert kept["runs"] == 2 and command.spread(kept) == 1.2
    turn = iter(range(3))
    assert command.settled(case, command.parse([]))["runs"] == 1


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match="no such case on cpu: nothing/like/it"):
        command.main(["--case", "nothing/like/it", "--device", "cpu"])


def test_cases_run_under_pytest_benchmark(tmp_path):
    case = next(case for case in bench.groups()["ema_evict"] if case.quick and case.device in (None, "cpu"))
    options = [
        "-k",
        case.id.split("/")[1] + " and float32",
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=1",
    ]
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/pytest_cases.py", *options]
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command.append(f"--benchmark-json={report}")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    found = json.loads(report.read_text())["benchmarks"]
    assert found and all(one["group"].startswith("ema_evict/") for one in found)
    assert any(one["name"].endswith("-ema_evict]") for one in found)
