"""The cases of this harness under pytest-benchmark, for those who keep its histories and comparisons:

    pytest benchmarks/pytest_cases.py -k ema_evict --benchmark-autosave

A case is a group; its candidates are ours and its peers. `python -m benchmarks` stays the harness: it runs
each case in a process of its own and its candidates in turns, which a fixture per candidate cannot.
"""

import pytest
import torch

from benchmarks import groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(case, name, id=f"{case.id}-{name}")
    for cases in groups().values()
    for case in cases
    if case.device in (None, DEVICE)
    for name in case.names
]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_case(benchmark, case, name):
    benchmark.group = case.id
    call = case.candidates(DEVICE)[name]

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
