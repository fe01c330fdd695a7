"""rope_append under pytest-benchmark; cases and candidates are defined in rf_kernels/bench/rope_append.py.

pytest benchmarks/bench_rope_append.py --benchmark-only
python -m rf_kernels.bench --op rope_append         # the same cases, candidates in turn, with ratios
"""

from rf_kernels.bench import rope_append

CASES = rope_append.cases()


def test_rope_append(run_case, case, name):
    run_case(case, name)
