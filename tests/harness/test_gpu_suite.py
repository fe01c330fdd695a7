"""The GPU suite's own code on the CPU: tiny shapes through the same path, and that nothing that fails is
hidden."""

import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import facts, plots
from benchmarks.gpu_suite import SCHEMA, attention, checks, device, memory
from benchmarks.gpu_suite import __main__ as suite
from benchmarks.gpu_suite.jobs import Job, Options, Rows, run_jobs
from benchmarks.gpu_suite.report import HOMES, assemble, counts_of, read_rows, write

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--tiny", "--seconds", "0.01"]


def options_for(tmp_path, **changes):
    values = {"device": "cpu", "rows": Rows(tmp_path / "rows.jsonl"), "seconds": 0.01, "limit": 60.0}
    return Options(**values | {"tiny": True, "quick": False} | changes)


def rows_of(tmp_path, kind):
    return [row for row in read_rows(tmp_path / "rows.jsonl") if row["kind"] == kind]


def report_of(tmp_path, stages=()):
    return assemble("dry-run", {}, list(stages), read_rows(tmp_path / "rows.jsonl"), complete=True)


@pytest.fixture
def own_tests(tmp_path):
    """A folder of tests: one that passes, one that fails, one that takes its process with it, one without a
    GPU test."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_gpu_good.py").write_text("def test_dispatch(): pass\n")
    (folder / "test_gpu_bad.py").write_text("def test_wrong(): assert 1 == 2\ndef test_right(): pass\n")
    (folder / "test_gpu_lost.py").write_text("import os\ndef test_dies(): os._exit(66)\n")
    (folder / "test_other.py").write_text("def test_of_the_cpu(): pass\n")
    return folder


# ---- benchmarks --------------------------------------------------------------------------------------------


def fake_flash_attention_3(monkeypatch, function):
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)


def right(q, k, v, num_splits=1):
    out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return out.transpose(1, 2), None


def test_attention_stage(tmp_path, monkeypatch):
    fake_flash_attention_3(monkeypatch, right)
    attention.main([*TINY, "--rows", str(tmp_path / "rows.jsonl")])
    (row,) = rows_of(tmp_path, "result")
    assert next(iter(row["timings"])) == "sink_window_attention" and row["flops"] and row["bytes"]
    assert {"flash_sdpa", "sdpa", "concatenated", "flex_attention", "flash_attention_3"} <= set(
        row["timings"]
    )
    assert all(0 < t["p20"] <= t["p50"] <= t["p80"] for t in row["timings"].values())
    assert "cudnn_sdpa" in row["left_out"]  # there is none on the CPU, and the row says so
    assert report_of(tmp_path)["problems"] == []


def test_a_peer_that_is_wrong_is_named_and_not_timed(tmp_path, monkeypatch):
    fake_flash_attention_3(monkeypatch, lambda q, k, v, **_: torch.zeros_like(q))
    attention.main([*TINY, "--rows", str(tmp_path / "rows.jsonl")])
    (row,) = rows_of(tmp_path, "result")
    assert "differs from the float64 result" in row["left_out"]["flash_attention_3"]
    assert not any("flash_attention_3" in name for name in row["timings"])


def test_a_result_of_ours_that_is_wrong_is_a_problem(tmp_path, monkeypatch):
    job = attention.job(attention.Shape("tiny", grid=(2, 3), heads=2, head_dim=32))
    monkeypatch.setattr(attention, "sink_window_attention", lambda q, k, v, **_: torch.zeros_like(q))
    run_jobs([job], options_for(tmp_path))
    (row,) = rows_of(tmp_path, "result")
    assert "timings" not in row and "differs" in row["error"] and "AssertionError" in row["trace"]
    (problem,) = report_of(tmp_path)["problems"]
    assert "differs from the float64 result" in problem


def test_memory_stage(tmp_path):
    memory.main([*TINY, "--rows", str(tmp_path / "rows.jsonl")])
    rows = rows_of(tmp_path, "result")
    assert [row["op"] for row in rows] == ["rope_append", "ema_evict", "dmd_gradient", "layer"]
    assert not any("error" in row or row["left_out"] for row in rows), rows
    assert all("compiled" in row["timings"] and "eager" in row["timings"] for row in rows[:3])


def test_what_torch_compile_makes_of_it_is_checked(monkeypatch):
    monkeypatch.setattr(memory, "rotated", lambda x, cos, sin: x)
    with pytest.raises(AssertionError, match="torch.compile's result differs"):
        memory.compiled_append(
            memory.rope_append.Shape("tiny", grid=(2, 3), heads=2, head_dim=32), torch.float32, "cpu"
        )


def test_every_job_of_the_real_run_names_its_shape_once():
    jobs = attention.jobs() + memory.jobs()
    names = [(job.op, job.shape, job.dtype) for job in jobs]
    assert len(set(names)) == len(names) and len(names) > 30
    assert all(job.cost["flops"] > 0 and job.cost["bytes"] > 0 for job in jobs)
    quick = attention.jobs(quick=True) + memory.jobs(quick=True)
    assert {(job.op, job.shape, job.dtype) for job in quick} < set(names)


def test_jobs_without_time_are_said_to_be_left_undone(tmp_path):
    def build(device):
        return {"ours": lambda: None}, {}

    jobs = [Job("first", "s", torch.float32, build), Job("second", "s", torch.float32, build)]
    run_jobs(jobs, options_for(tmp_path, limit=0.001))
    assert [row["op"] for row in rows_of(tmp_path, "skipped")] == ["second"] or len(
        rows_of(tmp_path, "skipped")
    ) == 2


def test_device_stage(tmp_path):
    device.main([*TINY, "--rows", str(tmp_path / "rows.jsonl")])
    (row,) = rows_of(tmp_path, "doctor")
    assert all(test["ok"] for test in row["self_test"])
    assert rows_of(tmp_path, "device")[0]["packages"]["pytest"] == pytest.__version__


# ---- tests and sanitizer -----------------------------------------------------------------------------------


def test_tests_that_fail_or_take_their_process_along_are_reported(tmp_path, own_tests):
    checks.gpu_tests(options_for(tmp_path), own_tests)
    found = {row["id"].split("::")[-1].split(": ")[0]: row for row in rows_of(tmp_path, "test")}
    assert found["test_dispatch"]["outcome"] == found["test_right"]["outcome"] == "passed"
    assert found["test_wrong"]["outcome"] == "failed" and "1 == 2" in found["test_wrong"]["message"]
    assert found["test_gpu_lost"]["outcome"] == "error" and "status 66" in found["test_gpu_lost"]["message"]
    assert "test_of_the_cpu" not in found
    report = report_of(tmp_path)
    assert report["test_counts"] == {"passed": 2, "failed": 1, "error": 1, "skipped": 0}
    assert len(report["problems"]) == 2


def test_a_test_run_that_hangs_or_selects_nothing_is_reported(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(600)\n")
    for limit in (6, 30, 120):  # a busy machine takes longer to begin
        rows = checks.run_pytest([str(slow)], limit)
        if len(rows) == 2:
            break
    quick, stopped = rows
    assert quick["outcome"] == "passed" and "ran past its limit" in stopped["message"]
    assert "no test was selected" in checks.run_pytest([str(slow), "-k", "nothing"], 60)[-1]["message"]


def test_the_suite_runs_every_gpu_test_of_the_repository():
    names = {path.name for path in checks.gpu_test_files(ROOT / "tests")}
    assert {"test_gpu_ops.py", "test_gpu_stream.py", "test_rope_append_kernel.py"} <= names
    assert "test_gpu_suite.py" not in names


def fake_sanitizer(tmp_path, monkeypatch, script):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("script, outcome", [('shift 6\nexec "$@"', "clean"), ("exit 66", "failed")])
def test_sanitizer(tmp_path, monkeypatch, script, outcome):
    """A stand-in for the tool: one that runs what it is given, and one that finds something."""
    fake_sanitizer(tmp_path, monkeypatch, script)
    mark = "import pytest\n@pytest.mark.gpu\ndef test_append_agrees(): pass\n"
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "test_gpu_ops.py").write_text(mark)
    checks.sanitizer(options_for(tmp_path), tmp_path)
    rows = rows_of(tmp_path, "sanitizer")
    others = "reported" if outcome == "failed" else outcome
    assert [(row["tool"], row["outcome"]) for row in rows] == [
        ("memcheck", outcome),
        ("synccheck", others),
        ("racecheck", others),
    ]
    assert len(report_of(tmp_path)["problems"]) == (0 if outcome == "clean" else 1)


def test_no_tool_but_memcheck_sees_attention():
    """The names of the selections are of tests that there are; those of attention stay with memcheck."""
    text = (ROOT / "tests" / "gpu" / "test_gpu_ops.py").read_text()
    names = re.findall(r"^def (test_\w+)", text, re.M)
    for tool, selection in checks.TOOLS.items():
        words = re.findall(r"\w+", selection.replace(" or ", " ").replace(" and ", " "))
        chosen = {name for name in names if any(word in name for word in words)}
        assert all(any(word in name for name in names) for word in words if word != "bfloat16"), tool
        assert any("attention" in name or "dispatch" in name for name in chosen) == (tool == "memcheck"), (
            tool,
            chosen,
        )


def test_what_a_stopped_run_had_started_is_stopped_too(tmp_path):
    """As compute-sanitizer does, the command starts a child of its own and waits for it."""
    pid = tmp_path / "pid"
    status, output = checks.run_limited(
        ["sh", "-c", f"echo begun; sleep 600 & echo $! > {pid}; wait"], 5, dict(os.environ)
    )
    assert status is None and "begun" in output
    child = int(pid.read_text())
    for _ in range(100):  # a killed child is there until init has collected it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} goes on")


def test_tests_of_streams_run_alone(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    mark, others = tmp_path / "running", ["test_gpu_a.py", "test_gpu_b.py"]
    body = f"import time\nfrom pathlib import Path\nMARK = Path({str(mark)!r} + Path(__file__).stem)\n"
    slow = "def test_slow():\n    MARK.touch()\n    time.sleep(0.5)\n    MARK.unlink()\n"
    alone = f"def test_alone(): assert not list(Path({str(tmp_path)!r}).glob('running*'))\n"
    for name in others:
        (folder / name).write_text(body + slow)
    (folder / checks.ALONE[0]).write_text(body + "def test_first(): time.sleep(0.2)\n" + alone)
    checks.gpu_tests(options_for(tmp_path), folder)
    assert [row["outcome"] for row in rows_of(tmp_path, "test")] == ["passed"] * 4
    assert (ROOT / "tests" / "gpu" / checks.ALONE[0]).is_file()


def test_tests_of_a_chip_do_not_build_the_functional_model():
    """They run first there, with a time limit and perhaps without a compiler."""
    for path in checks.gpu_test_files(ROOT / "tests"):
        text = path.read_text()
        assert not re.search(r"\bbuild\.(load|build)\(|from chip\.build|import build", text), path
    assert "test_gpu_attention_sm90.py" in {path.name for path in checks.gpu_test_files(ROOT / "tests")}


def test_sanitizer_is_said_to_be_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    checks.sanitizer(options_for(tmp_path), tmp_path)
    (row,) = rows_of(tmp_path, "sanitizer")
    assert row["outcome"] == "absent" and report_of(tmp_path)["problems"] == []


# ---- the run -----------------------------------------------------------------------------------------------


def test_stages_that_die_or_hang_cost_themselves_alone(tmp_path, monkeypatch):
    """What a stage wrote before it was stopped is in the report; a partial report is on disk before every
    stage."""
    body = "import sys\npath = sys.argv[sys.argv.index('--rows') + 1]\nopen(path, 'a').write('{}\\n')\n"
    note = '{"kind": "note", "text": "%s"}'
    (tmp_path / "stage_dies.py").write_text(body.replace("{}", note % "before") + "import os\nos.abort()\n")
    (tmp_path / "stage_hangs.py").write_text(
        body.replace("{}", note % "half") + "import time\ntime.sleep(99)\n"
    )
    seen = (
        f"partial = open({str(tmp_path / 'out' / 'report.json')!r}).read()\nassert '\"complete\": false' in"
        " partial\n"
    )
    (tmp_path / "stage_works.py").write_text(body.replace("{}", note % "works") + seen)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = {"dies": 60, "hangs": 5, "works": 60}
    stages = [suite.Stage(name, f"stage_{name}", limit) for name, limit in names.items()]
    monkeypatch.setattr(suite, "stages", lambda options: stages)
    assert suite.main(["--out", str(tmp_path / "out"), "--dry-run"]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [stage["status"] for stage in report["stages"]] == ["failed", "failed", "ok"]
    assert "stopped at its limit" in report["stages"][1]["reason"]
    assert [n["text"] for n in report["notes"]] == ["before", "half", "works"]
    assert report["complete"] and len(report["problems"]) == 2


def test_without_a_gpu_it_says_so_and_is_content(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "tests").mkdir()
    assert suite.main(["--out", str(tmp_path / "out"), "--tests", str(tmp_path / "tests")]) == 0
    assert "torch sees no CUDA device" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mode"] == "no-gpu" and report["results"] == []
    assert "not built" in report["notes"][0]["text"]


def test_a_wheel_has_no_tests_and_says_so(tmp_path):
    checks.main(["tests", str(tmp_path / "absent"), *TINY, "--rows", str(tmp_path / "rows.jsonl")])
    assert "a wheel carries none" in rows_of(tmp_path, "note")[0]["text"]


def test_limits_of_the_stages_fit_in_eight_minutes():
    options = suite.parse(["--out", "unused", "--dry-run"])
    assert sum(stage.limit for stage in suite.stages(options)) + suite.PLOTS_S < 480 and options.budget < 480


def test_report_survives_a_line_that_was_cut_off(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"kind": "ceiling", "dtype": "bfloat16"}\n{"kind": "resu')
    report = report_of(tmp_path)
    assert len(report["ceilings"]) == 1 and "cut off" in report["notes"][0]["text"]
    write(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == SCHEMA
    assert set(HOMES.values()) <= set(report)


def test_smi_is_read_in_its_own_words(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "1980 MHz, 3201 MHz, 612.5 W"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = facts.smi(("clocks.sm", "clocks.mem", "power.draw"))
    assert found == {"clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "612.5 W"}
    tool.write_text('#!/bin/sh\ncase "$1" in *pstate*) exit 2;; *) echo 7;; esac\n')
    assert facts.smi(("power.draw", "pstate")) == {"power.draw": "7", "pstate": "status 2"}
    tool.write_text("#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    assert facts.smi(("clocks.sm",)) == {"error": "no devices were found"}


def test_counts():
    tests = [{"outcome": name} for name in ("passed", "passed", "skipped", "error")]
    assert counts_of(tests) == {"passed": 2, "failed": 0, "error": 1, "skipped": 1}


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    timings = {name: {"p20": 1e-3, "p50": 2e-3, "p80": 3e-3, "rounds": 5} for name in ("ours", "peer")}
    row = {
        "kind": "result",
        "shape": "s",
        "dtype": "bfloat16",
        "flops": 10**9,
        "bytes": 10**6,
        "timings": timings,
    }
    rows = [row | {"op": op} for op in ("sink_window_attention", "rope_append", "denoising forward")]
    rows.append({"kind": "result", "op": "rope_append", "shape": "s", "dtype": "bfloat16", "error": "no"})
    rows.append({"kind": "series", "what": "seconds per chunk", "name": "ours", "values": [0.1, 0.2]})
    rows.append({"kind": "ceiling", "dtype": "bfloat16", "bytes_per_s": 4e12, "flops_per_s": 8e14})
    report = assemble("gpu", {"gpu": "a GPU", "torch": "2", "date": "today"}, [], rows, complete=True)
    drawn = plots.draw(report, tmp_path)
    assert drawn == ["attention.png", "memory.png", "roofline.png", "stream.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)


@pytest.mark.heavy
def test_dry_run(tmp_path, own_tests):
    """The command itself: every stage in its process."""
    (own_tests / "test_gpu_lost.py").unlink()
    (own_tests / "test_gpu_bad.py").unlink()
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--seconds", "0.01", "--sanitizer"]
    command += ["--out", str(tmp_path / "out"), "--tests", str(own_tests)]
    tools = Path(sys.executable).parent  # no compute-sanitizer there
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "PATH": os.pathsep.join((str(tools), "/usr/bin", "/bin")),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["mode"] == "dry-run" and report["complete"] and report["problems"] == []
    assert [stage["status"] for stage in report["stages"]] == ["ok"] * 6
    ops = {row["op"] for row in report["results"]}
    assert {
        "sink_window_attention",
        "rope_append",
        "ema_evict",
        "dmd_gradient",
        "layer",
        "denoising forward",
    } <= ops
    assert report["test_counts"]["passed"] == 1 and report["sanitizer"][0]["outcome"] == "absent"
    assert len(report["series"][0]["values"]) == 5
    for fact in ("date", "commit", "torch", "gpu", "arguments", "source_commit"):
        assert fact in report["environment"]
