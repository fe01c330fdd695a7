"""The catalogue of planted faults is one of the sources as they are, and its report is whole (`make mutants` plants the faults and
writes the report; CI plants ten)."""

import re
from collections import Counter

import pytest
from mutants import catalogue

FAULTS = catalogue.load()
REPORT = catalogue.ROOT / "tests" / "mutants" / "report.md"


def test_the_catalogue_is_large_and_covers_all_kinds_and_areas():
    assert len(FAULTS) >= 100
    assert not [name for name, n in Counter(fault.id for fault in FAULTS).items() if n > 1]
    assert {fault.kind for fault in FAULTS} == set(catalogue.KINDS)
    files = {fault.file for fault in FAULTS}
    for area in (
        "csrc/math/",
        "csrc/rope_append/",
        "csrc/ema_evict/",
        "csrc/dmd_gradient/",
        "csrc/sink_window_attention/",
    ):
        assert any(file.startswith(area) for file in files), area
    assert {"rf_kernels/cache.py", "rf_kernels/plan.py", "python/reward_forcing/losses.py"} <= files


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_every_fault_has_its_place(file):
    """Its text occurs once, and what replaces it is another."""
    text = (catalogue.ROOT / file).read_text()
    wrong = [fault.id for fault in FAULTS if fault.file == file and text.count(fault.old) != 1]
    assert not wrong
    assert not [fault.id for fault in FAULTS if fault.file == file and fault.planted_in(text) == text]


def test_the_sample_is_ten_of_different_kinds_and_files():
    sample = [fault for fault in FAULTS if fault.id in catalogue.SAMPLE]
    assert len(sample) == len(catalogue.SAMPLE) == 10
    assert {fault.compiled for fault in sample} == {True, False}
    assert len({fault.file for fault in sample}) >= 8 and len({fault.kind for fault in sample}) >= 8
    assert not [fault.id for fault in sample if fault.equivalent]


def test_the_report_is_of_this_catalogue():
    text = REPORT.read_text()
    rows = {tuple(cell.strip() for cell in row.split("|")[1:4]) for row in text.splitlines() if row.startswith("| ")}
    missing = [fault.id for fault in FAULTS if (fault.id, fault.kind, fault.breaks) not in rows]
    assert not missing, "run `make mutants`"
    caught, total = map(int, re.search(r"\*\*(\d+) of (\d+) faults caught", text).groups())
    assert total == len(FAULTS) and caught >= 0.98 * total
    promised = (catalogue.ROOT / "docs" / "promises.md").read_text()
    assert f"{caught} of {total} planted faults" in promised


def test_a_catalogue_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text(
        "# a comment\nfile a.h\n\none | sign | breaks a | b\n- x\n-   y\n+ z\n\ntwo | scale | breaks c\n- q\n? why\n"
    )
    one, two = catalogue.read(path)
    assert one == catalogue.Fault("one", "a.h", "sign", "breaks a | b", "x\n  y", "z")
    assert two == catalogue.Fault("two", "a.h", "scale", "breaks c", "q", "", "why")
    assert one.planted_in("(x\n  y)") == "(z)"
    for text in ("x", "x\n  y x\n  y"):
        with pytest.raises(ValueError, match="times in a.h, not once"):
            one.planted_in(text)
    path.write_text("file a.h\n-x\n")
    with pytest.raises(ValueError, match="some.txt:2"):
        catalogue.read(path)
