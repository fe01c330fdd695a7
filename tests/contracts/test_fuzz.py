"""Differential fuzzing in CI (tests/helpers/fuzz.py is the generator, and repeats a failure by its op and
seed)."""

import pytest
import torch

import rf_kernels as rf
from helpers import fuzz

pytestmark = pytest.mark.usefixtures("one_thread")

# Seeds of the heavy run: what an op's cost allows within a minute on two cores.
HEAVY = {
    "rope_append": 6000,
    "rope": 6000,
    "ema_evict": 6000,
    "dmd_gradient": 4000,
    "sink_window_attention": 1500,
    "stream": 1200,
}


@pytest.mark.parametrize("op", fuzz.FUZZERS)
def test_50_configurations(op):
    failures = fuzz.run(op, range(50))
    assert not failures, "\n".join(failures)


@pytest.mark.heavy
@pytest.mark.parametrize("op", fuzz.FUZZERS)
def test_thousands_of_configurations(op):
    failures = fuzz.run(op, range(50, 50 + HEAVY[op]))
    assert not failures, "\n".join(failures[:20])


def test_a_seed_is_one_configuration():
    numbers = [fuzz.Draw("rope", 7).numbers((3, 4)) for _ in range(2)]
    assert torch.equal(*numbers) and not torch.equal(
        numbers[0], fuzz.Draw("rope", 9).numbers((3, 4)).to(numbers[0].dtype)
    )


FAULTS = {
    "rope_append": ("rope_append", lambda out, call: out.view(-1)[-1].add_(1)),
    "a neighbour in memory": (
        "rope_append",
        lambda out, call: torch.as_strided(call["q"], (1,), (1,), 0).fill_(1),
    ),
    "rope": ("rope", lambda out, call: out.detach().view(-1)[0].add_(1)),
    "sink_window_attention": (
        "sink_window_attention",
        lambda out, call: out[0].detach().view(-1)[0].mul_(1.5).add_(1),
    ),
    "dmd_gradient": (
        "dmd_gradient",
        lambda out, call: out[0].view(-1)[0].add_(1) if isinstance(out, tuple) else None,
    ),
    "ema_evict": ("ema_evict", lambda out, call: call["v_cache"][:, -1, 0, 0].add_(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, monkeypatch):
    """The fuzzer itself: an op that is off by one in one element, or writes beside its output."""
    op, spoil = FAULTS[fault]
    original = getattr(rf, op)

    def faulty(*args, **kwargs):
        out = original(*args, **kwargs)
        spoil(out, kwargs)
        return out

    monkeypatch.setattr(rf, op, faulty)
    assert len(fuzz.run(op, range(40))) > 10


def test_running_out_of_memory_is_a_failure(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(rf, "rope", no_memory)
    failures = fuzz.run("rope", range(4))
    assert len(failures) == 4 and all("--op rope --seed" in f and "OutOfMemoryError" in f for f in failures)
