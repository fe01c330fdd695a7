"""The cost model of the Hopper schedule: what it promises, and that the document shows what it prints."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import schedule_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("queries", "heads", "gain", "gain_over_tuned"),
    [(4680, 12, 1.15, 1.10), (1560, 12, 1.5, 1.12), (4680, 3, 1.1, 1.10)],
)
def test_gains(queries, heads, gain, gain_over_tuned):
    """Over one query tile per CTA, and over the best of 1 to 4 splits: the shapes that the schedule is
    for."""
    x = schedule_model.evaluate(queries, heads, 14040)
    assert x["gain"] >= gain and x["gain_over_tuned"] >= gain_over_tuned


def test_never_slower_than_one_tile_per_cta():
    for shape in schedule_model.ALL:
        assert schedule_model.evaluate(*shape)["gain"] >= 0.995, shape


def test_the_model_counts_what_the_schedule_does(monkeypatch):
    """Without costs of merging and with equal SMs, the time is that of the longest range."""
    for name in ("FRAGMENT", "WRITE_PARTIAL", "MERGE_PARTIAL", "SKEW", "LAUNCH"):
        monkeypatch.setattr(schedule_model, name, 0.0)
    monkeypatch.setattr(schedule_model, "L2", 1e12)
    p = schedule_model.plan(1560, 12, 14040)
    ranges, _, _, count, _ = p["segments"].T
    longest = np.bincount(ranges, weights=count).max()
    assert schedule_model.balanced_seconds(p, 1560, 12, 14040) == pytest.approx(
        longest * schedule_model.unit_seconds(p)
    )


def test_the_document_shows_the_models_table():
    document = (ROOT / "docs" / "sink_window_attention_sm90.md").read_text()
    assert "\n".join(schedule_model.lines(schedule_model.TABLE)) in document
