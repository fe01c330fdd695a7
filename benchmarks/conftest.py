"""The cases of rf_kernels/bench under pytest-benchmark: one test for each candidate of each case of the file's ``CASES``.

Candidates run one after another here. For ratios use ``python -m rf_kernels.bench``, which interleaves them.
"""

from functools import lru_cache

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    cases = [case for case in metafunc.module.CASES if case.device in (None, DEVICE)]
    pairs = [pytest.param(case, name, id=f"{case.id}-{name}") for case in cases for name in case.names]
    metafunc.parametrize(("case", "name"), pairs)


@lru_cache(maxsize=1)  # the candidates of a case follow one another and share its inputs
def candidates(case):
    return case.candidates(DEVICE)


@pytest.fixture
def run_case(benchmark):
    def run(case, name):
        call = candidates(case)[name]

        def complete():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.id
        benchmark.extra_info |= case.cost | {"device": DEVICE}
        benchmark.pedantic(complete, rounds=10, warmup_rounds=2)

    return run
