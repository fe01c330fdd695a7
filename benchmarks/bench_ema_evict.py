"""ema_evict under pytest-benchmark; cases and candidates are defined in rf_kernels/bench/ema_evict.py.

pytest benchmarks/bench_ema_evict.py --benchmark-only
python -m rf_kernels.bench --op ema_evict         # the same cases, candidates in turn, with ratios
"""

from rf_kernels.bench import ema_evict

CASES = ema_evict.cases()


def test_ema_evict(run_case, case, name):
    run_case(case, name)
