"""The comparison with FlashAttention-3's machine code: what it does without a checkout, and what it reads
from a loop."""

import shutil

import pytest

from benchmarks import audit, compare_fa3


def test_without_a_checkout_it_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.delenv("FLASH_ATTENTION_SOURCE", raising=False)
    assert compare_fa3.main([]) == 0
    assert "Name a checkout of FlashAttention" in capsys.readouterr().out


@pytest.mark.parametrize("named", ["argument", "environment"])
def test_a_folder_that_is_no_checkout_is_refused(named, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLASH_ATTENTION_SOURCE", str(tmp_path))
    assert compare_fa3.main([str(tmp_path)] if named == "argument" else []) == 2
    assert f"found {tmp_path}" in capsys.readouterr().err


def test_a_checkout_is_found_from_its_root_and_from_hopper(tmp_path):
    header = tmp_path / "hopper" / "flash_fwd_launch_template.h"
    header.parent.mkdir()
    header.touch()
    assert compare_fa3.checkout(str(tmp_path)) == compare_fa3.checkout(str(header.parent)) == header.parent


def test_without_nvcc_it_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "flash_fwd_launch_template.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compare_fa3.main([str(tmp_path)]) == 2
    assert "no nvcc" in capsys.readouterr().err


def test_the_columns_of_the_table():
    texts = [
        "SYNCS.PHASECHK",
        "HGMMA.64x176x16.F32.BF16 R24, gdesc[UR4]",
        "HGMMA.64x128x16.F32.BF16 R4, R8, gdesc[UR4].tnspB",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "SYNCS.ARRIVE",
        "MUFU.EX2 R1, R1",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "F2FP",
        "BRA 0x0",
    ]
    kernel = audit.Kernel("k", "sm_90a", [(16 * i, t) for i, t in enumerate(texts)], registers=168)
    column = compare_fa3.column(kernel, 128)
    assert column["query x key tile"] == "128 x 176" and column["executed per key tile"] == len(texts)
    assert column["exponentials between the two waits"] == "1 of 88" and column["`HGMMA`"] == 2
    text = compare_fa3.table({"ours": column, "theirs": column})
    assert text.count("\n") == len(column) + 1 and "| `HGMMA` | 2 | 2 |" in text
    assert compare_fa3.listing(kernel, kernel).count("MUFU.EX2 R1, R1") == 2
