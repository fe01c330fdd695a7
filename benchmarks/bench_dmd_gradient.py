"""dmd_gradient under pytest-benchmark; cases and candidates are defined in rf_kernels/bench/dmd_gradient.py.

pytest benchmarks/bench_dmd_gradient.py --benchmark-only
python -m rf_kernels.bench --op dmd_gradient         # the same cases, candidates in turn, with ratios
"""

from rf_kernels.bench import dmd_gradient

CASES = dmd_gradient.cases()


def test_dmd_gradient(run_case, case, name):
    run_case(case, name)
