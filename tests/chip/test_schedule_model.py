"""The cost model of the Hopper schedule: what it promises, and that the document shows what it prints."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("schedule_model", ROOT / "benchmarks" / "schedule_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("queries", "heads", "gain", "gain_over_tuned"),
    [(4680, 12, 1.15, 1.10), (1560, 12, 1.5, 1.12), (4680, 3, 1.1, 1.10)],
)
def test_gains(model, queries, heads, gain, gain_over_tuned):
    """Over one query tile per CTA, and over the best of 1 to 4 splits: the shapes that the schedule is for."""
    x = model.evaluate(queries, heads, 14040)
    assert x["gain"] >= gain and x["gain_over_tuned"] >= gain_over_tuned


def test_never_slower_than_one_tile_per_cta(model):
    for shape in model.ALL:
        assert model.evaluate(*shape)["gain"] >= 0.995, shape


def test_the_model_counts_what_the_schedule_does(model, monkeypatch):
    """Without costs of merging and with equal SMs, the time is that of the longest range."""
    for name in ("FRAGMENT", "WRITE_PARTIAL", "MERGE_PARTIAL", "SKEW", "LAUNCH"):
        monkeypatch.setattr(model, name, 0.0)
    monkeypatch.setattr(model, "L2", 1e12)
    p = model.plan(1560, 12, 14040)
    ranges, _, _, count, _ = p["segments"].T
    longest = np.bincount(ranges, weights=count).max()
    assert model.balanced_seconds(p, 1560, 12, 14040) == pytest.approx(longest * model.unit_seconds(p))


def test_the_document_shows_the_models_table(model):
    document = (ROOT / "docs" / "sink_window_attention_sm90.md").read_text()
    assert "\n".join(model.lines(model.TABLE)) in document
