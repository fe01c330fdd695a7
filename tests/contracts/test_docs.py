"""The documents and what they are made from say the same: the API reference names all that is public, figures
are those of the committed reports, and the reports are those of the code."""

import re
from pathlib import Path

import torch

import rf_kernels
from benchmarks import accuracy, ema_study, fill_readme

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_in_the_api_reference():
    text = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    named = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)}
    assert not set(rf_kernels.__all__) - named


def test_documents_say_what_the_reports_say():
    assert not fill_readme.stale()


def test_a_changed_report_makes_the_readme_stale(monkeypatch):
    fill = fill_readme
    real = fill.load

    def changed(name):
        report = real(name)
        if name == "cpu":
            report["aims"][0]["figure"] += 1
        return report

    monkeypatch.setattr(fill, "load", changed)
    assert fill.stale() == ["README.md"]


def test_the_cpu_report_names_its_machine_and_judges_its_own_timings():
    from benchmarks import aims

    report = fill_readme.load("cpu")
    assert all(
        report["environment"][fact]
        for fact in ("date", "commit", "torch", "python", "cpu", "cores", "threads")
    )
    results = {result["case"]: result for result in report["results"]}
    assert report["aims"] == [aim.judge(results) for aim in aims.aims()]


def test_errors_are_still_those_of_the_report():
    """One op recomputed: within a factor of two of the committed figures (the last bits differ between
    machines)."""
    found = accuracy.table((accuracy.dmd_gradient, accuracy.rope_append))
    committed = {(r["op"], r["quantity"], r["dtype"]): r for r in fill_readme.load("accuracy")}
    assert len(found) >= 20
    for row in found:
        before = committed[row["op"], row["quantity"], row["dtype"]]
        floor = torch.finfo(getattr(torch, row["dtype"])).eps if row["dtype"] == "float64" else 1e-8
        assert row["ours"] <= 2 * before["ours"] + floor, row


def test_at_0999_every_bf16_number_decays_to_itself():
    """The statement of docs/numerics.md, over all positive normal numbers; and at 0.99 it is false for
    most."""
    bits = torch.arange(0x0080, 0x7F80, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    assert torch.equal(0.999 * numbers, numbers)
    assert float((0.99 * numbers == numbers).double().mean()) < 0.5


def test_the_study_of_the_sink_repeats():
    """Ten evictions: the published state has lost most of its way, the default state has not."""
    study = ema_study
    rows = study.follow(0.999, 10)
    committed = fill_readme.load("ema_study")["alpha"]["0.999"]
    for row, before in zip(rows, committed, strict=False):
        assert row["evictions"] == before["evictions"]
        assert abs(row["state"]["published"] / before["state"]["published"] - 1) < 0.05
    assert rows[-1]["published_error_over_way"] > 0.8 and rows[-1]["published_never_changed"] > 0.6
    assert rows[-1]["state"]["compensated"] < 1e-2 * rows[-1]["state"]["published"]
